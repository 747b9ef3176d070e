"""Other numbers on the grid that a weight already has: its scales, zero points, offsets and orders stay, codes are the nearest.

Where a weight changed little this loses less than a grid found anew: most codes stay, and what stays has no second rounding.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from anybit._lazy import torch
from anybit.errors import NotRepresentable
from anybit.weight import levels as tables
from anybit.weight import nodes
from anybit.weight.nodes import Node
from anybit.weight.weight import Weight

if TYPE_CHECKING:
    from torch import Tensor


def on_same_grid(weight: Weight, dense: Tensor) -> Weight:
    """`dense` float32 [rows, columns] with the weight's grid and codes of its own. NotRepresentable where there is no grid."""
    return replace(weight, tree=_filled(weight.tree, dense.to(torch.float32)))


def _filled(node: Node, values: Tensor) -> Node:
    match node:
        case nodes.Grid(codes=nodes.Codes()):
            return _grid(node, values)
        case nodes.View():
            high, wide = node.child.shape
            flat = node.child.dense().reshape(-1).clone()  # what pads the last group stays
            flat[: values.numel()] = values.reshape(-1)
            return replace(node, child=_filled(node.child, flat.view(high, wide)))
        case nodes.Crop():
            full = node.child.dense().clone()
            full[: values.shape[0], : values.shape[1]] = values
            return replace(node, child=_filled(node.child, full))
        case nodes.Transpose():
            return replace(node, child=_filled(node.child, values.T.contiguous()))
        case nodes.Permute() if node.index.dim() == 1:
            return replace(node, child=_filled(node.child, values.index_select(1, node.index.long())))
        case nodes.Scaled(scale=Node() as scale, offset=None):
            factor = nodes.Scaled(_ones(node.shape, values), scale).dense()
            return replace(node, child=_filled(node.child, torch.where(factor == 0, 0.0, values / factor)))
        case nodes.Rotate() if node.matrix is None or node.matrix.dim() == 2:
            inverse = torch.linalg.inv(node.factor(values.device).double()).float()
            if node.side == "input":
                turned = (values.reshape(len(values), -1, node.size) @ inverse).reshape(values.shape)
            else:
                turned = (inverse @ values.reshape(-1, node.size, values.shape[1])).reshape(values.shape)
            return replace(node, child=_filled(node.child, turned))
        case nodes.Rows() | nodes.Columns():
            axis = 0 if isinstance(node, nodes.Rows) else 1
            pieces = values.split([part.shape[axis] for part in node.parts], dim=axis)
            return replace(
                node, parts=tuple(_filled(part, piece) for part, piece in zip(node.parts, pieces, strict=True))
            )
    raise NotRepresentable(f"a {type(node).__name__} has no grid that other numbers could be put on")


def _ones(shape: tuple[int, ...], like: Tensor) -> Node:
    return nodes.Values(torch.ones(1, 1, device=like.device).expand(shape))


def _grid(node: nodes.Grid, values: Tensor) -> Node:
    codes = node.codes
    assert isinstance(codes, nodes.Codes)

    def parameter(name: str) -> Tensor | None:
        own = getattr(node, name)
        if own is None:
            return None
        return nodes.Grid(_ones(node.shape, values), own, block=node.block, group_index=node.group_index).dense()

    scale, zero, offset = (parameter(name) for name in ("scale", "zero", "offset"))
    level = values if offset is None else values - offset
    if scale is not None:
        level = torch.where(scale == 0, 0.0, level / scale)
    if zero is not None:
        level = level + zero
    if node.levels is None:
        lowest = -(1 << (codes.bits - 1)) if codes.signed else 0
        found = level.round().clamp(lowest, lowest + (1 << codes.bits) - 1)
    else:
        table = tables.table(node.levels, str(values.device)) if isinstance(node.levels, str) else node.levels.float()
        if table.dim() != 1:
            raise NotRepresentable("a table for each expert")
        found = _nearest(table, level)
    return replace(node, codes=nodes.Codes.of(found.to(torch.int32), codes.bits, codes.signed))


def _nearest(table: Tensor, level: Tensor) -> Tensor:
    """The code of the table's number that is nearest to each level."""
    ordered, order = torch.sort(torch.where(torch.isfinite(table), table, torch.inf), stable=True)
    count = int(torch.isfinite(ordered).sum())
    ordered, order = ordered[:count], order[:count]
    middles = (ordered[1:] + ordered[:-1]) / 2
    return order[torch.bucketize(level.contiguous(), middles)]
