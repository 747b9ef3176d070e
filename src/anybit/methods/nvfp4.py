"""NVFP4 as transformers makes it while loading: E2M1 codes, an E4M3 scale for each 16 inputs, a float scale for the matrix.

transformers stores none of it: NVFP4 on disk is compressed-tensors or modelopt. anybit stores it as modelopt does: weight uint8
[out, in/2], weight_scale float8_e4m3fn [out, in/16], weight_scale_2 float32 []. Only linears without a bias whose sides are
multiples of 16 are quantized. Inputs are not: transformers' kernel quantizes them for many tokens and not for one, and how it
rounds is not published.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from anybit._lazy import LazyModule
from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.config import QuantizationConfigMixin
from anybit.quantizers.options import check_names
from anybit.quantizers.registry import register_quantization_config, register_quantizer

if TYPE_CHECKING:
    from anybit.methods import _float_evidence as evidence
    from anybit.methods import _scaled_floats as scaled_floats
    from anybit.quantizers import matching
    from anybit.weight import Layout, ModuleInfo
else:
    evidence = LazyModule("anybit.methods._float_evidence")
    scaled_floats = LazyModule("anybit.methods._scaled_floats")
    matching = LazyModule("anybit.quantizers.matching")

GROUP = 16
EXPERT = re.compile(r"\.experts\.\d+\.")


@register_quantization_config("nvfp4")
@dataclass(eq=False, repr=False)
class NVFP4Config(QuantizationConfigMixin):
    """Which modules stay as they are."""

    modules_to_not_convert: list[str] | None = None

    method: ClassVar[str] = "nvfp4"
    schemes: ClassVar[Mapping[str, Mapping[str, Any]]] = {"nvfp4": {}}

    def post_init(self) -> None:
        check_names(self, "modules_to_not_convert")


@register_quantizer("nvfp4")
class NVFP4HfQuantizer(HfQuantizer):
    """NVFP4's layout."""

    layouts_available = True
    default_algorithm = "minifloat"

    def layout_of(self, module: ModuleInfo, stored: Mapping[str, Any], peek: Callable[[str], Any]) -> Layout | None:
        weight = stored.get("weight")
        if weight is None or weight.dtype != "uint8":
            return None
        if "weight_scale" not in stored:
            raise evidence.missing(module, "weight_scale", f"{weight.name!r} is uint8 and has no meaning without it")
        layout = evidence.nvfp4_layout(module, stored)
        if layout is None:
            raise evidence.contradiction(module, stored, ("weight", "weight_scale"), "NVFP4")
        return layout

    def layout_for(self, module: ModuleInfo) -> Layout | None:
        pattern = matching.matching_pattern(module.name, self.modules_to_not_convert)
        reason = f"{pattern!r} is among the modules not to convert" if pattern is not None else _stays_dense(module)
        if reason is not None:
            self.skip_reasons.setdefault(module.name, reason)
        return scaled_floats.NvFp4Layout(module.shape, module.dtype) if self.should_convert(module) else None


def _stays_dense(module: ModuleInfo) -> str | None:
    if module.kind != "linear" or EXPERT.search(module.name):
        return "NVFP4 quantizes linear layers; experts, embeddings and Conv1D layers stay as they are"
    if module.has_bias:
        return "NVFP4 has no form for a layer with a bias"
    if any(side % GROUP for side in module.shape):
        return f"NVFP4 wants sides that are multiples of {GROUP}, not {module.shape}"
    return None
