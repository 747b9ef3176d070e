"""Random numbers in the form of a scheme: what the laws use where a golden has only one example."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch

from anybit.weight import levels, nodes
from anybit.weight.nodes import Node
from anybit.weight.weight import Weight

if TYPE_CHECKING:
    from torch import Generator, Tensor

# codes of a named table that no quantizer writes: NaN, and ternary's fourth
_NEVER_WRITTEN = {"ternary": (3,), "e4m3": (0x7F, 0xFF), "e5m2": (0x7C, 0x7D, 0x7E, 0x7F, 0xFC, 0xFD, 0xFE, 0xFF),
                  "e4m3fnuz": (0x80,), "e5m2fnuz": (0x80,), "e8m0": (255,)}  # fmt: skip


def random_weight(scheme: Weight, seed: int = 0, extras: Mapping[str, Tensor] | None = None) -> Weight:
    """A weight on the CPU with the scheme's structure, shapes and dtypes, and legal random contents.

    `extras`: what to put there (they carry no numbers, so nothing random makes sense); default none.
    """
    generator = torch.Generator().manual_seed(seed)
    activation = scheme.activation
    if activation is not None:
        activation = replace(
            activation, tensors=tuple(random_numbers(tensor, generator) for tensor in activation.tensors)
        )
    return Weight(random_node(scheme.tree, generator), scheme.dtype, activation, dict(extras or {}))


def random_node(node: Node, generator: Generator) -> Node:
    """The same node with random contents."""
    match node:
        case nodes.Values():
            return replace(node, tensor=_values(node, generator))
        case nodes.Codes():
            return _codes(node, generator, 1 << node.bits)
        case nodes.Grid():
            return _grid(node, generator)
        case nodes.Codebook():
            return _codebook(node, generator)
        case nodes.Sparse():
            return _sparse(node, generator)
        case nodes.Masked():
            return _masked(node, generator)
        case nodes.Permute():
            return replace(node, child=random_node(node.child, generator), index=_orders(node.index, generator))
        case nodes.Rotate(matrix=torch.Tensor() as stored):
            matrix = torch.linalg.qr(torch.randn(stored.shape, generator=generator))[0].to(stored.dtype)
            return replace(node, child=random_node(node.child, generator), matrix=matrix)
        case nodes.Opaque():
            return replace(node, tensors=tuple(random_numbers(tensor, generator) for tensor in node.tensors))
    below: dict[str, Any] = {}
    for field in fields(node):
        value = getattr(node, field.name)
        if isinstance(value, Node):
            below[field.name] = random_node(value, generator)
        elif isinstance(value, tuple) and value and isinstance(value[0], Node):
            below[field.name] = tuple(random_node(part, generator) for part in value)
    return replace(node, **below)


def random_numbers(like: Tensor, generator: Generator) -> Tensor:
    """Plausible numbers in a tensor's shape and dtype: positive floats around 0.02, small integers."""
    shape, dtype = tuple(like.shape), like.dtype
    if dtype == torch.float8_e8m0fnu:
        return torch.randint(110, 130, shape, generator=generator, dtype=torch.uint8).view(dtype)
    if dtype.is_floating_point:
        return (torch.rand(shape, generator=generator) * 0.03 + 0.01).to(dtype)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    low = 0 if not dtype.is_signed else -4
    return torch.randint(low, 4, shape, generator=generator).to(dtype)


def _values(node: nodes.Values, generator: Generator) -> Tensor:
    if node.levels is None:
        return random_numbers(node.tensor, generator)
    if node.levels == "e8m0":
        codes = torch.randint(110, 130, tuple(node.tensor.shape), generator=generator)
    else:
        codes = _legal_codes(node.levels, tuple(node.tensor.shape), 1 << levels.BITS[node.levels], generator)
    return codes.to(torch.uint8).view(node.tensor.dtype)


def _legal_codes(table: str | None, shape: tuple[int, ...], count: int, generator: Generator) -> Tensor:
    codes = torch.randint(0, count, shape, generator=generator)
    for never in _NEVER_WRITTEN.get(table or "", ()):
        codes[codes == never] = 0 if table != "ternary" else 1
    return codes


def _codes(node: nodes.Codes, generator: Generator, count: int, table: str | None = None) -> nodes.Codes:
    codes = _legal_codes(table, node.shape, min(count, 1 << node.bits), generator)
    return nodes.Codes.of(codes, node.bits, node.signed)


def _grid(node: nodes.Grid, generator: Generator) -> Node:
    count, table = 1 << 30, None
    if isinstance(node.levels, str):
        table, count = node.levels, 1 << levels.BITS[node.levels]
    elif node.levels is not None:
        count = node.levels.shape[-1]
    if isinstance(node.codes, nodes.Codes):
        codes: Node = _codes(node.codes, generator, count, table)
    else:
        codes = random_node(node.codes, generator)
    parts: dict[str, Any] = {
        name: random_node(part, generator)
        for name in ("scale", "zero", "offset")
        if (part := getattr(node, name)) is not None
    }
    stored = (
        torch.randn(node.levels.shape, generator=generator).to(node.levels.dtype)
        if isinstance(node.levels, torch.Tensor)
        else node.levels
    )
    return replace(node, codes=codes, levels=stored, group_index=_groups(node, generator), **parts)


def _groups(node: nodes.Grid, generator: Generator) -> Tensor | None:
    """Every group as often as its neighbours, in random order."""
    if node.group_index is None:
        return None
    columns = node.group_index.shape[-1]
    groups = max((part.shape[-1] for part in (node.scale, node.zero, node.offset) if part is not None), default=1)
    size = -(-columns // groups)
    flat = torch.stack([
        (torch.randperm(columns, generator=generator) // size) for _ in range(math.prod(node.group_index.shape[:-1]))
    ])  # fmt: skip
    return flat.view(node.group_index.shape).to(node.group_index.dtype)


def _orders(index: Tensor, generator: Generator) -> Tensor:
    rows = [torch.randperm(index.shape[-1], generator=generator) for _ in range(math.prod(index.shape[:-1]))]
    return torch.stack(rows).view(index.shape).to(index.dtype)


def _codebook(node: nodes.Codebook, generator: Generator) -> Node:
    entries = node.books().shape[-3]
    codes = (
        _codes(node.codes, generator, entries)
        if isinstance(node.codes, nodes.Codes)
        else random_node(node.codes, generator)
    )
    tables = node.tables
    if not isinstance(tables, str):
        tables = torch.randn(tables.shape, generator=generator).to(tables.dtype)
    parts: dict[str, Any] = {
        name: random_node(part, generator) for name in ("scale", "signs") if (part := getattr(node, name)) is not None
    }
    return replace(node, codes=codes, tables=tables, **parts)


def _sparse(node: nodes.Sparse, generator: Generator) -> Node:
    stored, (rows, width) = node.columns.shape[0], node.shape
    flat = torch.randperm(rows * width, generator=generator)[:stored].sort().values
    counts = torch.bincount(flat // width, minlength=rows)
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(node.row_offsets.dtype)
    return replace(
        node,
        row_offsets=offsets,
        columns=(flat % width).to(node.columns.dtype),
        values=random_node(node.values, generator),
    )


def _masked(node: nodes.Masked, generator: Generator) -> Node:
    """2:4 if exactly half of the mask is set, else anywhere."""
    (rows, columns), ones = node.mask.shape, node.values.shape[-1]
    if ones * 2 == rows * columns and columns % 4 == 0:
        mask = torch.rand(rows, columns // 4, 4, generator=generator).argsort(-1).view(rows, columns) < 2
    else:
        mask = (torch.randperm(rows * columns, generator=generator) < ones).view(rows, columns)
    offsets = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).to(node.row_offsets.dtype)
    codes = nodes.Codes.of(mask.to(torch.uint8), 1)
    return replace(node, mask=codes, values=random_node(node.values, generator), row_offsets=offsets)
