"""Outliers beside a grid (SpQR) as programs: a CSR matrix whose product is added. Shared by the CPU and the GPU kernels.

Where the format rounds the sum of both, what is added is what rounding leaves of the outlier there: the number that the sum
becomes less the grid's own. So the products of the parts add up to the product of the rounded sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from anybit.kernels._grids import Refused, Slot, Workspace
from anybit.weight import nodes

# float32 pieces of the grid beside the outliers: (first row, [rows, columns])
Pieces = Callable[[], Iterable[tuple[int, Tensor]]]


def sparse_program(tree: nodes.Sparse, space: Workspace) -> dict[str, Any]:
    """The program of a CSR matrix: its numbers in float32."""
    values = tree.values.dense() if not space.meta else torch.empty(tree.values.shape, device="meta")
    return _program(tree, values.reshape(-1), space)


def rounded_program(tree: nodes.Sparse, pieces: Pieces, compute: str, space: Workspace) -> dict[str, Any]:
    """The program of what a CSR matrix adds to a grid where their sum is rounded to `compute`."""
    if space.meta:
        return sparse_program(tree, space)
    values, dtype, device = tree.values.dense().reshape(-1), getattr(torch, compute), tree.columns.device
    left = torch.zeros_like(values)
    offsets = tree.row_offsets.long()
    for first, tile in pieces():
        own = offsets[first : first + len(tile) + 1]
        start, stop = int(own[0]), int(own[-1])
        rows = torch.repeat_interleave(torch.arange(len(tile), device=device), own.diff())
        place, inverse = torch.unique(rows * tree.width + tree.columns[start:stop].long(), return_inverse=True)
        outlier = torch.zeros(len(place), device=device).index_add_(0, inverse, values[start:stop])
        plain = tile.reshape(-1)[place]
        found = (plain + outlier).to(dtype).to(torch.float32) - plain
        # outliers at the same place are one number: the last of them carries it
        last = torch.zeros(len(place), dtype=torch.int64, device=device)
        last.index_put_((inverse,), torch.arange(stop - start, device=device))
        left[start:stop][last] = found
    return _program(tree, left, space)


def _program(tree: nodes.Sparse, values: Tensor, space: Workspace) -> dict[str, Any]:
    if tree.row_offsets.dim() != 1:
        raise Refused("a stack of sparse experts; a matrix of that kind is accepted")
    rows = tree.row_offsets.shape[-1] - 1
    if not space.meta:
        steps, stored = tree.row_offsets.diff(), tree.columns.numel()
        ends = (int(tree.row_offsets[0]), int(tree.row_offsets[-1]))
        if ends != (0, stored) or bool((steps < 0).any()) or len(values) != stored:
            raise ValueError(f"row offsets from {ends[0]} to {ends[1]} for {stored} outliers of {len(values)} values")
        if stored and not 0 <= int(tree.columns.min()) <= int(tree.columns.max()) < tree.width:
            raise ValueError(f"outliers outside {tree.width} columns")
    places = [_whole_numbers(tensor, space) for tensor in (tree.row_offsets, tree.columns)]
    return {"sparse": {"rows": rows, "columns": tree.width, "offsets": places[0], "places": places[1],
                       "values": space.add(values.to(torch.float32))}}  # fmt: skip


def _whole_numbers(tensor: Tensor, space: Workspace) -> Slot:
    return space.own_slot(tensor, False) if tensor.dtype == torch.int32 else space.add(tensor.to(torch.int32))
