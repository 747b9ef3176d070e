"""AutoRound's optimized rounding for symmetric codes: of about 200 scales for each group, the one with the least squared error.

The group's largest magnitude, with its sign, starts on the lowest code (so half of the scales are negative); candidates move it
further out or in. All arithmetic happens in the dtype of the dense weight, in the order of auto-round 0.16, so codes are its own.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from anybit.algorithms.rtn import code_range
from anybit.errors import NotRepresentable
from anybit.weight import Codes, Grid, Values, Weight, packing
from anybit.weight.nodes import map_tensors, tensors_of

CHUNK = 1 << 17  # weights worked on at once: every candidate passes over them again, so they should stay in the cache
SMALLEST = 1e-5  # magnitude of a scale


def quantize(dense: Tensor, target: Weight, *, importance: Tensor | None = None) -> Weight:
    """Codes around the middle one of `target`'s grid. `importance` [in]: weights of the squared error."""
    grid = _checked(dense, target)
    if dense.dim() == 2:
        return Weight(_matrix(dense, grid, importance), target.dtype, target.activation)
    experts = [_matrix(part, grid.select(number), importance) for number, part in enumerate(dense)]  # type: ignore[arg-type]
    stacked = iter([torch.stack(own) for own in zip(*map(tensors_of, experts), strict=True)])
    return Weight(map_tensors(grid, lambda _: next(stacked)), target.dtype, target.activation)


def candidates(bits: int) -> list[float]:
    """Where the largest magnitude may lie beside -2**(bits - 1), in codes, in the order they are tried."""
    lowest = 1 << (bits - 1)
    if bits == 2:
        return [-(lowest - 0.01 * step) for step in range(-90, 91) if step]
    size = lowest * 0.75 / 200 * 2
    count = int(lowest * 0.75 / size)
    return [-(lowest - size * step) for step in range(-count, count + 1) if step]


def best_scales(groups: Tensor, bits: int, importance: Tensor | None = None) -> Tensor:
    """[n, size] -> the scale of each group, [n, 1], in its dtype."""
    first, last = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    largest = torch.take_along_dim(groups, groups.abs().argmax(-1, keepdim=True), -1)
    reciprocal = _reciprocal(largest)

    def tried(inverse: Tensor) -> tuple[Tensor, Tensor]:
        scales = _reciprocal(inverse)
        codes = torch.round(inverse * groups).clamp_(first, last)
        errors = (scales * codes - groups).to(torch.float32).square_()
        if importance is not None:
            errors.mul_(importance)
        return scales, errors.sum(-1, keepdim=True)

    best, least = tried(first * reciprocal)
    for place in candidates(bits):
        scales, error = tried(place * reciprocal)
        better = error < least
        best, least = torch.where(better, scales, best), torch.where(better, error, least)
    return torch.where(best < 0, best.clamp(max=-SMALLEST), best.clamp(min=SMALLEST))


def _reciprocal(numbers: Tensor) -> Tensor:
    """1 / x, and 0 for an x that is practically zero."""
    safe = numbers.abs() >= (1e-5 if numbers.dtype == torch.float16 else 1e-30)
    return torch.where(safe, 1.0 / torch.where(safe, numbers, 1.0), 0.0)


def _matrix(dense: Tensor, grid: Grid, importance: Tensor | None) -> Grid:
    rows, columns = dense.shape
    codes, scale = grid.codes, grid.scale
    assert isinstance(codes, Codes)
    assert isinstance(scale, Values)
    middle = 0 if codes.signed else 1 << (codes.bits - 1)
    size = min(grid.block[1], columns)
    missing = -columns % size
    packed = torch.empty(rows, packing.row_bytes(columns, codes.bits), dtype=torch.uint8, device=dense.device)
    stored = torch.empty(scale.tensor.shape, dtype=scale.tensor.dtype, device=dense.device)
    if importance is not None:
        importance = torch.nn.functional.pad(importance.to(torch.float32), (0, missing), value=SMALLEST)
    step = max(1, CHUNK // columns)
    for start in range(0, rows, step):
        part = dense[start : start + step]
        if not bool(torch.isfinite(part).all()):
            row, column = torch.nonzero(~torch.isfinite(part))[0].tolist()
            raise NotRepresentable(
                f"the weight holds {part[row, column].item()} at row {start + row}, column {column}, which no integer code "
                "stands for; repair the checkpoint"
            )
        groups = torch.nn.functional.pad(part, (0, missing)).reshape(-1, size)
        weights = None if importance is None else importance.view(-1, size).repeat(part.shape[0], 1)
        scales = best_scales(groups, codes.bits, weights)
        chosen = groups.div(scales).round_().clamp_(-(1 << (codes.bits - 1)), (1 << (codes.bits - 1)) - 1)
        integers = (chosen.to(torch.int16) + middle).view(part.shape[0], -1)[:, :columns]
        packed[start : start + step] = packing.pack(integers, codes.bits)
        stored[start : start + step] = scales.view(part.shape[0], -1).to(stored.dtype)
    if not bool(torch.isfinite(stored).all()):
        raise NotRepresentable(f"a scale is too large for {stored.dtype}; scale the weight down")
    filled = replace(grid, codes=replace(codes, packed=packed), scale=replace(scale, tensor=stored))
    if isinstance(grid.zero, Codes):
        zero = torch.full(grid.zero.shape, middle, dtype=torch.int32, device=dense.device)
        return replace(filled, zero=Codes.of(zero, grid.zero.bits))
    return filled


def _checked(dense: Tensor, target: Weight) -> Grid:
    """The target's grid, if it is one this algorithm can fill."""
    grid = target.tree
    if tuple(dense.shape) != tuple(target.shape):
        raise NotRepresentable(
            f"a dense weight {tuple(dense.shape)} does not fill a target of shape {tuple(target.shape)}"
        )
    match grid:
        case Grid(
            codes=Codes(signed=signed), scale=Values(inverted=False, negated=False, levels=None), zero=zero, offset=None,
            levels=None, group_index=None, block=(1, _),
        ) if signed == (zero is None) and (zero is None or _holds_the_middle(zero, grid.codes)):  # fmt: skip
            return grid
    raise NotRepresentable(
        "the search for scales fills a grid of integer codes in groups of columns around the middle code, not this "
        f"{type(grid).__name__}; choose another algorithm"
    )


def _holds_the_middle(zero: object, codes: object) -> bool:
    assert isinstance(codes, Codes)
    middle = -code_range(replace(codes, signed=True))[0]
    return isinstance(zero, Codes) and code_range(zero)[1] >= middle
