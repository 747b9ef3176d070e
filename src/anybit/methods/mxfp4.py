"""MXFP4. The experts of GPT-OSS: E2M1 codes with an E8M0 scale for each 32 inputs.

Stored, under the experts' own names: gate_up_proj_blocks uint8 [experts, 2*inner, in/32, 16] (low nibble first),
gate_up_proj_scales uint8 [experts, 2*inner, in/32], gate_up_proj_bias; down_proj_blocks, _scales, _bias alike. Rows of gate_up
alternate between gate and up. Byte b of a scale means 2^(b - 127).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from anybit._lazy import LazyModule
from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.config import QuantizationConfigMixin
from anybit.quantizers.options import check_flags, check_names
from anybit.quantizers.registry import register_quantization_config, register_quantizer

if TYPE_CHECKING:
    from anybit.methods import _headers as headers
    from anybit.methods import _mxfp4_layouts as layouts
    from anybit.quantizers import matching
    from anybit.weight import Layout, ModuleInfo
else:
    layouts = LazyModule("anybit.methods._mxfp4_layouts")
    headers = LazyModule("anybit.methods._headers")
    matching = LazyModule("anybit.quantizers.matching")


@register_quantization_config("mxfp4")
@dataclass(eq=False, repr=False)
class Mxfp4Config(QuantizationConfigMixin):
    """`modules_to_not_convert` can only leave out more: nothing but experts is in this format."""

    modules_to_not_convert: list[str] | None = None
    dequantize: bool = False

    method: ClassVar[str] = "mxfp4"
    loading_attributes: ClassVar[tuple[str, ...]] = ("dequantize",)
    targets: ClassVar[tuple[str, ...]] = ("transformers", "vllm")
    schemes: ClassVar[Mapping[str, Mapping[str, Any]]] = {"mxfp4": {}}

    def post_init(self) -> None:
        check_names(self, "modules_to_not_convert")
        check_flags(self, "dequantize")

    def own_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().own_dict().items() if name != "dequantize"}  # never in a file

    @classmethod
    def found_in(cls, folder: Path, model_config: Mapping[str, Any]) -> dict[str, Any] | None:
        found = super().found_in(folder, model_config)
        if found is None and model_config.get("model_type") == "gpt_oss":
            # transformers saves what it loaded on a CPU without a configuration, and dense numbers under the packed names
            found = {"quant_method": cls.method} if headers.headers_of(folder, "_proj_blocks") else None
        return found


@register_quantizer("mxfp4")
class Mxfp4HfQuantizer(HfQuantizer):
    """MXFP4's layout."""

    layouts_available = True
    default_algorithm = "minifloat"

    def layout_of(self, module: ModuleInfo, stored: Mapping[str, Any], peek: Callable[[str], Any]) -> Layout | None:
        layout = layouts.layout_of(module, stored)
        if isinstance(layout, layouts.DenseBlocksLayout):
            self.decide("dense numbers under the name of packed ones, as transformers saves them on a CPU", module.name)
        return layout

    def layout_for(self, module: ModuleInfo) -> Layout | None:
        if module.kind != "experts" or not module.class_name.startswith("GptOss"):
            self.skip_reasons[module.name] = "MXFP4 is the format of GPT-OSS' experts, and of nothing else"
            return None
        pattern = matching.matching_pattern(module.name.rpartition(".")[0], self.modules_to_not_convert)
        if pattern is not None:
            self.skip_reasons[module.name] = f"{pattern!r} is among the modules not to convert"
        elif module.shape[-1] % layouts.GROUP:
            self.skip_reasons[module.name] = f"{module.shape[-1]} inputs are no multiple of {layouts.GROUP}"
        return layouts.Mxfp4Layout(module.shape, module.dtype) if self.should_convert(module) else None
