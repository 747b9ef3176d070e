"""Fine-grained FP8. E4M3 codes with a scale for each block of rows and columns, or for the whole matrix.

Stored: weight float8_e4m3fn [out, in], weight_scale_inv (also named scale or qscale_weight) float32, float8_e8m0fnu or E8M0 bytes
[ceil(out/rows), ceil(in/columns)] or a scalar, activation_scale float32 for static inputs, bias [out]. In spite of its name
weight_scale_inv is multiplied. Experts with expert_dtype "fp4": int8 [out, in/2], low nibble first, and scales [out, in/32].
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from anybit._lazy import LazyModule
from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.config import QuantizationConfigMixin, method_of
from anybit.quantizers.options import check_choice, check_flags, check_names, check_type, refuse
from anybit.quantizers.registry import register_quantization_config, register_quantizer

if TYPE_CHECKING:
    from anybit.methods import _cache_scales as cache_scales
    from anybit.methods import _fp8_layouts as layouts
    from anybit.methods import _fp8_lost_config as lost_config
    from anybit.quantizers import matching
    from anybit.weight import Layout, ModuleInfo
else:
    cache_scales = LazyModule("anybit.methods._cache_scales")
    layouts = LazyModule("anybit.methods._fp8_layouts")
    lost_config = LazyModule("anybit.methods._fp8_lost_config")
    matching = LazyModule("anybit.quantizers.matching")

# what a file of these methods means when it says nothing
FILE_DEFAULTS: Mapping[str, Mapping[str, Any]] = {"mxfp8": {"weight_block_size": [1, 32], "scale_fmt": "ue8m0"}}


@register_quantization_config("fp8")
@dataclass(eq=False, repr=False)
class FineGrainedFP8Config(QuantizationConfigMixin):
    """`weight_block_size` is (rows, columns), None for one scale per matrix. Also the configuration of "mxfp8"."""

    activation_scheme: str = "dynamic"
    weight_block_size: tuple[int, int] | list[int] | None = (128, 128)
    dequantize: bool = False
    modules_to_not_convert: list[str] | None = None
    modules_to_convert: list[str] | None = None
    scale_fmt: str = "float"
    expert_dtype: str = "fp8"
    ignored_layers: list[str] | None = None  # MiniMax's name of modules_to_not_convert
    quant_method: str = "fp8"

    method: ClassVar[str] = "fp8"
    loading_attributes: ClassVar[tuple[str, ...]] = ("dequantize", "modules_to_not_convert")
    targets: ClassVar[tuple[str, ...]] = ("transformers", "vllm")
    schemes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "fp8": {},
        "fp8-ue8m0": {"scale_fmt": "ue8m0"},
        "fp8-tensor": {"weight_block_size": None},
        "mxfp8": {"quant_method": "mxfp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"},
    }

    def __post_init__(self) -> None:
        ignored, method = self.__dict__.pop("ignored_layers", None), self.quant_method
        if self.modules_to_not_convert is None:
            self.modules_to_not_convert = ignored
        super().__post_init__()
        self.quant_method = method_of(method)

    def post_init(self) -> None:
        check_type(self, "activation_scheme", str)
        self.activation_scheme = self.activation_scheme.lower()
        check_choice(self, "activation_scheme", ("dynamic", "static"))
        check_type(self, "weight_block_size", tuple, list, None)
        block = self.weight_block_size
        if block is not None and (len(block) != 2 or not all(type(size) is int and size > 0 for size in block)):
            raise refuse(self, "weight_block_size", "it must be two positive whole numbers, rows and columns, or null")
        check_choice(self, "scale_fmt", ("float", "ue8m0"))
        check_choice(self, "expert_dtype", ("fp8", "fp4"))
        check_flags(self, "dequantize")
        check_names(self, "modules_to_not_convert")
        check_names(self, "modules_to_convert")

    @classmethod
    def found_in(cls, folder: Path, model_config: Mapping[str, Any]) -> dict[str, Any] | None:
        return super().found_in(folder, model_config) or lost_config.without_config(folder)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        found = super().from_dict(config_dict, return_unused_kwargs, **kwargs)
        config = found[0] if return_unused_kwargs else found
        if "ignored_layers" in config_dict:  # written back under the name the file has
            config.extra_fields["ignored_layers"] = copy.deepcopy(config_dict["ignored_layers"])
        return found

    @classmethod
    def modernize(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        return {**FILE_DEFAULTS.get(str(config_dict.get("quant_method")), {}), **config_dict}

    @classmethod
    def in_context(cls, config_dict: dict[str, Any], model_config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        outside = model_config.get("expert_dtype")  # DeepSeek-V4 keeps it beside quantization_config
        return {"expert_dtype": outside, **config_dict} if outside is not None else config_dict


# --- quantizer -----------------------------------------------------------------------------------------------------------


@register_quantizer("fp8")
class FineGrainedFP8HfQuantizer(HfQuantizer):
    """Layouts of fine-grained FP8 and of MXFP8. The tensors decide which; the plan says where the configuration differs."""

    layouts_available = True
    default_algorithm = "minifloat"

    def attach(self, model: Any, checkpoint: Any, path_of: Callable[[str], str | None]) -> None:
        self.decisions = {}
        if not self.pre_quantized:
            return
        # transformers knows no quantized cache for this method; files of other engines have scales for one
        extra = self.quantization_config.extra_fields
        algo = cache_scales.cache_algo(extra.get("kv_cache_quant_algo"), extra.get("kv_cache_scheme"))
        known = algo in cache_scales.KINDS
        found = cache_scales.attach_cache(model, checkpoint, path_of, algo if known else None)
        self.attached = found.keys
        for attention in found.scaled if not known else ():
            self.decide(
                f"scales of keys and values are kept and not used: the configuration's cache is {algo}", attention
            )

    def begin(self, model: Any, slots: Sequence[Any]) -> None:
        decided = self.decisions
        super().begin(model, slots)
        self.decisions = decided

    # --- reading ---

    def layout_of(self, module: ModuleInfo, stored: Mapping[str, Any], peek: Callable[[str], Any]) -> Layout | None:
        return layouts.layout_of(self, module, stored)

    # --- creating ---

    def layout_for(self, module: ModuleInfo) -> Layout | None:
        if matching.matching_pattern(module.name, self.modules_to_not_convert) is not None:
            self.skip_reasons.setdefault(module.name, "it is among the modules not to convert")
        return layouts.layout_for(self, module) if self.should_convert(module) else None
