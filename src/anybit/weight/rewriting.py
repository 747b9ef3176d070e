"""The same numbers in another form: a weight rewritten for the scheme of another layout, without choosing any code anew.

Both trees must be one grid under nodes that only move elements (views, transposes, orders, crops). Element by element the
source is (level - zero) * scale + offset; each of the four is carried to where the target's grid wants it. Where a block of the
target would need two different scales there is no such form. Whether the result has exactly the same values, or values
rounded by a narrower scale, is not argued but measured: compare the two dense weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from anybit._lazy import torch
from anybit.errors import NotRepresentable
from anybit.weight import levels as tables
from anybit.weight import nodes
from anybit.weight.joining import stack
from anybit.weight.nodes import Node, map_nodes
from anybit.weight.weight import Weight

if TYPE_CHECKING:
    from torch import Tensor

_MOVING = (nodes.View, nodes.Crop, nodes.Transpose, nodes.Permute, nodes.Rows, nodes.Columns)


@dataclass(frozen=True)
class Elements:
    """A grid, element by element, float32 [rows, columns] each: (level - zero) * scale + offset."""

    level: Tensor
    zero: Tensor | None
    scale: Tensor | None
    offset: Tensor | None

    def map(self, change: Callable[[Tensor], Tensor]) -> Elements:
        def each(part: Tensor | None) -> Tensor | None:
            return None if part is None else change(part)

        return Elements(change(self.level), each(self.zero), each(self.scale), each(self.offset))


def rewrite(weight: Weight, scheme: Weight) -> Weight:
    """`weight` in the structure of `scheme`, with codes kept. NotRepresentable says what does not fit.

    Scales are rounded where the scheme stores them in a narrower dtype, so compare `to_dense` of both.
    """
    if weight.shape != scheme.shape:
        raise NotRepresentable(f"a weight {weight.shape} cannot take the form of a weight {scheme.shape}")
    activation = scheme.activation
    if activation is not None and any(
        tensor.is_meta for tensor in activation.tensors
    ):  # scales of inputs come from the source
        if weight.activation is None or len(weight.activation.tensors) != len(activation.tensors):
            raise NotRepresentable("the target stores scales of its inputs, which the source does not have")
        activation = replace(activation, tensors=weight.activation.tensors)
    kept = Weight(weight.tree, scheme.dtype, activation)
    if kept.structure() == scheme.structure() and _leaves(kept) == _leaves(
        scheme
    ):  # any form: scales of scales, tables
        return kept
    if len(weight.shape) == 3:
        return stack([rewrite(weight.select(expert), scheme.select(expert)) for expert in range(weight.shape[0])])
    elements = take_apart(weight.tree)
    return Weight(_put_together(scheme.tree, elements), scheme.dtype, activation)


def _leaves(weight: Weight) -> list[tuple[torch.dtype, torch.Size]]:
    return [(tensor.dtype, tensor.shape) for tensor in nodes.tensors_of(weight.tree)]


# --- source ---------------------------------------------------------------------------------------------------------------


def take_apart(tree: Node) -> Elements:
    """The elements of a tree that is grids under moving nodes; NotRepresentable names the node that is neither."""
    if isinstance(tree, nodes.Scaled) and tree.offset is None and tree.scale is not None:
        inner = take_apart(tree.child)
        factor = nodes.Scaled(
            nodes.Values(torch.ones(1, 1, device=_device(tree)).expand(tree.shape)), tree.scale
        ).dense()
        return replace(
            inner,
            scale=factor if inner.scale is None else inner.scale * factor,
            offset=None if inner.offset is None else inner.offset * factor,
        )
    grids: list[nodes.Grid] = []
    _collect(tree, grids)

    def part(pick: Callable[[nodes.Grid], Node]) -> Tensor:
        return map_nodes(tree, lambda node: pick(node) if isinstance(node, nodes.Grid) else None).dense()

    def parameter(name: str, missing: float) -> Tensor | None:
        if all(getattr(grid, name) is None for grid in grids):
            return None

        def pick(grid: nodes.Grid) -> Node:
            ones = nodes.Values(torch.ones(1, 1, device=_device(tree)).expand(grid.shape))
            if getattr(grid, name) is None:
                return nodes.Grid(ones, nodes.Values(torch.full((1, 1), missing, device=_device(tree))))
            return nodes.Grid(ones, getattr(grid, name), block=grid.block, group_index=grid.group_index)

        return part(pick)

    level = part(lambda grid: nodes.Grid(grid.codes, levels=grid.levels))
    return Elements(level, parameter("zero", 0.0), parameter("scale", 1.0), parameter("offset", 0.0))


def _collect(node: Node, grids: list[nodes.Grid]) -> None:
    if isinstance(node, nodes.Grid):
        grids.append(node)
        return
    if not isinstance(node, _MOVING):
        raise NotRepresentable(f"a {type(node).__name__} has no codes that another format could keep")
    for child in node.parts if isinstance(node, (nodes.Rows, nodes.Columns)) else (node.child,):
        _collect(child, grids)


def _device(tree: Node) -> torch.device:
    return nodes.tensors_of(tree)[0].device


# --- target ---------------------------------------------------------------------------------------------------------------


def _put_together(node: Node, elements: Elements) -> Node:
    """The target's node holding the elements."""
    rows, columns = node.shape
    match node:
        case nodes.Grid():
            return _grid(node, elements)
        case nodes.View():
            high, wide = node.child.shape
            if high * wide != rows * columns:
                raise NotRepresentable(f"the target pads {rows * columns} weights to {high * wide}")
            return replace(node, child=_put_together(node.child, elements.map(lambda part: part.reshape(high, wide))))
        case nodes.Transpose():
            return replace(node, child=_put_together(node.child, elements.map(lambda part: part.T)))
    raise NotRepresentable(f"the target is a {type(node).__name__}, whose codes cannot be given")


def _grid(node: nodes.Grid, elements: Elements) -> Node:
    if node.group_index is not None:
        raise NotRepresentable("the target orders its groups by an index that conversion does not choose")
    scale, zero, offset = elements.scale, elements.zero, elements.offset
    level = elements.level
    if node.levels is None:
        level, zero, offset = _integers(node, level, zero, scale, offset)
        codes = _codes(node, level)
    else:
        level = level if zero is None else level - zero
        zero = None
        codes = _codes(node, _look_back(node.levels, level))
    parts: dict[str, Any] = {}
    for name, values, neutral in (("scale", scale, 1.0), ("zero", zero, 0.0), ("offset", offset, 0.0)):
        own = getattr(node, name)
        if own is None:
            if values is not None and bool((values != neutral).any()):
                raise NotRepresentable(f"the target has no {name}, the source has one")
            parts[name] = None
        else:
            full = values if values is not None else torch.full_like(level, neutral)
            parts[name] = _stored(own, _blocks(full, own.shape, node.block, name), name)
    return replace(node, codes=codes, **parts)


def _integers(
    node: nodes.Grid, level: Tensor, zero: Tensor | None, scale: Tensor | None, offset: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Integer levels moved into the target's range, with the zero or offset that undoes it."""
    codes = node.codes
    if not isinstance(codes, nodes.Codes):
        raise NotRepresentable(f"the target's codes are a {type(codes).__name__}")
    if offset is not None and node.offset is None:  # an offset of whole steps is a zero
        steps = offset / scale if scale is not None else offset
        zero = (zero if zero is not None else 0) - torch.round(steps)
        offset = None
    if bool((level != torch.round(level)).any()):
        raise NotRepresentable("the source's levels are no integers")
    lowest = -(1 << (codes.bits - 1)) if codes.signed else 0
    highest = lowest + (1 << codes.bits) - 1
    if node.zero is None:
        if zero is not None and node.offset is not None:
            offset = -zero * (scale if scale is not None else 1) + (offset if offset is not None else 0)
        elif zero is not None:
            level = level - zero
        if (
            float(level.min()) < lowest
        ):  # a symmetric source, codes that begin at 0, an offset that takes the difference
            if node.offset is None:
                raise NotRepresentable(f"codes down to {int(level.min())} do not fit the target's {lowest}..{highest}")
            shift = -float(1 << (codes.bits - 1))
            level = level - shift
            moved = shift * (scale if scale is not None else torch.ones_like(level))
            offset = moved if offset is None else offset + moved
        return level, None, offset
    zero = zero if zero is not None else torch.zeros_like(level)
    if float(level.min()) < lowest:
        level, zero = level + float(1 << (codes.bits - 1)), zero + float(1 << (codes.bits - 1))
    elif float(level.max()) > highest:
        level, zero = level - float(1 << (codes.bits - 1)), zero - float(1 << (codes.bits - 1))
    return level, zero, offset


def _codes(node: nodes.Grid, level: Tensor) -> Node:
    codes = node.codes
    if not isinstance(codes, nodes.Codes):
        raise NotRepresentable(f"the target's codes are a {type(codes).__name__}")
    lowest = -(1 << (codes.bits - 1)) if codes.signed else 0
    highest = lowest + (1 << codes.bits) - 1
    smallest, largest = int(level.min()), int(level.max())
    if smallest < lowest or largest > highest:
        raise NotRepresentable(f"codes {smallest}..{largest} do not fit the target's {lowest}..{highest}")
    return nodes.Codes.of(level.to(torch.int32), codes.bits, codes.signed)


def _look_back(levels: str | Tensor, values: Tensor) -> Tensor:
    """The code of each value in a table; NotRepresentable names a value the table lacks."""
    table = tables.table(levels, str(values.device)) if isinstance(levels, str) else levels.to(torch.float32)
    order = torch.argsort(table, stable=True)
    ordered = table[order]
    ordered = torch.where(torch.isnan(ordered), torch.full_like(ordered, float("inf")), ordered)
    place = torch.searchsorted(ordered, values.contiguous()).clamp(max=len(table) - 1)
    wrong = ordered[place] != values
    if bool(wrong.any()):
        raise NotRepresentable(f"the target's table has no value {float(values[wrong][0])}")
    codes = order[place]
    negative = (values == 0) & torch.signbit(values)  # -0 has a code of its own in float tables
    minus = torch.nonzero((table == 0) & torch.signbit(table))
    plus = torch.nonzero((table == 0) & ~torch.signbit(table))
    if len(minus) and len(plus):
        codes = torch.where(values == 0, torch.where(negative, minus[0, 0], plus[0, 0]), codes)
    return codes.to(torch.float32)


def _blocks(full: Tensor, shape: tuple[int, ...], block: tuple[int, int], name: str) -> Tensor:
    """One value per block, which must be the same in all of it."""
    for axis in (0, 1):
        size = full.shape[axis] if shape[axis] == 1 else block[axis]
        first = full.index_select(axis, torch.arange(0, full.shape[axis], size, device=full.device))
        again = first.repeat_interleave(size, dim=axis).narrow(axis, 0, full.shape[axis])
        if not torch.equal(again, full):
            raise NotRepresentable(f"a block of the target holds several values of {name}; its groups are too large")
        full = first
    return full


def _stored(node: Node, values: Tensor, name: str) -> Node:
    """Values as the target keeps them, rounded to its dtype."""
    match node:
        case nodes.Values(tensor=like, inverted=inverted, negated=negated, levels=None):
            numbers = -values if negated else values
            numbers = 1 / numbers if inverted else numbers
            kept = numbers.to(like.dtype)
            if not bool(torch.isfinite(kept.to(torch.float32)).all()):
                raise NotRepresentable(
                    f"a {name} of {float(values.abs().max()):.3g} is beyond the target's {like.dtype}"
                )
            return replace(node, tensor=kept.contiguous())
        case nodes.Values(levels=str() as table, tensor=like):
            codes = _look_back(table, -values if node.negated else values)
            return replace(node, tensor=codes.to(torch.uint8).view(like.dtype).contiguous())
        case nodes.Codes():
            whole = torch.round(values)
            if not torch.equal(whole, values):
                raise NotRepresentable(f"the target's {name} is an integer, the source's is not")
            return _codes(nodes.Grid(node), whole)
    raise NotRepresentable(
        f"the target keeps its {name} as a {type(node).__name__}, which would have to be chosen anew"
    )
