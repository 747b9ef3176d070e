"""VPTQ. Vectors of one input column over several outputs, from a main and a residual codebook; a few columns may be outliers.

Stored, v rows per vector, k and r centroids: centroids.weight [groups, k*v], res_centroids.weight [groups, r*v], indices int32
[groups, ceil(out/v), words] (one little-endian stream of log2(k) + log2(r) bits per column), outlier_centroids.weight,
outlier_indices, perm int16 [in], weight_scale and weight_bias [in] (or [out] when norm_dim is 1), bias [out].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from anybit._lazy import LazyModule
from anybit.errors import ConfigError, NotRepresentable, ShapeMismatch, located
from anybit.methods._calibrated import CalibratedQuantizer
from anybit.quantizers.config import QuantizationConfigMixin
from anybit.quantizers.options import check_names, check_objects, check_type, refuse
from anybit.quantizers.registry import register_quantization_config, register_quantizer

if TYPE_CHECKING:
    from anybit.methods import _vptq_layout as layouts
    from anybit.weight.layout import Layout, ModuleInfo
else:  # needed for tensors, not to select the backend
    layouts = LazyModule("anybit.methods._vptq_layout")

NUMBERS = ("float16", "bfloat16", "float32")
EVERY = "*"  # in shared_layer_config, when a checkpoint is made


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
    """`config_for_layers` by full module name, else `shared_layer_config` by the last part of the name; others stay dense.

    To make a checkpoint, "*" in `shared_layer_config` stands for every linear layer; the result names each.
    """

    enable_proxy_error: bool = False
    config_for_layers: dict[str, Any] = field(default_factory=dict)
    shared_layer_config: dict[str, Any] = field(default_factory=dict)
    modules_to_not_convert: list[str] | None = None

    method: ClassVar[str] = "vptq"
    schemes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        f"vptq-v8-k{entries}-{residuals}": {
            "shared_layer_config": {
                "*": {
                    "vector_lens": [-1, 8],
                    "num_centroids": [-1, entries],
                    "num_res_centroids": [-1, residuals or -1],
                }
            }
        }
        for entries, residuals in ((256, 256), (4096, 0), (65536, 0), (65536, 256))
    }

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
        shared = self.shared_layer_config
        settings = self.config_for_layers.get(module) or shared.get(module.rpartition(".")[2]) or shared.get(EVERY)
        found: VptqLayerConfig | None = None if settings is None else VptqLayerConfig.from_dict(settings)
        return found


@register_quantizer("vptq")
class VptqHfQuantizer(CalibratedQuantizer):
    """VPTQ's layout."""

    layouts_available = True
    calibrated_algorithm = "vptq"

    def begin(self, model: Any, slots: Sequence[Any]) -> None:
        super().begin(model, slots)
        config = self.quantization_config
        if not self.pre_quantized and not (config.config_for_layers or config.shared_layer_config):
            raise ConfigError(
                "VptqConfig says of no layer how to quantize it. Give shared_layer_config={'*': {'vector_lens': [-1, 8], "
                "'num_centroids': [-1, 256], 'num_res_centroids': [-1, 256]}}, entries by name, or the scheme vptq-v8-k256-256"
            )

    def model_config(self, config: dict[str, Any]) -> dict[str, Any]:
        self.quantization_config.shared_layer_config.pop(EVERY, None)
        return super().model_config(config)

    def layout_for(self, module: ModuleInfo) -> Layout | None:
        if not self.can_be_calibrated(module):
            return None
        config = self.quantization_config
        settings = config.layer(module.name)
        if settings is None:
            self.skip_reasons[module.name] = "neither config_for_layers nor shared_layer_config has an entry for it"
            return None
        layout = _layout(module, settings, module.dtype if module.dtype in NUMBERS[:2] else "float16")
        own = {name: value for name, value in settings.to_dict().items() if name != "quant_method"}
        sizes = {"in_features": module.shape[1], "out_features": module.shape[0], "group_size": layout.group_size}
        marks = {"bias": module.has_bias, "vector_quant_dim": "out", "enable_proxy_error": False}
        config.config_for_layers[module.name] = {**own, **sizes, **marks}
        return layout

    def layout_of(self, module: ModuleInfo, stored: Mapping[str, Any], peek: Callable[[str], Any]) -> Layout | None:
        if not {"indices", "centroids.weight"} & set(stored):
            return None
        settings = self.quantization_config.layer(module.name)
        if settings is None:
            raise NotRepresentable(
                f"{module.name} is stored packed, but neither config_for_layers nor shared_layer_config of config.json says how. "
                "Restore its entry from the tool that wrote the checkpoint"
            )
        if module.kind != "linear":
            raise NotRepresentable(f"{module.name} is a packed {module.kind}; VPTQ's layout is one of linear layers")
        numbers = stored.get("centroids.weight")
        return _layout(
            module, settings, numbers.dtype if numbers is not None and numbers.dtype in NUMBERS else "float16"
        )


def _layout(module: ModuleInfo, settings: VptqLayerConfig, number_dtype: str) -> layouts.VptqLayout:
    """What an entry of the configuration says; refused where VPTQ's own reader would not understand it."""
    rows, columns = module.shape
    for name, own in (("in_features", columns), ("out_features", rows)):
        if getattr(settings, name) not in (-1, own):
            raise ShapeMismatch(
                f"{module.name} has shape {module.shape}, its entry in config.json {name}={getattr(settings, name)}"
            )
    (outlier_vector, vector), (outlier_entries, entries) = settings.vector_lens, settings.num_centroids
    outlier_residuals, residuals = settings.num_res_centroids
    outliers = settings.outlier_size
    has_outliers = outliers > 0
    problem = None
    if vector < 1 or not _is_table(entries) or (residuals > 0 and not _is_table(residuals)):
        problem = (
            f"vectors of {vector} from {entries} and {residuals} centroids; numbers of centroids are powers of two"
        )
    elif (entries - 1).bit_length() + (max(residuals, 1) - 1).bit_length() > 32 or entries > 1 << 24:
        problem = f"{entries} and {residuals} centroids, whose indices take more than 32 bits"
    elif has_outliers and (outlier_vector < 1 or not 0 < outlier_entries <= 65536):
        problem = f"{outliers} outlier columns with vectors of {outlier_vector} from {outlier_entries} centroids"
    elif outlier_residuals > 0:
        problem = "residual centroids of outlier columns"
    elif settings.group_num < 1 or (columns - max(outliers, 0)) % settings.group_num:
        problem = f"{settings.group_num} groups of {columns - max(outliers, 0)} columns"
    elif settings.enable_perm and columns > 65536:
        problem = "a permutation of more than 65536 inputs"
    elif settings.extra_fields.get("vector_quant_dim", "out") != "out":
        problem = f"vectors along {settings.extra_fields['vector_quant_dim']!r}"
    elif settings.extra_fields.get("norm_dim", 0) not in (0, 1):
        problem = f"norm_dim {settings.extra_fields['norm_dim']!r}"
    if problem is not None:
        raise NotRepresentable(
            f"{module.name}: its entry in config.json says {problem}; VPTQ's files have no form for it"
        )
    layout = layouts.VptqLayout(
        module.shape,
        module.dtype,
        vector,
        entries,
        max(residuals, 0),
        settings.group_num,
        max(outliers, 0),
        outlier_vector if has_outliers else 0,
        outlier_entries if has_outliers else 0,
        settings.extra_fields.get("norm_dim", 0) if settings.enable_norm else None,
        settings.enable_perm,
        number_dtype,
        "float16" if settings.indices_as_float else "int16",
    )
    if settings.group_size not in (-1, layout.group_size):
        raise ShapeMismatch(
            f"{module.name}: {columns} inputs less {layout.outliers} outliers make {layout.groups} groups of "
            f"{layout.group_size}, its entry in config.json says group_size={settings.group_size}"
        )
    return layout


def _is_table(entries: int) -> bool:
    return entries > 1 and entries & (entries - 1) == 0
