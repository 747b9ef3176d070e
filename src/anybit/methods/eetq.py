"""EETQ. int8 rows, stored in the order a CUTLASS kernel reads them.

Stored: weight int8 [in, out] (permuted, interleaved bytes, each plus 128), weight_scales float16 [out], bias float16 [out].
W[o, i] = weight_scales[o] * code[o, i]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.config import QuantizationConfigMixin
from anybit.quantizers.options import check_choice, check_names
from anybit.quantizers.registry import register_quantization_config, register_quantizer


@register_quantization_config("eetq")
@dataclass(eq=False, repr=False)
class EetqConfig(QuantizationConfigMixin):
    """int8 weights only."""

    weights: str = "int8"
    modules_to_not_convert: list[str] | None = None

    method: ClassVar[str] = "eetq"

    def post_init(self) -> None:
        check_choice(self, "weights", ("int8",))
        check_names(self, "modules_to_not_convert")


@register_quantizer("eetq")
class EetqHfQuantizer(HfQuantizer):
    """EETQ's layout."""
