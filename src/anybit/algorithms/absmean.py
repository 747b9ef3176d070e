"""BitNet's rule (arXiv 2402.17764): a matrix is divided by the mean of its magnitudes and rounded to -1, 0 or 1."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from anybit.errors import NotRepresentable
from anybit.weight import packing
from anybit.weight.nodes import Codes, Grid, Values
from anybit.weight.weight import Weight, row_chunks

SMALLEST = 1e-5  # of a mean: a matrix of zeros needs a scale, too


def quantize(dense: Tensor, target: Weight) -> Weight:
    """Fills a `Grid` of ternary codes with one scale for each matrix, stored as it is or inverted."""
    grid = target.tree
    lead = tuple(dense.shape[:-2])
    match grid:
        case Grid(
            levels="ternary", codes=Codes(bits=2) as ternary, scale=Values(levels=None) as scale, zero=None, offset=None
        ):
            pass
        case _:
            raise NotRepresentable(f"absmean fills a Grid of ternary codes, not a {type(grid).__name__}")
    if tuple(dense.shape) != tuple(grid.shape) or tuple(scale.tensor.shape) != (*lead, 1, 1):
        raise NotRepresentable(
            f"absmean gives a matrix one scale; a weight {tuple(dense.shape)} does not fill {tuple(grid.shape)} with scales "
            f"{tuple(scale.tensor.shape)}"
        )
    matrices = dense if dense.dim() == 3 else dense[None]
    rows, columns = dense.shape[-2:]
    packed = torch.empty(len(matrices), rows, packing.row_bytes(columns, 2), dtype=torch.uint8, device=dense.device)
    means = torch.stack([_mean(matrix) for matrix in matrices])
    for matrix, mean, own in zip(matrices, means, packed):
        for start, stop in row_chunks(rows, columns):
            codes = (matrix[start:stop].to(torch.float32) / mean).round_().clamp_(-1, 1) + 1
            own[start:stop] = packing.pack(codes.to(torch.uint8), 2)
    stored = (1 / means if scale.inverted else means).to(scale.tensor.dtype)
    if not bool(torch.isfinite(stored).all()):
        raise NotRepresentable(
            f"a mean magnitude of {means.min().item():g} has no reciprocal in {stored.dtype}; store the scale as bfloat16"
        )
    return replace(
        target,
        tree=replace(
            grid,
            codes=replace(ternary, packed=packed.view(ternary.packed.shape)),
            scale=replace(scale, tensor=stored.view(scale.tensor.shape)),
        ),
    )


def _mean(matrix: Tensor) -> Tensor:
    """float32 mean magnitude, at least SMALLEST; summed in float64, a few rows at a time."""
    rows, columns = matrix.shape
    total = torch.zeros((), dtype=torch.float64, device=matrix.device)
    for start, stop in row_chunks(rows, columns):
        total += matrix[start:stop].to(torch.float32).abs().sum(dtype=torch.float64)
    if not bool(torch.isfinite(total)):
        raise NotRepresentable("the weight holds NaN or infinity, and has no mean; mend it, or leave the module out")
    return (total / max(rows * columns, 1)).to(torch.float32).clamp(min=SMALLEST)
