"""Picking any rows or columns of a node, as a tree of its own. Exact: codes are repacked, parameters follow their group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from anybit._lazy import torch
from anybit.errors import NotRepresentable
from anybit.weight import nodes
from anybit.weight.nodes import Node

if TYPE_CHECKING:
    from torch import Tensor


def gather_columns(node: Node, index: Tensor) -> Node:
    """Columns `index` int64 of a node, in that order. Blocks of columns become a group index."""
    match node:
        case nodes.Values():
            return replace(node, tensor=node.tensor.index_select(-1, index.to(node.tensor.device)))
        case nodes.Codes():
            unsigned = replace(node, signed=False).integers().index_select(-1, index.to(node.packed.device))
            return nodes.Codes.of(unsigned, node.bits, node.signed)
        case nodes.Grid():
            return _grid_columns(node, index)
        case nodes.Scaled():
            return replace(
                node,
                child=gather_columns(node.child, index),
                scale=_parameter(node.scale, index, gather_columns, -1),
                offset=_parameter(node.offset, index, gather_columns, -1),
            )
        case nodes.Divided():
            return replace(node, child=gather_columns(node.child, index))
        case nodes.Sum() | nodes.Rows():
            return replace(node, parts=tuple(gather_columns(part, index) for part in node.parts))
        case nodes.Transpose():
            return nodes.Transpose(gather_rows(node.child, index))
    raise NotRepresentable(
        f"columns of a {type(node).__name__} can only be taken in runs; dequantize it to pick single ones"
    )


def _grid_columns(node: nodes.Grid, index: Tensor) -> Node:
    codes = gather_columns(node.codes, index)
    parameters = [part for part in (node.scale, node.zero, node.offset) if part is not None]
    if all(part.shape[-1] == 1 for part in parameters):
        return replace(node, codes=codes, group_index=None)
    if node.group_index is not None:
        return replace(
            node, codes=codes, group_index=node.group_index.index_select(-1, index.to(node.group_index.device))
        )
    groups = (index // node.block[1]).to(torch.int32)
    return replace(node, codes=codes, group_index=groups, block=(node.block[0], 1))


def gather_rows(node: Node, index: Tensor) -> Node:
    """Rows `index` int64 of a node, in that order."""
    match node:
        case nodes.Values():
            return replace(node, tensor=node.tensor.index_select(-2, index.to(node.tensor.device)))
        case nodes.Codes():
            return replace(node, packed=node.packed.index_select(-2, index.to(node.packed.device)))
        case nodes.Grid(block=(high, _)):
            parameters = (node.scale, node.zero, node.offset)
            if high > 1 and any(part is not None and part.shape[-2] > 1 for part in parameters):
                raise NotRepresentable(
                    f"single rows of a grid whose blocks are {high} rows high; dequantize it to pick them"
                )
            scale, zero, offset = (_parameter(part, index, gather_rows, -2) for part in parameters)
            return replace(node, codes=gather_rows(node.codes, index), scale=scale, zero=zero, offset=offset)
        case nodes.Scaled():
            scale, offset = (_parameter(part, index, gather_rows, -2) for part in (node.scale, node.offset))
            return replace(node, child=gather_rows(node.child, index), scale=scale, offset=offset)
        case nodes.Divided():
            return replace(node, child=gather_rows(node.child, index))
        case nodes.Sum() | nodes.Columns():
            return replace(node, parts=tuple(gather_rows(part, index) for part in node.parts))
        case nodes.Permute():
            return replace(node, child=gather_rows(node.child, index))
        case nodes.Transpose():
            return nodes.Transpose(gather_columns(node.child, index))
        case nodes.Crop() if node.rows == node.child.shape[-2]:
            return nodes.Crop(gather_rows(node.child, index), len(index), node.columns)
    raise NotRepresentable(
        f"rows of a {type(node).__name__} can only be taken in runs; dequantize it to pick single ones"
    )


def _parameter(node: Node | None, index: Tensor, gather: Callable[[Node, Tensor], Node], axis: int) -> Node | None:
    if node is None or node.shape[axis] == 1:
        return node
    return gather(node, index)
