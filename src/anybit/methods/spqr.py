"""SpQR. 3-bit groups whose scales and zero points are 3-bit groups again, plus single outliers that are added.

Stored: dense_weights int64 (one word for each row of a 16 x 16 tile: codes of weight, scale and zero, and a piece of the tile's
four halves), row_offsets int32, col_vals int32 (column, float16 value), in_perm int32 (two input numbers in a word).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.config import QuantizationConfigMixin
from anybit.quantizers.options import check_choice, check_names, check_type, parameter_owners
from anybit.quantizers.registry import register_quantization_config, register_quantizer


@register_quantization_config("spqr")
@dataclass(eq=False, repr=False)
class SpQRConfig(QuantizationConfigMixin):
    """`shapes` holds the length of each stored tensor; `modules_to_not_convert` holds parameter names."""

    bits: int = 3
    beta1: int = 16
    beta2: int = 16
    shapes: dict[str, int] | None = None
    modules_to_not_convert: list[str] | None = None

    method: ClassVar[str] = "spqr"

    def post_init(self) -> None:
        for name in ("bits", "beta1", "beta2"):
            check_type(self, name, int)
        for name, only in (("bits", 3), ("beta1", 16), ("beta2", 16)):
            check_choice(self, name, (only,))
        self.shapes = {} if self.shapes is None else self.shapes
        check_type(self, "shapes", dict)
        check_names(self, "modules_to_not_convert")


@register_quantizer("spqr")
class SpQRHfQuantizer(HfQuantizer):
    """SpQR's layout."""

    requires_calibration = True

    def skipped_modules(self) -> Sequence[str] | None:
        return parameter_owners(self.quantization_config.modules_to_not_convert)
