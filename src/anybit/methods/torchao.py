"""torchao. One layout for each tensor class; names and settings of all of them stand in the safetensors metadata.

Stored for a weight `a.b.weight`: a.b._weight_qdata, a.b._weight_scale, a.b._weight_zero_point, ... ; the metadata maps
`a.b.weight` to its class, attributes and the names of these parts. Older models are pickled tensor subclasses.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from anybit.errors import InvalidOption, did_you_mean
from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.config import QuantizationConfigMixin
from anybit.quantizers.options import InvalidOptionType, check_flags, check_names, dtype_name
from anybit.quantizers.registry import register_quantization_config, register_quantizer

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
# names that transformers 4 wrote, with their settings in `quant_type_kwargs`
LEGACY: Mapping[str, str] = {
    "int4_weight_only": "Int4WeightOnlyConfig",
    "int8_weight_only": "Int8WeightOnlyConfig",
    "int8_dynamic_activation_int8_weight": "Int8DynamicActivationInt8WeightConfig",
    "int8_dynamic_activation_int4_weight": "Int8DynamicActivationInt4WeightConfig",
    "float8_weight_only": "Float8WeightOnlyConfig",
    "float8_dynamic_activation_float8_weight": "Float8DynamicActivationFloat8WeightConfig",
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
        data = config_dict.pop("quant_type_kwargs", None) or {}
        return {**config_dict, "quant_type": {"_type": LEGACY[name], "_version": 1, "_data": data}}

    def get_apply_tensor_subclass(self) -> dict[str, Any]:
        """transformers' name for reading `quant_type`."""
        found: dict[str, Any] = self.quant_type
        return found

    def own_dict(self) -> dict[str, Any]:
        own = super().own_dict()
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
