"""VPTQ. Vectors of one input column over several outputs, from a main and a residual codebook; a few columns may be outliers.

Stored, v rows per vector, k and r centroids: centroids.weight [groups, k*v], res_centroids.weight [groups, r*v], indices int32
[groups, ceil(out/v), words] (one little-endian stream of log2(k) + log2(r) bits per column), outlier_centroids.weight,
outlier_indices, perm int16 [in], weight_scale and weight_bias [in] (or [out] when norm_dim is 1), bias [out].
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from anybit.errors import ConfigError, located
from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.config import QuantizationConfigMixin
from anybit.quantizers.options import check_names, check_objects, check_type, refuse
from anybit.quantizers.registry import register_quantization_config, register_quantizer


def _absent() -> list[int]:
    return [-1, -1]


@dataclass(eq=False, repr=False)
class VptqLayerConfig(QuantizationConfigMixin):
    """Settings of one linear. Pairs are (outliers, the rest); -1 means there is none."""

    enable_norm: bool = True
    enable_perm: bool = True
    group_num: int = 1
    group_size: int = -1
    in_features: int = -1
    indices_as_float: bool = False
    is_indice_packed: bool = True
    num_centroids: list[int] = field(default_factory=_absent)
    num_res_centroids: list[int] = field(default_factory=_absent)
    out_features: int = -1
    outlier_size: int = 0
    vector_lens: list[int] = field(default_factory=_absent)

    def __post_init__(self) -> None:
        self.post_init()  # part of a VptqConfig: it has no quant_method of its own

    def post_init(self) -> None:
        if self.is_indice_packed is False:
            raise refuse(self, "is_indice_packed", "only packed indices are read")
        for name in ("num_centroids", "num_res_centroids", "vector_lens"):
            check_type(self, name, list, tuple)


@register_quantization_config("vptq")
@dataclass(eq=False, repr=False)
class VptqConfig(QuantizationConfigMixin):
    """`config_for_layers` by full module name, else `shared_layer_config` by the last part of the name; others stay dense."""

    enable_proxy_error: bool = False
    config_for_layers: dict[str, Any] = field(default_factory=dict)
    shared_layer_config: dict[str, Any] = field(default_factory=dict)
    modules_to_not_convert: list[str] | None = None

    method: ClassVar[str] = "vptq"

    def post_init(self) -> None:
        check_names(self, "modules_to_not_convert")
        check_objects(self, "config_for_layers", "shared_layer_config")
        self.config_for_layers, self.shared_layer_config = self.config_for_layers or {}, self.shared_layer_config or {}
        for option in ("config_for_layers", "shared_layer_config"):
            for name, settings in getattr(self, option).items():
                try:
                    VptqLayerConfig.from_dict(settings)
                except ConfigError as error:
                    raise located(error, f"VptqConfig: {option}[{name!r}]") from error.__cause__
        if self.enable_proxy_error is True:
            raise refuse(self, "enable_proxy_error", "it belongs to training; set it to False")

    def layer(self, module: str) -> VptqLayerConfig | None:
        """The settings of a module; None when it is not quantized."""
        settings = self.config_for_layers.get(module) or self.shared_layer_config.get(module.rpartition(".")[2])
        found: VptqLayerConfig | None = None if settings is None else VptqLayerConfig.from_dict(settings)
        return found


@register_quantizer("vptq")
class VptqHfQuantizer(HfQuantizer):
    """VPTQ's layout."""

    requires_calibration = True
