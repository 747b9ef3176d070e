"""AQLM. A run of inputs is the sum of one vector from each of several codebooks, times a scale of its output row.

Stored, out = out_group * rows, in = in_group * columns: codes int8 / int16 / int32 [rows, columns, codebooks] (unsigned numbers
in two's complement), codebooks [codebooks, 2**nbits, out_group, in_group], scales [rows, 1, 1, 1], bias [out].
W[o*out_group + a, i*in_group + b] = scales[o] * sum over k of codebooks[k, codes[o, i, k], a, b]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.config import QuantizationConfigMixin
from anybit.quantizers.options import check_names, check_positive, parameter_owners
from anybit.quantizers.registry import register_quantization_config, register_quantizer


@register_quantization_config("aqlm")
@dataclass(eq=False, repr=False)
class AqlmConfig(QuantizationConfigMixin):
    """Shape of the code vectors. `linear_weights_not_to_quantize` holds parameter names, ending in ".weight"."""

    in_group_size: int = 8
    out_group_size: int = 1
    num_codebooks: int = 1
    nbits_per_codebook: int = 16
    linear_weights_not_to_quantize: list[str] | None = None

    method: ClassVar[str] = "aqlm"

    def post_init(self) -> None:
        check_positive(self, "in_group_size", "out_group_size", "num_codebooks", "nbits_per_codebook")
        check_names(self, "linear_weights_not_to_quantize")
        if self.linear_weights_not_to_quantize is None:
            self.linear_weights_not_to_quantize = []


@register_quantizer("aqlm")
class AqlmHfQuantizer(HfQuantizer):
    """AQLM's layout."""

    requires_calibration = True

    def skipped_modules(self) -> Sequence[str] | None:
        return parameter_owners(self.quantization_config.linear_weights_not_to_quantize)
