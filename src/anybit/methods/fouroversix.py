"""Four Over Six. NVFP4 whose blocks of 16 use either 4 or 6 as their largest code, whichever is closer; also MXFP4 and IF4.

Stored, padded to out' x in': quantized_weight_values uint8 [out', in'/2] (low nibble first), quantized_weight_scale_factors flat
(swizzled for FP4), quantized_weight_amax float32, quantized_weight_metadata int64 [out, in, out', in', packed, swizzled], bias;
or weight alone with keep_master_weights. The scale rule is needed to decode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from anybit._lazy import LazyModule
from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.config import QuantizationConfigMixin
from anybit.quantizers.options import check_choice, check_flags, check_names, check_objects
from anybit.quantizers.registry import register_quantization_config, register_quantizer

if TYPE_CHECKING:
    from anybit.methods import _fouroversix_layouts as layouts
    from anybit.weight import Layout, ModuleInfo
else:
    layouts = LazyModule("anybit.methods._fouroversix_layouts")

DTYPES = ("nvfp4", "mxfp4", "if4", "nvint4", "nvfp6_e2m3", "nvfp6_e3m2")
SCALE_RULES = ("mse", "mae", "abs_max", "static_6", "static_4")


@register_quantization_config("fouroversix")
@dataclass(eq=False, repr=False)
class FourOverSixConfig(QuantizationConfigMixin):
    """`dtype` and `scale_rule` hold for weights, activations and gradients that have none of their own."""

    activation_dtype: str | None = None
    activation_scale_rule: str | None = None
    dtype: str = "nvfp4"
    gradient_dtype: str | None = None
    gradient_scale_rule: str | None = None
    keep_master_weights: bool = False
    matmul_backend: str | None = None
    output_dtype: str | None = "bfloat16"
    quantize_backend: str | None = None
    scale_rule: str = "mse"
    weight_dtype: str | None = None
    weight_scale_2d: bool = False
    weight_scale_rule: str | None = None
    module_config_overrides: dict[str, dict[str, Any]] | None = None
    modules_to_not_convert: list[str] | None = field(default_factory=lambda: ["lm_head"])

    method: ClassVar[str] = "fouroversix"
    schemes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "fouroversix": {},
        "fouroversix-static": {"scale_rule": "static_6"},
        "fouroversix-mxfp4": {"dtype": "mxfp4", "scale_rule": "static_6"},
        "fouroversix-if4": {"dtype": "if4"},
    }

    def post_init(self) -> None:
        check_choice(self, "dtype", DTYPES)
        check_choice(self, "scale_rule", SCALE_RULES)
        for part in ("activation", "gradient", "weight"):
            check_choice(self, f"{part}_dtype", (None, *DTYPES))
            check_choice(self, f"{part}_scale_rule", (None, *SCALE_RULES))
        check_flags(self, "keep_master_weights", "weight_scale_2d")
        check_objects(self, "module_config_overrides")
        check_names(self, "modules_to_not_convert")


@register_quantizer("fouroversix")
class FourOverSixHfQuantizer(HfQuantizer):
    """Layouts of Four Over Six. Names of modules are compared whole, as the package does; only plain linear layers count."""

    layouts_available = True

    def begin(self, model: Any, slots: Sequence[Any]) -> None:
        super().begin(model, slots)
        kept = set(self.modules_to_not_convert)
        self.skip_reasons = {
            slot.module: "it is among the modules not to convert" for slot in slots if slot.module in kept
        }

    def layout_of(self, module: ModuleInfo, stored: Mapping[str, Any], peek: Callable[[str], Any]) -> Layout | None:
        return layouts.layout_of(self.quantization_config, module, stored, peek)

    def layout_for(self, module: ModuleInfo) -> Layout | None:
        if module.kind != "linear" or module.class_name != "Linear":
            self.skip_reasons.setdefault(module.name, "Four Over Six quantizes linear layers only")
        if not self.should_convert(module):
            return None
        return layouts.layout_for(self.quantization_config, module)
