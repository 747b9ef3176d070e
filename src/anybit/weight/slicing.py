"""Cutting a weight: rows or columns start .. stop as a tree of its own, for tensor parallel loads and fused parts.

Nothing is requantized. A cut must fall between the blocks that share a parameter; NotRepresentable says where it may fall.
Only `start` has to be a multiple of a block (the last block may be short), unless blocks are mixed (vectors, rotations).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from anybit._lazy import torch
from anybit.errors import NotRepresentable
from anybit.weight import nodes
from anybit.weight.gathering import gather_columns, gather_rows
from anybit.weight.nodes import Node
from anybit.weight.weight import Weight

if TYPE_CHECKING:
    from torch import Tensor

ROWS, COLUMNS = 0, 1
_AXIS_NAMES = ("rows", "columns")


class _Misaligned(Exception):
    """A cut inside a block; cuts are possible at multiples of `multiple`."""

    def __init__(self, multiple: int):
        super().__init__(multiple)
        self.multiple = multiple


def slice_rows(weight: Weight, start: int, stop: int) -> Weight:
    """Rows start .. stop of the matrix (of every matrix of a stack). Extras are left behind."""
    return _slice_weight(weight, ROWS, start, stop)


def slice_columns(weight: Weight, start: int, stop: int) -> Weight:
    """Columns (inputs) start .. stop of the matrix (of every matrix of a stack). Extras are left behind."""
    return _slice_weight(weight, COLUMNS, start, stop)


def _slice_weight(weight: Weight, axis: int, start: int, stop: int) -> Weight:
    size = weight.shape[axis - 2]
    what = f"{_AXIS_NAMES[axis]} {start}..{stop} of a weight {tuple(weight.shape)}"
    if not 0 <= start < stop <= size:
        raise NotRepresentable(f"{what}: choose a range inside 0..{size} that is not empty")
    if (start, stop) != (0, size):
        _check_activation(weight, axis, start, what)
    try:
        tree = slice_node(weight.tree, axis, start, stop)
    except _Misaligned as error:
        multiple = _workable(weight.tree, axis, error.multiple, size)
        cure = f"cut at multiples of {multiple}, or dequantize first" if multiple else "dequantize it first"
        raise NotRepresentable(
            f"{what} cannot be cut out: a block of the {type(weight.tree).__name__} spans the cut; {cure}"
        ) from None
    activation = weight.activation
    if activation is not None and activation.rows and axis == ROWS:
        activation = activation.of_rows(start, stop)
    return Weight(tree, weight.dtype, activation)


def _workable(tree: Node, axis: int, multiple: int, size: int) -> int | None:
    """The step at which every node of the tree can be cut, found by trying: several nodes may each want their own."""
    while multiple < size:
        try:
            slice_node(tree, axis, multiple, min(2 * multiple, size))
        except _Misaligned as error:
            multiple = math.lcm(multiple, error.multiple) if multiple % error.multiple else 2 * multiple
        except NotRepresentable:
            return None
        else:
            return multiple
    return None


def _check_activation(weight: Weight, axis: int, start: int, what: str) -> None:
    activation = weight.activation
    if activation is None or (activation.rows and axis == ROWS):
        return
    own = [name for name, tensor in zip(activation.names, activation.tensors, strict=True) if tensor.numel() > 1]
    if own and not activation.stacked:
        raise NotRepresentable(
            f"{what}: the input quantization {activation.rule!r} owns {own[0]!r}, which has no known way to be cut; keep the "
            "weight whole, or dequantize it first"
        )
    if axis == COLUMNS and activation.group_size and start % activation.group_size:
        raise NotRepresentable(f"{what}: inputs are quantized in groups; cut at multiples of {activation.group_size}")


def slice_node(node: Node, axis: int, start: int, stop: int) -> Node:
    """The part start .. stop of a node along `axis`; raises _Misaligned in units of that axis."""
    if (start, stop) == (0, node.shape[axis - 2]):
        return node
    return _SLICERS[type(node)](node, axis, start, stop)


def _cut(tensor: Tensor, axis: int, start: int, stop: int) -> Tensor:
    return tensor.narrow(axis - 2, start, stop - start)


def _values(node: nodes.Values, axis: int, start: int, stop: int) -> Node:
    return replace(node, tensor=_cut(node.tensor, axis, start, stop))


def _codes(node: nodes.Codes, axis: int, start: int, stop: int) -> Node:
    if axis == ROWS:
        return replace(node, packed=_cut(node.packed, ROWS, start, stop))
    if start * node.bits % 8 == 0 and stop * node.bits % 8 == 0:
        packed = node.packed[..., start * node.bits // 8 : stop * node.bits // 8]
        return replace(node, packed=packed, columns=stop - start)
    unsigned = replace(node, signed=False).integers(slice(0, node.shape[-2]), slice(start, stop))
    return nodes.Codes.of(unsigned, node.bits, node.signed)


def _parameter(node: Node | None, axis: int, start: int, stop: int, block: int) -> Node | None:
    """The part of a parameter that blocks of `block` rows or columns share."""
    if node is None or node.shape[axis - 2] == 1:
        return node
    first, last = start // block, -(-stop // block)
    if start % block and last - first > 1:
        raise _Misaligned(block)
    try:
        return slice_node(node, axis, first, last)
    except _Misaligned as error:
        raise _Misaligned(error.multiple * block) from None


def _grid(node: nodes.Grid, axis: int, start: int, stop: int) -> Node:
    codes = slice_node(node.codes, axis, start, stop)
    if axis == COLUMNS and node.group_index is not None:
        return replace(node, codes=codes, group_index=node.group_index[..., start:stop])
    parts: dict[str, Any] = {
        name: _parameter(getattr(node, name), axis, start, stop, node.block[axis])
        for name in ("scale", "zero", "offset")
    }
    return replace(node, codes=codes, **parts)


def _scaled(node: nodes.Scaled, axis: int, start: int, stop: int) -> Node:
    scale, offset = (_parameter(part, axis, start, stop, 1) for part in (node.scale, node.offset))
    return replace(node, child=slice_node(node.child, axis, start, stop), scale=scale, offset=offset)


def _divided(node: nodes.Divided, axis: int, start: int, stop: int) -> Node:
    return replace(node, child=slice_node(node.child, axis, start, stop))


def _codebook(node: nodes.Codebook, axis: int, start: int, stop: int) -> Node:
    size = node.vector[axis]
    if start % size or stop % size:
        raise _Misaligned(size)
    wide = node.count if axis == COLUMNS else 1
    codes = slice_node(node.codes, axis, start // size * wide, stop // size * wide)
    signs = slice_node(node.signs, axis, start, stop) if node.signs is not None else None
    return replace(node, codes=codes, signs=signs, scale=_parameter(node.scale, axis, start, stop, node.block[axis]))


def _needs_numbers(tensor: Tensor, node: Node) -> None:
    if tensor.device.type == "meta":
        raise NotRepresentable(
            f"where a {type(node).__name__} is cut depends on its index tensor, which holds no numbers on the meta device"
        )


def _sparse(node: nodes.Sparse, axis: int, start: int, stop: int) -> Node:
    _needs_numbers(node.row_offsets, node)
    if axis == ROWS:
        offsets = node.row_offsets[start : stop + 1]
        first, last = int(offsets[0]), int(offsets[-1])
        return nodes.Sparse(
            offsets - offsets[0], node.columns[first:last], _range(node.values, first, last), node.width
        )
    kept = torch.nonzero((node.columns >= start) & (node.columns < stop))[:, 0]
    offsets = torch.searchsorted(kept, node.row_offsets.to(kept.dtype)).to(node.row_offsets.dtype)
    return nodes.Sparse(offsets, node.columns[kept] - start, gather_columns(node.values, kept), stop - start)


def _range(values: Node, first: int, last: int) -> Node:
    """Columns of a [1, count] node; an empty range is legal."""
    if last > first:
        return slice_node(values, COLUMNS, first, last)
    return gather_columns(values, torch.empty(0, dtype=torch.int64))


def _masked(node: nodes.Masked, axis: int, start: int, stop: int) -> Node:
    _needs_numbers(node.row_offsets, node)
    mask = slice_node(node.mask, axis, start, stop)
    assert isinstance(mask, nodes.Codes)
    if axis == ROWS:
        offsets = node.row_offsets[start : stop + 1]
        return nodes.Masked(mask, _range(node.values, int(offsets[0]), int(offsets[-1])), offsets - offsets[0])
    ones = torch.nonzero(node.mask.integers())
    kept = torch.nonzero((ones[:, 1] >= start) & (ones[:, 1] < stop))[:, 0]
    counts = mask.integers().to(torch.int64).sum(1)
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(node.row_offsets.dtype)
    return nodes.Masked(mask, gather_columns(node.values, kept), offsets)


def _parts(node: Any, axis: int, start: int, stop: int) -> Node:
    if node.axis != axis - 2:
        return replace(node, parts=tuple(slice_node(part, axis, start, stop) for part in node.parts))
    found, begin = [], 0
    for part in node.parts:
        end = begin + part.shape[axis - 2]
        if begin < stop and end > start:
            try:
                found.append(slice_node(part, axis, max(start - begin, 0), min(stop, end) - begin))
            except _Misaligned as error:
                if begin % error.multiple == 0:
                    raise
                raise NotRepresentable(
                    f"{start}..{stop} cuts the part that begins at {begin}; cut at {begin} plus a multiple of {error.multiple}"
                ) from None
        begin = end
    return found[0] if len(found) == 1 else replace(node, parts=tuple(found))


def _each_part(node: Any, axis: int, start: int, stop: int) -> Node:
    return replace(node, parts=tuple(slice_node(part, axis, start, stop) for part in node.parts))


def _permute(node: nodes.Permute, axis: int, start: int, stop: int) -> Node:
    if axis == ROWS:
        return replace(node, child=slice_node(node.child, axis, start, stop))
    _needs_numbers(node.index, node)
    if node.index.dim() != 1:
        raise NotRepresentable(
            "columns of a stack with one column order per expert: cut each expert (weight.select) by itself"
        )
    kept = torch.nonzero((node.index >= start) & (node.index < stop))[:, 0]
    return nodes.Permute(gather_columns(node.child, kept), node.index[kept] - start)


def _transpose(node: nodes.Transpose, axis: int, start: int, stop: int) -> Node:
    return nodes.Transpose(slice_node(node.child, 1 - axis, start, stop))


def _rotate(node: nodes.Rotate, axis: int, start: int, stop: int) -> Node:
    mixed = COLUMNS if node.side == "input" else ROWS
    if axis == mixed and (start % node.size or stop % node.size):
        raise _Misaligned(node.size)
    return replace(node, child=slice_node(node.child, axis, start, stop))


def _view(node: nodes.View, axis: int, start: int, stop: int) -> Node:
    width = node.child.shape[-1]
    if axis == ROWS:
        first, last = start * node.columns, stop * node.columns
        if first // width == (last - 1) // width and node.child.shape[-2] == 1:  # all in one long row
            try:
                return replace(node, child=slice_node(node.child, COLUMNS, first, last), rows=stop - start)
            except _Misaligned as error:
                raise _Misaligned(math.lcm(error.multiple, node.columns) // node.columns) from None
        if first % width or last % width:
            raise _Misaligned(math.lcm(width, node.columns) // node.columns)
        try:
            return replace(node, child=slice_node(node.child, ROWS, first // width, last // width), rows=stop - start)
        except _Misaligned as error:
            raise _Misaligned(math.lcm(error.multiple * width, node.columns) // node.columns) from None
    if node.columns % width:
        raise NotRepresentable(
            f"columns of a weight whose groups run over its flattened form: a row of {node.columns} is not whole groups "
            f"of {width}; dequantize it first"
        )
    if start % width or stop % width:
        raise _Misaligned(width)
    # every row of the view owns columns / width rows of the child
    per_row = node.columns // width
    device = _device(node.child)
    index = torch.arange(node.rows, device=device)[:, None] * per_row + torch.arange(
        start // width, stop // width, device=device
    )
    return replace(node, child=gather_rows(node.child, index.reshape(-1)), columns=stop - start)


def _device(node: Node) -> torch.device:
    return nodes.tensors_of(node)[0].device


def _crop(node: nodes.Crop, axis: int, start: int, stop: int) -> Node:
    end = stop
    try:
        child = slice_node(node.child, axis, start, end)
    except _Misaligned as error:  # a stop inside a block: keep the whole block and crop
        end = min(-(-stop // error.multiple) * error.multiple, node.child.shape[axis - 2])
        if start % error.multiple:
            raise
        child = slice_node(node.child, axis, start, end)
    rows, columns = (stop - start, node.columns) if axis == ROWS else (node.rows, stop - start)
    whole = tuple(child.shape[-2:]) == (rows, columns)
    return child if whole else nodes.Crop(child, rows, columns)


def _opaque(node: nodes.Opaque, axis: int, start: int, stop: int) -> Node:
    raise NotRepresentable(f"a weight of kind {node.kind!r} can only be used whole; dequantize it to cut it")


_SLICERS: dict[type[Node], Callable[[Any, int, int, int], Node]] = {
    nodes.Values: _values,
    nodes.Codes: _codes,
    nodes.Grid: _grid,
    nodes.Codebook: _codebook,
    nodes.Sparse: _sparse,
    nodes.Masked: _masked,
    nodes.Columns: _parts,
    nodes.Rows: _parts,
    nodes.Stack: _each_part,
    nodes.Sum: _each_part,
    nodes.Permute: _permute,
    nodes.Transpose: _transpose,
    nodes.Scaled: _scaled,
    nodes.Divided: _divided,
    nodes.Rotate: _rotate,
    nodes.View: _view,
    nodes.Crop: _crop,
    nodes.Opaque: _opaque,
}
