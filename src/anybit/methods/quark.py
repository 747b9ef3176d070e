"""Quark (AMD). One dialect for int8, int4, FP8 and MX weights; a specification for each kind of tensor, per layer pattern.

Stored: weight (int8, float8_e4m3fn, int32 [in, out/8] for 4-bit groups, uint8 for MXFP4 and MXFP6), weight_scale,
weight_zero_point, input_scale, output_scale, bias; a second level ends in _2. Files may call themselves "fp8" or "awq": an
`export` entry says that Quark wrote them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.config import QuantizationConfigMixin
from anybit.quantizers.options import check_names, check_objects, check_type
from anybit.quantizers.registry import register_quantization_config, register_quantizer


@register_quantization_config("quark")
@dataclass(eq=False, repr=False)
class QuarkConfig(QuantizationConfigMixin):
    """The content of a file, as it is. `quant_method` may be "fp8" or "awq", which selects other keys than "quark" has."""

    quant_method: str = "quark"
    version: str | None = None
    quant_mode: str | None = None
    global_quant_config: dict[str, Any] | None = None
    layer_quant_config: dict[str, Any] | None = None
    layer_type_quant_config: dict[str, Any] | None = None
    exclude: list[str] | None = None
    algo_config: list[Any] | dict[str, Any] | None = None
    softmax_quant_spec: dict[str, Any] | None = None
    kv_cache_quant_config: dict[str, Any] | None = None
    kv_cache_post_rope: bool | None = None
    export: dict[str, Any] | None = None
    activation_scheme: str | None = None
    ignored_layers: list[str] | None = None
    kv_cache_scheme: str | dict[str, Any] | None = None
    bits: int | None = None
    group_size: int | None = None
    zero_point: bool | None = None
    modules_to_not_convert: list[str] | None = None
    pack_method: str | None = None

    method: ClassVar[str] = "quark"
    claims: ClassVar[tuple[str, ...]] = ("export",)
    optional: ClassVar[tuple[str, ...]] = (
        "version", "quant_mode", "global_quant_config", "layer_quant_config", "layer_type_quant_config", "exclude", "algo_config",
        "softmax_quant_spec", "kv_cache_quant_config", "kv_cache_post_rope", "export", "activation_scheme", "ignored_layers",
        "kv_cache_scheme", "bits", "group_size", "zero_point", "modules_to_not_convert", "pack_method",
    )  # fmt: skip

    def __post_init__(self) -> None:
        self.custom_mode = str(getattr(self.quant_method, "value", self.quant_method))
        super().__post_init__()

    def post_init(self) -> None:
        check_objects(
            self,
            "global_quant_config",
            "layer_quant_config",
            "layer_type_quant_config",
            "kv_cache_quant_config",
            "export",
        )
        check_type(self, "bits", int, None)
        check_type(self, "group_size", int, None)
        for name in ("exclude", "ignored_layers", "modules_to_not_convert"):
            check_names(self, name)

    @property
    def legacy(self) -> bool:
        """Whether the file has no `export` entry: written before Quark 1.0, or by hand."""
        return self.export is None

    def own_dict(self) -> dict[str, Any]:
        own = super().own_dict()
        return {**own, "quant_method": own.pop("custom_mode")}


@register_quantizer("quark")
class QuarkHfQuantizer(HfQuantizer):
    """Quark's layouts."""

    requires_calibration = True
