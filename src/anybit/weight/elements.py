"""A weight taken apart: the four numbers behind every element of a grid, whatever its blocks, orders and views.

Element by element a grid is (level - zero) * scale + offset. Here each of the four is evaluated by itself, through all nodes that
only move elements; rewriting.py puts them together again in another form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from anybit._lazy import torch
from anybit.errors import NotRepresentable
from anybit.weight import nodes
from anybit.weight.nodes import Node, map_nodes

if TYPE_CHECKING:
    from torch import Tensor

_MOVING = (nodes.View, nodes.Crop, nodes.Transpose, nodes.Permute, nodes.Rows, nodes.Columns)


@dataclass(frozen=True)
class Elements:
    """A grid, element by element, float32 [rows, columns] each: (level - zero) * scale + offset.

    `unit`: the scale of the scales, where they are codes themselves. `rounding`: relative error that the stored offsets may have
    from having been rounded.
    """

    level: Tensor
    zero: Tensor | None = None
    scale: Tensor | None = None
    offset: Tensor | None = None
    unit: Tensor | None = None
    rounding: float = 0.0

    def map(self, change: Callable[[Tensor], Tensor]) -> Elements:
        def each(part: Tensor | None) -> Tensor | None:
            return None if part is None else change(part)

        return Elements(
            change(self.level), each(self.zero), each(self.scale), each(self.offset), each(self.unit), self.rounding
        )


def take_apart(tree: Node) -> Elements:
    """The elements of a tree that is grids under moving nodes; NotRepresentable names the node that is neither."""
    if isinstance(tree, nodes.Scaled) and tree.offset is None and tree.scale is not None:
        inner = take_apart(tree.child)
        factor = nodes.Scaled(
            nodes.Values(torch.ones(1, 1, device=device_of(tree)).expand(tree.shape)), tree.scale
        ).dense()
        return replace(
            inner,
            scale=factor if inner.scale is None else inner.scale * factor,
            offset=None if inner.offset is None else inner.offset * factor,
            unit=None,
        )
    grids: list[nodes.Grid] = []
    _collect(tree, grids)

    def part(pick: Callable[[nodes.Grid], Node]) -> Tensor:
        return map_nodes(tree, lambda node: pick(node) if isinstance(node, nodes.Grid) else None).dense()

    def parameter(name: str, missing: float) -> Tensor | None:
        if all(getattr(grid, name) is None for grid in grids):
            return None

        def pick(grid: nodes.Grid) -> Node:
            ones = nodes.Values(torch.ones(1, 1, device=device_of(tree)).expand(grid.shape))
            if getattr(grid, name) is None:
                return nodes.Grid(ones, nodes.Values(torch.full((1, 1), missing, device=device_of(tree))))
            return nodes.Grid(ones, getattr(grid, name), block=grid.block, group_index=grid.group_index)

        return part(pick)

    def unit(grid: nodes.Grid) -> Node:
        assert isinstance(grid.scale, nodes.Grid)
        assert grid.scale.scale is not None
        return nodes.Values(grid.scale.scale.dense().expand(grid.shape))

    level = part(lambda grid: nodes.Grid(grid.codes, levels=grid.levels))
    nested = all(_has_one_unit(grid) for grid in grids)
    return Elements(
        level, parameter("zero", 0.0), parameter("scale", 1.0), parameter("offset", 0.0), part(unit) if nested else None,
        max(_rounding(grid.offset) for grid in grids),
    )  # fmt: skip


def _has_one_unit(grid: nodes.Grid) -> bool:
    scale = grid.scale
    return isinstance(scale, nodes.Grid) and scale.scale is not None and scale.scale.shape == (1, 1)


def _rounding(node: Node | None) -> float:
    """How far a stored number may be from the one that was meant, relative to it."""
    if isinstance(node, nodes.Values) and node.levels is None and node.tensor.dtype.is_floating_point:
        return torch.finfo(node.tensor.dtype).eps
    return torch.finfo(torch.float32).eps


def _collect(node: Node, grids: list[nodes.Grid]) -> None:
    if isinstance(node, nodes.Grid):
        grids.append(node)
        return
    if isinstance(node, nodes.Rotate):
        raise NotRepresentable(
            f"the weight is stored rotated, in blocks of {node.size} {node.side}s; its codes mean nothing to a format without "
            "that rotation"
        )
    if not isinstance(node, _MOVING):
        raise NotRepresentable(f"{described(node)}; another format has no place for such codes")
    for child in node.parts if isinstance(node, (nodes.Rows, nodes.Columns)) else (node.child,):
        _collect(child, grids)


def without_codes(node: Node) -> bool:
    """Whether a weight is stored as floating-point numbers, rotated or moved at most."""
    if isinstance(node, nodes.Values):
        return node.levels is None
    return isinstance(node, (*_MOVING, nodes.Rotate)) and hasattr(node, "child") and without_codes(node.child)


def described(node: Node) -> str:
    """What one code of a weight stands for, where it is not a number on a grid."""
    match node:
        case nodes.Codebook():
            return "a code stands for several weights at once, looked up in a table of vectors"
        case nodes.Sum():
            return "a weight is the sum of codes and of single outliers stored beside them, or of several codes"
        case nodes.Scaled():
            return "rows and columns are multiplied by factors of their own, beside the scales of the codes"
        case nodes.Permute():
            return "columns are stored in an order that was chosen for the weight"
        case nodes.Opaque():
            return (
                f"codes are read by the format's own rule ({node.kind})"
                if hasattr(node, "kind")
                else "codes have a rule of their own"
            )
        case nodes.Columns():
            return "some columns are stored with codes of their own"
        case nodes.Stack() | nodes.Rows():
            return "its parts are stored in forms of their own"
        case nodes.Values():
            return "the weight is stored as floating-point numbers, which are no codes"
    return f"the weight is stored as {type(node).__name__}"


def device_of(tree: Node) -> torch.device:
    return nodes.tensors_of(tree)[0].device
