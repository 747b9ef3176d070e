"""ModelOpt (NVIDIA). FP8, NVFP4, MXFP8 and int4 weights; transformers has no reader for it.

Stored: weight (float8_e4m3fn [out, in]; uint8 [out, in/2] for FP4, low nibble first; uint8 [out/2, in] for int4), weight_scale,
weight_scale_2 (a multiplier, unlike compressed-tensors' global scale), input_scale, pre_quant_scale [in], and k_scale, v_scale
under the projections. The configuration is in config.json, in hf_quant_config.json, or in parts in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.checkpoint_config import read_json
from anybit.quantizers.config import QuantizationConfigMixin
from anybit.quantizers.options import check_group_size, check_names, check_objects, check_type
from anybit.quantizers.registry import register_quantization_config, register_quantizer

FILE = "hf_quant_config.json"


@register_quantization_config("modelopt")
@dataclass(eq=False, repr=False)
class ModelOptConfig(QuantizationConfigMixin):
    """`quant_algo` names the format; "MIXED_PRECISION" has one for each module in `quantized_layers`."""

    quant_algo: str | None = None
    ignore: list[str] | None = None
    group_size: int | None = None
    kv_cache_quant_algo: str | None = None
    kv_cache_scheme: dict[str, Any] | None = None
    config_groups: dict[str, Any] | None = None
    quantized_layers: dict[str, dict[str, Any]] | None = None
    has_zero_point: bool | None = None
    pre_quant_scale: bool | None = None
    producer: dict[str, Any] | None = None

    method: ClassVar[str] = "modelopt"
    aliases: ClassVar[Mapping[str, str]] = {"exclude_modules": "ignore"}
    side_files: ClassVar[tuple[str, ...]] = (FILE,)
    optional: ClassVar[tuple[str, ...]] = (
        "group_size", "kv_cache_quant_algo", "kv_cache_scheme", "config_groups", "quantized_layers", "has_zero_point",
        "pre_quant_scale", "producer",
    )  # fmt: skip

    def post_init(self) -> None:
        check_type(self, "quant_algo", str, None)
        if self.group_size is not None:
            check_group_size(self)
        check_objects(self, "kv_cache_scheme", "config_groups", "quantized_layers", "producer")
        check_names(self, "ignore")

    @classmethod
    def recognizes(cls, config_dict: Mapping[str, Any]) -> bool:
        named = config_dict.get("quant_method")
        if named is not None:
            return str(named).startswith(cls.method)  # such as "modelopt_fp4"
        inside = config_dict.get("quantization", config_dict)
        return isinstance(inside, dict) and "quant_algo" in inside

    @classmethod
    def modernize(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        inside = config_dict.get("quantization")
        if not isinstance(inside, dict):
            return config_dict
        return {**{name: value for name, value in config_dict.items() if name != "quantization"}, **inside}

    @classmethod
    def in_context(cls, config_dict: dict[str, Any], model_config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        if not (folder / FILE).is_file():
            return config_dict
        beside = cls.modernize(read_json(folder / FILE))
        named = {cls.aliases.get(name, name): value for name, value in beside.items() if value is not None}
        return {**named, **config_dict}


@register_quantizer("modelopt")
class ModelOptHfQuantizer(HfQuantizer):
    """ModelOpt's layouts."""

    requires_calibration = True
