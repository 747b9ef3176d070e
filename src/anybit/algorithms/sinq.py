"""SINQ (arXiv 2509.22944): columns and rows of a tile are scaled towards equal spread, and the rest is rounded to nearest.

Every operation and dtype is that of sinq 0.2.0, so the codes are its codes. Its habits show: the weight goes through float16,
and one with heavy tails (kurtosis above 5) keeps its columns, multiplied back after they were divided.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from anybit.errors import NotRepresentable
from anybit.weight.weight import Weight, row_chunks

STEPS = 16
TAILS = 5.0  # of the fourth moment over the squared second
CHUNK = 1 << 21  # weights worked on at once


@dataclass(frozen=True)
class DualScaled:
    """((codes - zero) * scale) * columns. Of a weight [out, in] in tiles of `width` columns: codes uint8 [out, in], scale and
    zero [out, in / width], columns [tile rows, in]; all but the codes in the working dtype.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    columns: Tensor


def quantize(
    dense: Tensor,
    target: Weight,
    *,
    bits: int = 4,
    width: int = 64,
    square: bool = False,
    working: str = "float16",
    assemble: Callable[[DualScaled], Weight] | None = None,
) -> Weight:
    """`width`: columns of a tile, as many rows if it is `square`, else all. `assemble` puts the result into the format's tree."""
    if assemble is None or dense.dim() != 2 or dense.shape[1] % width or (square and dense.shape[0] % width):
        raise NotRepresentable(
            f"SINQ fills the trees of SINQ's layouts with matrices of whole tiles of {width}; a weight {tuple(dense.shape)} for "
            f"a {type(target.tree).__name__} is none. Choose another algorithm"
        )
    dtype: torch.dtype = getattr(torch, working)
    rows, columns = dense.shape
    balanced = not _has_tails(dense, dtype)
    high = width if square else rows
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=dense.device)
    scale = torch.empty(rows, columns // width, dtype=dtype, device=dense.device)
    zero, column_scale = torch.empty_like(scale), torch.empty(rows // high, columns, dtype=dtype, device=dense.device)
    at_once = max(CHUNK // (high * width), 1) * width
    for top in range(0, rows, high):
        for left in range(0, columns, at_once):
            right = min(left + at_once, columns)
            tiles = dense[top : top + high, left:right].to(dtype).to(torch.float32)
            tiles = tiles.unflatten(1, (-1, width)).transpose(0, 1).contiguous()
            found = _tiles(tiles, (1 << bits) - 1, balanced)
            groups = slice(left // width, right // width)
            codes[top : top + high, left:right] = found[0].transpose(0, 1).flatten(1)
            scale[top : top + high, groups] = found[1][..., 0].T.to(dtype)
            zero[top : top + high, groups] = found[2][..., 0].T.to(dtype)
            column_scale[top // high, left:right] = found[3].flatten().to(dtype)
    if not all(bool(torch.isfinite(part).all()) for part in (scale, zero, column_scale)):
        raise NotRepresentable(
            f"scales or zero points of the weight are beyond {working}: its numbers are not finite, or hardly differ along a "
            "row. Leave the module out"
        )
    return assemble(DualScaled(codes, scale, zero, column_scale))


def _has_tails(dense: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kurtosis (3 for a normal distribution) is above the limit."""

    def mean(power: int, middle: float) -> float:
        total = torch.zeros((), dtype=torch.float64, device=dense.device)
        for start, stop in row_chunks(*dense.shape):
            numbers = dense[start:stop].to(dtype).to(torch.float64) - middle
            total += numbers.pow_(power).sum()
        return float(total) / dense.numel()

    middle = mean(1, 0.0)
    second = max(mean(2, middle), 1e-6)
    return mean(4, middle) / second**2 > TAILS


def _tiles(tiles: Tensor, top: int, balanced: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """float32 tiles [tiles, rows, width] -> codes uint8, scale and zero [tiles, rows, 1], columns [tiles, 1, width]."""
    across, down = _factors(tiles)
    numbers = tiles / across / down
    if not balanced:
        numbers = numbers * across * down
        across, down = torch.ones_like(across), torch.ones_like(down)
    low, high = numbers.amin(2, keepdim=True), numbers.amax(2, keepdim=True)
    scale = (high - low).clamp(min=1e-4) / top
    zero = -torch.round(low / scale)
    codes = torch.clamp(torch.round(numbers / scale + zero), 0, top).to(torch.uint8)
    return codes, scale * down, zero, across


def _factors(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """What columns [tiles, 1, width] and rows [tiles, rows, 1] of every tile are divided by.

    Those of the step with the least imbalance: the largest standard deviation of a row or column over the smallest.
    """
    log_across = torch.zeros(len(tiles), 1, tiles.shape[2], device=tiles.device)
    log_down = torch.zeros(len(tiles), tiles.shape[1], 1, device=tiles.device)
    of_rows, of_columns = _spreads(tiles)
    least = torch.minimum(of_rows.clamp(1e-3, 1e3).amin((1, 2)), of_columns.clamp(1e-3, 1e3).amin((1, 2)))
    goal = (least + 1e-6)[:, None, None]
    best = _imbalance(of_rows, of_columns)
    across, down = log_across.exp(), log_down.exp()
    stopped = torch.zeros_like(best, dtype=torch.bool)
    for _ in range(STEPS):
        of_rows, of_columns = _spreads(tiles / log_across.exp() / log_down.exp())
        imbalance = _imbalance(of_rows, of_columns)
        better = imbalance <= best
        best = torch.minimum(best, imbalance)
        across = torch.where(better, log_across.exp(), across)
        down = torch.where(better, log_down.exp(), down)
        stopped |= imbalance > best
        step = (~stopped).to(torch.float32)
        for logs, spreads in ((log_across, of_columns), (log_down, of_rows)):
            change = (spreads.clamp(1e-3, 1e3) / goal).clamp(0.7, 2.0).log()
            logs.copy_((logs + change * step).clip(-0.3, 10.0))
    return across, down


def _spreads(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Standard deviations of rows [tiles, rows, 1] and columns [tiles, 1, width]."""
    return tiles.std(2, keepdim=True), tiles.std(1, keepdim=True)


def _imbalance(of_rows: Tensor, of_columns: Tensor) -> Tensor:
    largest = torch.maximum(of_rows.amax((1, 2)), of_columns.amax((1, 2)))
    smallest = torch.minimum(of_rows.amin((1, 2)), of_columns.amin((1, 2)))
    return (largest / smallest.clamp(min=1e-12))[:, None, None]


def eight_bits(numbers: Tensor, high: int) -> tuple[Tensor, Tensor, Tensor]:
    """Columns of `numbers` reshaped to [high, n] as codes: uint8 [high, n], a step [1, n] and a minimum [1, n], in its dtype."""
    matrix = numbers.reshape(high, -1)
    least = matrix.min(0, keepdim=True).values
    above = matrix - least
    step = above.max(0, keepdim=True).values / 255
    # a column of equal numbers has a step of 0
    return torch.round(above / step).nan_to_num_(0.0).clip_(0, 255).to(torch.uint8), step, least
