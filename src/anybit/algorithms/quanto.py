"""quanto's optimizers: the largest magnitude of a row for 8 bits; for fewer the extremes of a group, or a half-quadratic shift.

    8 bits    scale = max|w| / top                    code = round(w / scale), unrounded for small floats
    fewer     scale = (max - min) / top, shift = -min code = round((w + shift) / scale)
    or        shift = mean(code * scale - (w - E)), E = shrink(w - R), while the mean error of the whole weight falls

All arithmetic happens in the dtype of the dense weight, so codes are quanto's. A group whose weights are all equal gets the
scale 0, as there, and codes of 0.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from anybit.algorithms._loops import integer_codes, row_largest, row_ranges
from anybit.errors import NotRepresentable
from anybit.weight import Codes, Grid, Values, Weight
from anybit.weight.weight import row_chunks

NORM, BETA, KAPPA, STEPS = 0.7, 10.0, 1.01, 20
FLOATS = {
    "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "e4m3fnuz": torch.float8_e4m3fnuz,
    "e5m2fnuz": torch.float8_e5m2fnuz,
}  # fmt: skip


def quantize(dense: Tensor, target: Weight, *, shift: str = "extremes") -> Weight:
    """Rows of 8-bit codes with a scale, or groups of fewer bits with a scale and a shift below zero.

    `shift`: of "extremes" or "half-quadratic" (quanto's MaxOptimizer and HqqOptimizer), for fewer than 8 bits.
    """
    grid = _checked(dense, target, shift)
    largest = row_largest(dense, dense.shape[1])
    if not bool(torch.isfinite(largest).all()):
        row = int(torch.nonzero(~torch.isfinite(largest))[0, 0])
        raise NotRepresentable(f"the weight is not finite in row {row}, which no code stands for; repair it")
    filled = _rows(dense, grid, largest) if grid.offset is None else _groups(dense, grid, shift)
    return Weight(filled, target.dtype, target.activation)


# --- 8 bits --------------------------------------------------------------------------------------------------------------


def _rows(dense: Tensor, grid: Grid, largest: Tensor) -> Grid:
    assert isinstance(grid.codes, Codes)
    assert isinstance(grid.scale, Values)
    if grid.levels is None:
        scales = largest.to(dense.dtype) / 127
        packed = integer_codes(dense, 8, (1, dense.shape[1]), (-128, 127), scales, arithmetic=dense.dtype)
        return replace(grid, codes=replace(grid.codes, packed=packed), scale=_stored(grid.scale, scales))
    kind = FLOATS[str(grid.levels)]
    top = torch.finfo(kind).max
    scales = largest.to(dense.dtype) / top
    packed = torch.empty(dense.shape, dtype=torch.uint8, device=dense.device)
    for start, stop in row_chunks(*dense.shape):
        numbers = _divided(dense[start:stop], scales[start:stop])
        packed[start:stop] = numbers.clamp(-top, top).to(kind).view(torch.uint8)
    return replace(grid, codes=replace(grid.codes, packed=packed), scale=_stored(grid.scale, scales))


# --- groups --------------------------------------------------------------------------------------------------------------


def _groups(dense: Tensor, grid: Grid, shift: str) -> Grid:
    codes, scale, offset = grid.codes, grid.scale, grid.offset
    assert isinstance(codes, Codes)
    assert isinstance(scale, Values)
    assert isinstance(offset, Values)
    groups = dense.reshape(scale.tensor.numel(), -1)
    top = (1 << codes.bits) - 1
    low, high = (part.view(-1, 1).to(dense.dtype) for part in row_ranges(groups.reshape(codes.shape), groups.shape[1]))
    scales, shifts = (high - low) / top, -low
    chunks = row_chunks(*groups.shape)
    if shift == "half-quadratic":
        shifts = _refined(groups, scales, shifts, top, chunks)
    across = groups.shape[1]
    packed = integer_codes(
        groups.reshape(codes.shape), codes.bits, (1, across), (0, top), scales.view(codes.shape[0], -1),
        arithmetic=dense.dtype, offset=-shifts.view(codes.shape[0], -1),
    )  # fmt: skip
    return replace(
        grid, codes=replace(codes, packed=packed), scale=_stored(scale, scales), offset=_stored(offset, shifts)
    )


def _codes(groups: Tensor, scales: Tensor, shifts: Tensor, top: int) -> Tensor:
    return torch.round(_divided(groups + shifts, scales)).clamp(0, top)


def _divided(numbers: Tensor, scales: Tensor) -> Tensor:
    """numbers / scales; 0 / 0 is 0, and anything else over 0 ends at the first or last code."""
    found = numbers / scales
    return torch.where(torch.isnan(found), 0, found)


def _refined(groups: Tensor, scales: Tensor, shifts: Tensor, top: int, chunks: list[tuple[int, int]]) -> Tensor:
    """The shifts after the last step that lowered the mean error."""
    beta, best = BETA, _mean_error(groups, scales, shifts, top, chunks)
    for _ in range(STEPS):
        found = torch.cat([
            _next_shift(groups[own], scales[own], shifts[own], top, beta)
            for own in (slice(*chunk) for chunk in chunks)
        ])  # fmt: skip
        error = _mean_error(groups, scales, found, top, chunks)
        if not error < best:
            return shifts
        shifts, best, beta = found, error, beta * KAPPA
    return shifts


def _next_shift(groups: Tensor, scales: Tensor, shifts: Tensor, top: int, beta: float) -> Tensor:
    codes = _codes(groups, scales, shifts, top)
    rest = groups - (scales * codes - shifts)
    size = rest.abs()
    shrunk = torch.sign(rest) * torch.relu(size - (1.0 / beta) * size.pow(NORM - 1))
    return torch.mean(codes * scales - (groups - shrunk), dim=-1, keepdim=True)


def _mean_error(groups: Tensor, scales: Tensor, shifts: Tensor, top: int, chunks: list[tuple[int, int]]) -> float:
    """Mean |w - R|: in the dtype's own arithmetic, as quanto takes it, unless the weight is too large for one piece."""
    total = 0.0
    for own in (slice(*chunk) for chunk in chunks):
        codes = _codes(groups[own], scales[own], shifts[own], top)
        size = (groups[own] - (scales[own] * codes - shifts[own])).abs()
        total += size.mean().item() if len(chunks) == 1 else size.sum(dtype=torch.float64).item()
    return total if len(chunks) == 1 else total / groups.numel()


# --- shared --------------------------------------------------------------------------------------------------------------


def _stored(node: Values, numbers: Tensor) -> Values:
    stored = numbers.to(node.tensor.dtype).reshape(node.tensor.shape)
    if not bool(torch.isfinite(stored).all()):
        raise NotRepresentable(f"a scale or shift is too large for {stored.dtype}; scale the weight down")
    return replace(node, tensor=stored)


def _checked(dense: Tensor, target: Weight, shift: str) -> Grid:
    """The target's grid, if it is one this algorithm can fill."""
    if shift not in ("extremes", "half-quadratic"):
        raise NotRepresentable(f"shift is {shift!r}; choose 'extremes' or 'half-quadratic'")
    if tuple(dense.shape) != tuple(target.shape) or dense.dim() != 2:
        raise NotRepresentable(
            f"a dense weight {tuple(dense.shape)} does not fill a target of shape {tuple(target.shape)}"
        )
    match target.tree:
        case Grid(codes=Codes(bits=8), scale=Values(tensor=scales), zero=None, offset=None) as grid if scales.shape == (
            len(dense),
            1,
        ):
            return grid
        case (
            Grid(codes=Codes(signed=False), scale=Values(), zero=None, offset=Values(negated=True), levels=None) as grid
        ):
            return grid
    raise NotRepresentable(
        "quanto's optimizers fill rows of 8-bit codes with a scale, or groups of fewer bits with a scale and a shift, not this "
        f"{type(target.tree).__name__}; choose another algorithm"
    )
