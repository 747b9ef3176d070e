"""How torchao finds scales and zero points from the extremes of a block. Each is a rule for an algorithm.

`dtype` is that of the weight: its extremes are divided in it, and so rounded, before anything else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from anybit._lazy import torch
from anybit.algorithms import minifloat
from anybit.methods._torchao_inputs import SMALLEST_INT8, affine

if TYPE_CHECKING:
    from torch import Tensor


def wider(left: str, right: str) -> str:
    """The dtype of a product of these two."""
    return str(torch.promote_types(getattr(torch, left), getattr(torch, right))).removeprefix("torch.")


def _zero_included(low: Tensor, high: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    own = getattr(torch, dtype)
    return low.to(own).clamp(max=0), high.to(own).clamp(min=0)


def int8(low: Tensor, high: Tensor, *, dtype: str, limits: tuple[int, int]) -> dict[str, Tensor]:
    """Symmetric over all codes: half of them is no whole number, 127.5. The scale is kept in float32."""
    scale, zero = affine(*_zero_included(low, high, dtype), *limits, True, SMALLEST_INT8)
    return {"scale": scale.to(torch.float32), "zero": zero.to(torch.float32)}


def intx(low: Tensor, high: Tensor, *, dtype: str, scale_dtype: str, bits: int, mapping: str) -> dict[str, Tensor]:
    """All codes of so many bits. SYMMETRIC_NO_CLIPPING_ERR takes the end that needs the larger scale."""
    first, last = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    smallest = torch.finfo(getattr(torch, dtype)).smallest_normal
    low, high = _zero_included(low, high, dtype)
    if mapping == "SYMMETRIC_NO_CLIPPING_ERR":
        below, above = low / first, high / last if last else torch.full_like(high, torch.inf)
        scale = torch.where(below > above, below, above).clamp(min=smallest)
        zero = torch.full_like(scale, int((last + first + 1) / 2))
    else:
        scale, zero = affine(low, high, first, last, mapping == "SYMMETRIC", smallest)
    # in its own dtype: torchao rounds the reciprocal to it, too, before it meets the weight
    return {"scale": scale.to(getattr(torch, scale_dtype)), "zero": zero.to(getattr(torch, wider(dtype, scale_dtype)))}


def int4(low: Tensor, high: Tensor) -> dict[str, Tensor]:
    """15 steps from the smallest to the largest weight; the stored zero point is the value of the code 0."""
    scale = (high - low).clamp(min=1e-6) / 15
    return {"scale": scale, "zero": torch.full_like(scale, -8), "origin": low, "offset": low + 8 * scale}


def int4_symmetric(low: Tensor, high: Tensor) -> dict[str, Tensor]:
    """The largest magnitude on the last code; zero points are zero."""
    scale = torch.maximum(-low, high).clamp(min=1e-6) / 8
    return {"scale": scale, "zero": torch.zeros_like(scale), "offset": torch.zeros_like(scale)}


def tinygemm(low: Tensor, high: Tensor) -> dict[str, Tensor]:
    """As `int4` with every operation rounded to bfloat16; codes are chosen from the zero point, not from the extreme."""
    scale = ((high - low) / 15).clamp(min=torch.finfo(low.dtype).smallest_normal)
    offset = low + scale * 8
    return {"scale": scale, "zero": torch.full_like(scale, -8), "origin": offset - scale * 8, "offset": offset}


def float8(largest: Tensor, *, dtype: str, levels: str) -> minifloat.Scales:
    """The largest magnitude over that of the levels, divided in the weight's dtype."""
    own = getattr(torch, dtype)
    return minifloat.Scales((largest.to(own) / minifloat.FORMATS[levels][2]).to(torch.float32))
