"""How Metal and MLX store one weight: a row is one little-endian stream of codes, groups of columns share scale and offset.

Stored: weight uint32 [.., out, in*bits/32]; scales [.., out, in/group]; offsets beside them, or none: then codes and scales
are small floats (E2M1 or E4M3 below E8M0 or E4M3, one byte each).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from anybit._lazy import torch
from anybit.algorithms import minifloat
from anybit.errors import CorruptFile
from anybit.methods._words import fitted, require_finite
from anybit.weight import packing
from anybit.weight.layout import Layout, meta
from anybit.weight.nodes import Codes, Grid, Values
from anybit.weight.weight import Weight

if TYPE_CHECKING:
    from torch import Tensor

# mode -> (levels of codes, levels of scales)
FLOATS = {"mxfp4": ("e2m1", "e8m0"), "mxfp8": ("e4m3", "e8m0"), "nvfp4": ("e2m1", "e4m3")}
NOT_A_NUMBER = {"e8m0": (255,), "e4m3": (0x7F, 0xFF)}


@dataclass(frozen=True)
class _PackedRows(Layout):
    """`bits` of a code, `group_size` columns that share a scale."""

    bits: int = 4
    group_size: int = 64

    @property
    def groups(self) -> int:
        return self.shape[-1] // self.group_size

    def _weight_spec(self) -> tuple[str, tuple[int, ...]]:
        *lead, columns = self.shape
        return "uint32", (*lead, columns * self.bits // 32)

    def _codes(self, words: Tensor) -> Codes:
        return Codes(packing.words_to_rows(words), self.bits, self.shape[-1])

    def _empty_codes(self) -> Codes:
        *lead, columns = self.shape
        return Codes(meta("uint8", *lead, columns * self.bits // 8), self.bits, columns)

    @staticmethod
    def _words(grid: Grid) -> Tensor:
        assert isinstance(grid.codes, Codes)
        return packing.rows_to_words(grid.codes.packed, torch.uint32)


@dataclass(frozen=True)
class MetalLayout(_PackedRows):
    """scale * code + offset. transformers calls the offsets qbiases and computes in float32; MLX calls them biases and
    rounds the product and the sum to the dtype of the scales."""

    scale_dtype: str = "float16"
    offsets: str = "qbiases"

    algorithm = "rtn"

    @property
    def _mlx(self) -> bool:
        return self.offsets == "biases"

    def algorithm_options(self) -> dict[str, object]:
        return {"ranges": partial(mlx_ranges if self._mlx else transformers_ranges, bits=self.bits)}

    def specs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        groups = (*self.shape[:-1], self.groups)
        return {
            "weight": self._weight_spec(),
            "scales": (self.scale_dtype, groups),
            self.offsets: (self.scale_dtype, groups),
        }

    def decode(self, tensors: Mapping[str, Tensor]) -> Weight:
        words, scales, offsets = (self.take(tensors, name, *spec) for name, spec in self.specs().items())
        return self._weight(
            self._codes(words),
            Values(require_finite("scales", scales)),
            Values(require_finite(self.offsets, offsets)),
        )

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        grid = fitted(weight, self)
        assert isinstance(grid.scale, Values)
        assert isinstance(grid.offset, Values)
        return {"weight": self._words(grid), "scales": grid.scale.tensor, self.offsets: grid.offset.tensor}

    def scheme(self) -> Weight:
        scale, offset = (Values(meta(self.scale_dtype, *self.shape[:-1], self.groups)) for _ in range(2))
        return self._weight(self._empty_codes(), scale, offset)

    def _weight(self, codes: Codes, scale: Values, offset: Values) -> Weight:
        compute = self.scale_dtype if self._mlx else "float32"
        return Weight(
            Grid(codes, scale, offset=offset, block=(1, self.group_size), compute=compute),
            self.dtype,
        )


def transformers_ranges(low: Tensor, high: Tensor, *, bits: int) -> dict[str, Tensor]:
    """All codes from the smallest to the largest weight of a group, float32."""
    scale = ((high - low) / ((1 << bits) - 1)).clamp(min=1e-8)
    return {"scale": scale, "offset": low}


def mlx_ranges(low: Tensor, high: Tensor, *, bits: int) -> dict[str, Tensor]:
    """The larger end of a group is met exactly and zero is a code, which makes the scale of most groups negative."""
    scale = ((high - low) / ((1 << bits) - 1)).clamp(min=1e-7)
    from_below = low.abs() > high.abs()
    scale = torch.where(from_below, scale, -scale)
    edge = torch.where(from_below, low, high)
    steps = torch.round(edge / scale)
    reached = steps != 0
    return {
        "scale": torch.where(reached, edge / torch.where(reached, steps, 1), scale),
        "offset": torch.where(reached, edge, 0),
    }


@dataclass(frozen=True)
class MlxFloatLayout(_PackedRows):
    """scale * value of a small float, MLX's modes mxfp4, mxfp8 and nvfp4. Both are exact in bfloat16."""

    mode: str = "mxfp4"

    algorithm = "minifloat"

    def algorithm_options(self) -> dict[str, object]:
        # as MLX does it on the CPU: E2M1 by the first of two equally near values, E4M3 by torch's rule
        rounding = {"ties": "zero", "zeros": "plain"} if self.bits == 4 else {}
        return {"rule": partial(float_scales, mode=self.mode, dtype=self.dtype), **rounding}

    def specs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {"weight": self._weight_spec(), "scales": ("uint8", (*self.shape[:-1], self.groups))}

    def decode(self, tensors: Mapping[str, Tensor]) -> Weight:
        words, scales = (self.take(tensors, name, *spec) for name, spec in self.specs().items())
        codes = self._codes(words)
        levels, scale_levels = FLOATS[self.mode]
        _require_numbers("scales", scales, scale_levels)
        if self.bits == 8:
            _require_numbers("weight", codes.packed, levels)
        return self._weight(codes, Values(scales, levels=scale_levels))

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        grid = fitted(weight, self)
        assert isinstance(grid.scale, Values)
        return {"weight": self._words(grid), "scales": grid.scale.tensor}

    def scheme(self) -> Weight:
        scale = Values(meta("uint8", *self.shape[:-1], self.groups), levels=FLOATS[self.mode][1])
        return self._weight(self._empty_codes(), scale)

    def _weight(self, codes: Codes, scale: Values) -> Weight:
        grid = Grid(codes, scale, levels=FLOATS[self.mode][0], block=(1, self.group_size))
        return Weight(grid, self.dtype)


def _require_numbers(name: str, found: Tensor, levels: str) -> None:
    """CorruptFile when bytes of a table stand for NaN."""
    for byte in NOT_A_NUMBER.get(levels, ()):
        if bool((found == byte).any()):
            place = torch.nonzero(found == byte)[0].tolist()
            raise CorruptFile(
                f"tensor {name!r} holds the byte {byte} at {place}, which is NaN in {levels}; a damaged file, get it again"
            )


def float_scales(largest: Tensor, *, mode: str, dtype: str) -> minifloat.Scales:
    """The largest magnitude of a group over that of the levels: a power of two rounded up, or the nearest E4M3.

    MLX divides in the weight's dtype.
    """
    levels, scale_levels = FLOATS[mode]
    wanted = (largest / minifloat.FORMATS[levels][2]).to(getattr(torch, dtype)).to(torch.float32)
    if scale_levels == "e4m3":
        return minifloat.Scales(minifloat.e4m3(wanted).to(torch.float32))
    wanted = torch.where(wanted > 0, wanted, 1.0)  # an empty group has the scale 1
    return minifloat.Scales(minifloat.e8m0_numbers(minifloat.e8m0(wanted, "ceil")))
