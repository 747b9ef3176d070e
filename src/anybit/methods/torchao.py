"""torchao. One layout for each tensor class; names and settings of all of them stand in the safetensors metadata.

Stored for a weight `a.b.weight`: a.b._weight_qdata, a.b._weight_scale, a.b._weight_zero_point, ... ; the metadata maps
`a.b.weight` to its class, attributes and the names of these parts. Older models are pickled tensor subclasses.
"""

from __future__ import annotations

import copy
import enum
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

from anybit._lazy import LazyModule
from anybit.errors import CorruptFile, InvalidOption, NotRepresentable, did_you_mean
from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.config import QuantizationConfigMixin
from anybit.quantizers.options import InvalidOptionType, check_flags, check_names, dtype_name
from anybit.quantizers.registry import register_quantization_config, register_quantizer

if TYPE_CHECKING:
    from anybit.methods import _torchao_configs as configs
    from anybit.methods import _torchao_pickles as pickled
    from anybit.methods import _torchao_records as records
    from anybit.weight.layout import Layout, ModuleInfo
else:  # needed for tensors, not to select the backend
    configs = LazyModule("anybit.methods._torchao_configs")
    pickled = LazyModule("anybit.methods._torchao_pickles")
    records = LazyModule("anybit.methods._torchao_records")

# configuration classes that a file may name -> their version today
VERSIONS: Mapping[str, int] = {
    "Int4WeightOnlyConfig": 2, "Int8WeightOnlyConfig": 2, "IntxWeightOnlyConfig": 2, "Float8WeightOnlyConfig": 2,
    "Int8DynamicActivationInt8WeightConfig": 2, "Int8DynamicActivationIntxWeightConfig": 2,
    "Int8StaticActivationInt8WeightConfig": 1, "Float8DynamicActivationFloat8WeightConfig": 2,
    "Float8DynamicActivationInt4WeightConfig": 1, "Float8StaticActivationFloat8WeightConfig": 1,
    "FqnToConfig": 1, "ModuleFqnToConfig": 1, "UIntxWeightOnlyConfig": 1, "Int8DynamicActivationUIntxWeightConfig": 1,
    "Int8DynamicActivationInt4WeightConfig": 1, "Int4DynamicActivationInt4WeightConfig": 1, "UIntXWeightOnlyConfig": 1,
    "FPXWeightOnlyConfig": 1, "GemliteUIntXWeightOnlyConfig": 1, "GGUFWeightOnlyConfig": 1, "AWQConfig": 1,
    "SmoothQuantConfig": 1, "StretchedIntxWeightConfig": 2, "MXDynamicActivationMXWeightConfig": 1,
    "NVFP4DynamicActivationNVFP4WeightConfig": 1, "NVFP4WeightOnlyConfig": 1, "SemiSparseWeightConfig": 1,
    "BlockSparseWeightConfig": 1,
}  # fmt: skip
# classes that hold one configuration for each name
MANY = ("FqnToConfig", "ModuleFqnToConfig")
# names that transformers 4 wrote, with their settings in `quant_type_kwargs`
LEGACY: Mapping[str, str] = {
    "int4_weight_only": "Int4WeightOnlyConfig",
    "int8_weight_only": "Int8WeightOnlyConfig",
    "int8_dynamic_activation_int8_weight": "Int8DynamicActivationInt8WeightConfig",
    "int8_dynamic_activation_int4_weight": "Int8DynamicActivationInt4WeightConfig",
    "float8_weight_only": "Float8WeightOnlyConfig",
    "float8_dynamic_activation_float8_weight": "Float8DynamicActivationFloat8WeightConfig",
}


def _scheme(name: str, **options: Any) -> Mapping[str, Any]:
    return {"quant_type": {"_type": name, "_version": VERSIONS[name], "_data": options}}


def _groups(size: int) -> dict[str, Any]:
    return {"_type": "PerGroup", "_version": 1, "_data": {"group_size": size}}


def _int(bits: int) -> dict[str, Any]:
    return {"_type": "torch.dtype", "_data": f"int{bits}"}


SCHEMES: Mapping[str, Mapping[str, Any]] = {
    "torchao-int8": _scheme("Int8WeightOnlyConfig"),
    "torchao-int8-dynamic": _scheme("Int8DynamicActivationInt8WeightConfig"),
    "torchao-float8": _scheme("Float8WeightOnlyConfig"),
    "torchao-float8-dynamic": _scheme(
        "Float8DynamicActivationFloat8WeightConfig",
        granularity={"_type": "PerRow", "_version": 1, "_data": {"dim": -1}},
    ),
    **{f"torchao-int4-g{size}": _scheme("Int4WeightOnlyConfig", group_size=size) for size in (32, 64, 128)},
    **{
        f"torchao-int4-tiles-g{size}": _scheme(
            "Int4WeightOnlyConfig", group_size=size, int4_packing_format="tile_packed_to_4d"
        )
        for size in (32, 64, 128)
    },
    **{
        f"torchao-int{bits}-int8-dynamic-g32": _scheme(
            "Int8DynamicActivationIntxWeightConfig", weight_dtype=_int(bits), weight_granularity=_groups(32)
        )
        for bits in (2, 3, 4)
    },
    **{
        f"torchao-intx{bits}-g32": _scheme("IntxWeightOnlyConfig", weight_dtype=_int(bits), granularity=_groups(32))
        for bits in range(2, 9)
    },
}


@register_quantization_config("torchao")
@dataclass(eq=False, repr=False)
class TorchAoConfig(QuantizationConfigMixin):
    """`quant_type` is plain data, {"_type": class, "_version": n, "_data": options}; an object of torchao's becomes that."""

    quant_type: Any
    modules_to_not_convert: list[str] | None = None
    include_input_output_embeddings: bool = False
    untie_embedding_weights: bool = False

    method: ClassVar[str] = "torchao"
    schemes: ClassVar[Mapping[str, Mapping[str, Any]]] = SCHEMES
    targets: ClassVar[tuple[str, ...]] = ("transformers", "vllm")

    def post_init(self) -> None:
        self.quant_type = plain_data(self.quant_type)
        check_flags(self, "include_input_output_embeddings", "untie_embedding_weights")
        check_names(self, "modules_to_not_convert")

    @classmethod
    def modernize(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        name = config_dict.get("quant_type")
        if not isinstance(name, str):
            return config_dict
        if name not in LEGACY:
            raise InvalidOption(
                f"TorchAoConfig: quant_type is {name!r}{did_you_mean(name, LEGACY) or '.'} Known: {', '.join(LEGACY)}"
            )
        # the classes of that time were version 1; `layout` was an object of torchao's and cannot be in a file
        data = config_dict.setdefault("quant_type_kwargs", None) or {}
        return {**config_dict, "quant_type": {"_type": LEGACY[name], "_version": 1, "_data": data}}

    def per_module(self, settings: Mapping[str, QuantizationConfigMixin | None]) -> QuantizationConfigMixin:
        if self.quant_type["_type"] in MANY:
            raise NotRepresentable(
                f"TorchAoConfig: {self.quant_type['_type']} names modules already; start from another"
            )
        table = {name: None if other is None else cast(Any, other).quant_type for name, other in settings.items()}
        made = copy.copy(self)
        made.quant_type = {
            "_type": "FqnToConfig",
            "_version": VERSIONS["FqnToConfig"],
            "_data": {"fqn_to_config": {**table, "_default": self.quant_type}},
        }
        return made

    def get_apply_tensor_subclass(self) -> dict[str, Any]:
        """transformers' name for reading `quant_type`."""
        found: dict[str, Any] = self.quant_type
        return found

    def own_dict(self) -> dict[str, Any]:
        own = super().own_dict()
        name = next((name for name, found in LEGACY.items() if found == self.quant_type["_type"]), None)
        as_read = self.extra_fields.get("quant_type_kwargs", "absent")
        if name is not None and as_read != "absent" and (as_read or {}) == self.quant_type["_data"]:
            return {**own, "quant_type": name}
        return {**own, "quant_type": {"default": own["quant_type"]}}


def plain_data(quant_type: Any) -> dict[str, Any]:
    """One setting as {"_type", "_version", "_data"}. InvalidOption names the closest class."""
    if isinstance(quant_type, str):
        name = LEGACY.get(quant_type, quant_type)
        raise InvalidOption(
            f"TorchAoConfig: quant_type is the text {quant_type!r}; write {{'_type': {name!r}, '_data': {{...options...}}}}, or "
            f"pass torchao's {name}"
        )
    data = encoded(quant_type)
    if isinstance(data, dict) and data.keys() == {"default"}:
        data = data["default"]
    if not isinstance(data, dict) or not isinstance(data.get("_type"), str):
        raise InvalidOptionType(
            f"TorchAoConfig: quant_type is {quant_type!r}; it must be like {{'_type': 'Int8WeightOnlyConfig', '_data': {{}}}}, "
            "or an object of torchao's"
        )
    name = data["_type"]
    if name not in VERSIONS:
        raise InvalidOption(
            f"TorchAoConfig: quant_type names {name!r}, which is no configuration of torchao's"
            f"{did_you_mean(name, VERSIONS) or '.'} Known: {', '.join(VERSIONS)}"
        )
    return {"_version": VERSIONS[name], "_data": {}, **data}


def encoded(value: Any) -> Any:
    """Plain data from torchao's objects, in the form that torchao itself writes; other data as it is."""
    if isinstance(value, Mapping):
        return {key: encoded(inside) for key, inside in value.items()}
    if type(value) in (list, tuple):
        return [encoded(inside) for inside in value]
    if isinstance(value, enum.Enum):
        return {"_type": type(value).__name__, "_data": value.name}
    if type(value).__module__ == "torch" and type(value).__name__ == "dtype":
        return {"_type": "torch.dtype", "_data": dtype_name(value)}
    if type(value).__module__.partition(".")[0] == "torchao":
        options = value._asdict() if hasattr(value, "_asdict") else vars(value)
        data = {key: encoded(own) for key, own in options.items() if not key.startswith("_") and key != "version"}
        return {"_type": type(value).__name__, "_version": getattr(value, "version", 1), "_data": data}
    return value


@register_quantizer("torchao")
class TorchAoHfQuantizer(HfQuantizer):
    """Layouts of torchao's tensor classes."""

    layouts_available = True
    pickled_packages = ("torchao",)

    def __init__(self, quantization_config: QuantizationConfigMixin, *, pre_quantized: bool = True, **kwargs: Any):
        super().__init__(quantization_config, pre_quantized=pre_quantized, **kwargs)
        self.records: dict[str, str] = {}

    # --- reading ---

    def spelled_out(self, checkpoint: Any) -> Any:
        if getattr(checkpoint, "values", None):
            checkpoint = pickled.spelled_out(checkpoint)
        self.records = {name: text for name, text in checkpoint.metadata.items() if '"_type"' in text}
        return checkpoint

    def layout_of(self, module: ModuleInfo, stored: Mapping[str, Any], peek: Callable[[str], Any]) -> Layout | None:
        names = [name for name in stored if name.startswith(("._", "/_"))]
        if not names:
            return None
        infos = {name[2:]: stored[name] for name in names}
        owner = stored[names[0]].name.rpartition("._")[0]
        for full_name, text in self.records.items():
            parent, _, parameter = full_name.rpartition(".")
            if parent == owner and all(name.startswith(f"{parameter}_") for name in infos):
                parts = {name.removeprefix(f"{parameter}_"): info for name, info in infos.items()}
                return records.Record(module, parameter, full_name, text, parts).layout()
        info = stored[names[0]]
        raise CorruptFile(
            f"tensor {info.name!r} in {info.file} is a part of a quantized weight, but the file's header, which says how to read "
            f"it, does not mention {owner}'s parameters. The file was saved by a program that drops the header's metadata; get "
            "the original"
        )

    # --- creating ---

    def begin(self, model: Any, slots: Sequence[Any]) -> None:
        super().begin(model, slots)
        if self.pre_quantized or not self.quantization_config.include_input_output_embeddings:
            return
        ends = [model.get_input_embeddings(), model.get_output_embeddings()]
        for name, module in model.named_modules():
            if module is not None and any(module is end for end in ends):
                self.skip_reasons.pop(name, None)

    def layout_for(self, module: ModuleInfo) -> Layout | None:
        if not self.should_convert(module):
            return None
        weight = module.kind != "experts"
        full_name = f"{module.name}.weight" if weight else module.name
        config, reason = self._config_of(full_name, module)
        if config is not None:
            try:
                return configs.layout_of(config, module, "weight" if weight else module.name.rpartition(".")[2])
            except configs.StaysDense as error:
                reason = str(error)
        self.skip_reasons[module.name] = reason
        return None

    def _config_of(self, full_name: str, module: ModuleInfo) -> tuple[Mapping[str, Any] | None, str]:
        """The configuration of one parameter, or None and why there is none."""
        own = self.quantization_config
        kinds = ("linear", "embedding") if own.include_input_output_embeddings else ("linear",)
        usual = module.kind in kinds
        if own.quant_type["_type"] not in MANY:
            return (
                (own.quant_type, "") if usual else (None, f"torchao quantizes linear layers, not {module.class_name}")
            )
        table = (
            own.quant_type["_data"].get("fqn_to_config") or own.quant_type["_data"].get("module_fqn_to_config") or {}
        )
        key = _key_of(full_name, module.kind, table)
        if key is None and usual and "_default" in table:
            key = "_default"
        if key is None:
            return None, "the configuration's fqn_to_config does not name it"
        return (table[key], f"the configuration's fqn_to_config leaves {key!r} dense")

    def file_metadata(self, layouts: Mapping[str, Layout], names: Iterable[str]) -> dict[str, str]:
        from anybit.weight.layout import join_name

        found: dict[str, str] = {}
        parts: set[str] = set()
        for unit, layout in layouts.items():
            own: Any = layout
            found[unit if own.name("x").startswith("/") else f"{unit}.{own.parameter}"] = own.record
            parts |= {join_name(unit, name) for name in layout.specs()}
        dense = [name for name in names if name not in parts]
        found.update(dict.fromkeys(dense, json.dumps({"_type": "Tensor"})))
        return {"format": "pt", **found, "tensor_names": json.dumps(list(found))}


def _key_of(full_name: str, kind: str, table: Mapping[str, Any]) -> str | None:
    """The key of `fqn_to_config` that counts: the exact name of parameter or module, then the first pattern that covers one."""
    from anybit.quantizers.matching import compiled

    names = (full_name, full_name.rpartition(".")[0])
    for name in names:
        if name in table:
            return name
    for key in table:
        if key.startswith("re:") and any(compiled(key[3:]).covers(name) for name in names):
            return key
    return None
