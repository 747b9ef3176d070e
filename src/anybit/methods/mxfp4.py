"""MXFP4. The experts of GPT-OSS: E2M1 codes with an E8M0 scale for each 32 inputs.

Stored, under the experts' own names: gate_up_proj_blocks uint8 [experts, 2*inner, in/32, 16] (low nibble first),
gate_up_proj_scales uint8 [experts, 2*inner, in/32], gate_up_proj_bias; down_proj_blocks, _scales, _bias alike. Rows of gate_up
alternate between gate and up. Byte b of a scale means 2^(b - 127).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.config import QuantizationConfigMixin
from anybit.quantizers.options import check_flags, check_names
from anybit.quantizers.registry import register_quantization_config, register_quantizer


@register_quantization_config("mxfp4")
@dataclass(eq=False, repr=False)
class Mxfp4Config(QuantizationConfigMixin):
    """`modules_to_not_convert` can only leave out more: nothing but experts is in this format."""

    modules_to_not_convert: list[str] | None = None
    dequantize: bool = False

    method: ClassVar[str] = "mxfp4"
    loading_attributes: ClassVar[tuple[str, ...]] = ("dequantize",)

    def post_init(self) -> None:
        check_names(self, "modules_to_not_convert")
        check_flags(self, "dequantize")

    def own_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().own_dict().items() if name != "dequantize"}  # never in a file


@register_quantizer("mxfp4")
class Mxfp4HfQuantizer(HfQuantizer):
    """MXFP4's layout."""
