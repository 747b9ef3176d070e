"""Scales refitted to codes: nearest codes for a scale, the scale with the least squared error for these codes, and again.

Symmetric grids only, one scale for each run of columns. The half-quadratic solver of torchao ("hqq, scale only").
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from anybit.algorithms.rtn import code_range
from anybit.errors import NotRepresentable
from anybit.weight import Codes, Grid, Values, Weight, packing
from anybit.weight.weight import row_chunks

ROUNDS = 20
SMALL_CHANGE = 1e-5  # of all scales, relative: then it ends
SMALLEST = torch.finfo(torch.float32).eps


def quantize(dense: Tensor, target: Weight, *, dtype: str = "float32") -> Weight:
    """The target's grid with refitted scales; they are rounded to `dtype`, that of the weight, and then to their own."""
    grid = target.tree
    if (
        not isinstance(grid, Grid)
        or dense.dim() != 2
        or grid.levels is not None
        or grid.block[0] != 1
        or not isinstance(grid.codes, Codes)
        or not isinstance(grid.scale, Values)
        or not grid.codes.signed
    ):
        raise NotRepresentable("scales are refitted for a matrix of signed codes in groups of columns")
    rows, columns = dense.shape
    groups = grid.scale.shape[1]
    first, last = code_range(grid.codes)
    chunks = row_chunks(rows, columns)

    def blocks(start: int, stop: int) -> Tensor:
        return dense[start:stop].to(torch.float32).unflatten(1, (groups, -1))

    scale = torch.cat([blocks(*rows).abs().amax(2) for rows in chunks]) / max(-first, last)
    if not bool(torch.isfinite(scale).all()):
        raise NotRepresentable("the weight holds NaN or infinity, for which there is no scale; repair the checkpoint")
    scale = scale.clamp_(min=SMALLEST)
    for _ in range(ROUNDS):
        refitted = torch.cat([_refit(blocks(*rows), scale[slice(*rows)], first, last) for rows in chunks])
        change = ((refitted - scale).abs() / scale).max()
        scale = refitted
        if change < SMALL_CHANGE:
            break
    packed = torch.empty(rows, packing.row_bytes(columns, grid.codes.bits), dtype=torch.uint8, device=dense.device)
    for start, stop in chunks:
        codes = _nearest(blocks(start, stop), scale[start:stop], first, last)
        packed[start:stop] = packing.pack(codes.flatten(1).to(torch.int16), grid.codes.bits)
    stored = scale.to(getattr(torch, dtype)).to(grid.scale.tensor.dtype)
    parts: dict[str, Any] = {"scale": replace(grid.scale, tensor=stored)}
    if isinstance(grid.zero, Values):
        parts["zero"] = replace(grid.zero, tensor=torch.zeros_like(stored, dtype=grid.zero.tensor.dtype))
    return Weight(replace(grid, codes=replace(grid.codes, packed=packed), **parts), target.dtype, target.activation)


def _nearest(blocks: Tensor, scale: Tensor, first: int, last: int) -> Tensor:
    return (blocks / scale.unsqueeze(-1)).round_().clamp_(first, last)


def _refit(blocks: Tensor, scale: Tensor, first: int, last: int) -> Tensor:
    """The scale that fits the nearest codes best; the old one where all of them are zero."""
    codes = _nearest(blocks, scale, first, last)
    weights = (codes * codes).sum(2)
    fitted = (blocks * codes).sum(2) / torch.where(weights > 0, weights, 1)
    return torch.where(weights > 0, fitted, scale).clamp(min=SMALLEST)
