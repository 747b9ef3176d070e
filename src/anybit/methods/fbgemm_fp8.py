"""FBGEMM FP8. E4M3 rows with a float scale; inputs are quantized per token, their scale bounded from above.

Stored: weight float8_e4m3fn [out, in], weight_scale float32 [out, 1], bias [out], input_scale_ub float32 [1] in older files.
Experts lie input first: gate_up_proj [experts, in, 2*inner] with gate_up_proj_scale [experts, 1, 2*inner], down_proj alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from anybit._lazy import LazyModule
from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.config import QuantizationConfigMixin
from anybit.quantizers.options import check_names, check_type
from anybit.quantizers.registry import register_quantization_config, register_quantizer

if TYPE_CHECKING:
    from anybit.methods import _fbgemm_layouts as layouts
    from anybit.quantizers import matching
    from anybit.weight import Layout, ModuleInfo
else:
    layouts = LazyModule("anybit.methods._fbgemm_layouts")
    matching = LazyModule("anybit.quantizers.matching")


@register_quantization_config("fbgemm_fp8")
@dataclass(eq=False, repr=False)
class FbgemmFp8Config(QuantizationConfigMixin):
    """`activation_scale_ub` bounds the largest input that is represented without clipping."""

    activation_scale_ub: float = 1200.0
    modules_to_not_convert: list[str] | None = None

    method: ClassVar[str] = "fbgemm_fp8"
    loading_attributes: ClassVar[tuple[str, ...]] = ("activation_scale_ub",)
    targets: ClassVar[tuple[str, ...]] = ("transformers", "vllm")
    schemes: ClassVar[Mapping[str, Mapping[str, Any]]] = {"fbgemm-fp8": {}}

    def post_init(self) -> None:
        check_type(self, "activation_scale_ub", float, int)
        check_names(self, "modules_to_not_convert")


@register_quantizer("fbgemm_fp8")
class FbgemmFp8HfQuantizer(HfQuantizer):
    """FBGEMM's layouts."""

    layouts_available = True
    default_algorithm = "minifloat"

    def layout_of(self, module: ModuleInfo, stored: Mapping[str, Any], peek: Callable[[str], Any]) -> Layout | None:
        return layouts.layout_of(module, stored, self.quantization_config.activation_scale_ub)

    def layout_for(self, module: ModuleInfo) -> Layout | None:
        pattern = matching.matching_pattern(module.name, self.modules_to_not_convert)
        reason = f"{pattern!r} is among the modules not to convert" if pattern is not None else None
        reason = reason or layouts.stays_dense(module)
        if reason is not None:
            self.skip_reasons.setdefault(module.name, reason)
        if not self.should_convert(module):
            return None
        return layouts.layout_for(module, self.quantization_config.activation_scale_ub)
