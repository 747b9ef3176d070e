"""FBGEMM FP8. E4M3 rows with a float scale; inputs are quantized per token, their scale bounded from above.

Stored: weight float8_e4m3fn [out, in], weight_scale float32 [out, 1], bias [out], input_scale_ub float32 [1] in older files.
Experts lie input first: gate_up_proj [experts, in, 2*inner] with gate_up_proj_scale [experts, 1, 2*inner], down_proj alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.config import QuantizationConfigMixin
from anybit.quantizers.options import check_names, check_type
from anybit.quantizers.registry import register_quantization_config, register_quantizer


@register_quantization_config("fbgemm_fp8")
@dataclass(eq=False, repr=False)
class FbgemmFp8Config(QuantizationConfigMixin):
    """`activation_scale_ub` bounds the largest input that is represented without clipping."""

    activation_scale_ub: float = 1200.0
    modules_to_not_convert: list[str] | None = None

    method: ClassVar[str] = "fbgemm_fp8"
    loading_attributes: ClassVar[tuple[str, ...]] = ("activation_scale_ub",)

    def post_init(self) -> None:
        check_type(self, "activation_scale_ub", float, int)
        check_names(self, "modules_to_not_convert")


@register_quantizer("fbgemm_fp8")
class FbgemmFp8HfQuantizer(HfQuantizer):
    """FBGEMM's layouts."""
