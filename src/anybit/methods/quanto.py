"""quanto. int8 and float8 rows; int4 and int2 groups of a row with a float shift.

Stored: weight._data int8 / float8 [out, in] and weight._scale [out, 1]; or weight._data._data uint8 (first rows in the lowest
bits), weight._scale and weight._shift [groups, 1]; input_scale, output_scale, bias. The folder's config.json says nothing:
quanto_qmap.json names each quantized module with its types.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.config import QuantizationConfigMixin
from anybit.quantizers.options import check_choice, check_names, check_objects
from anybit.quantizers.registry import register_quantization_config, register_quantizer

# names of quanto_qmap.json -> names of QuantoConfig
TYPES = {
    "qint2": "int2", "qint4": "int4", "qint8": "int8", "qfloat8": "float8", "qfloat8_e4m3fn": "float8",
    "qfloat8_e4m3fnuz": "float8", "qfloat8_e5m2": "float8", "none": None,
}  # fmt: skip


@register_quantization_config("quanto")
@dataclass(eq=False, repr=False)
class QuantoConfig(QuantizationConfigMixin):
    """Types of weights and activations. `qmap`, the content of quanto_qmap.json, has the last word for the modules in it."""

    weights: str = "int8"
    activations: str | None = None
    modules_to_not_convert: list[str] | None = None
    qmap: dict[str, dict[str, str]] | None = None

    method: ClassVar[str] = "quanto"
    side_files: ClassVar[tuple[str, ...]] = ("quanto_qmap.json",)
    optional: ClassVar[tuple[str, ...]] = ("qmap",)

    def post_init(self) -> None:
        check_choice(self, "weights", ("float8", "int8", "int4", "int2"))
        check_choice(self, "activations", (None, "int8", "float8"))
        check_names(self, "modules_to_not_convert")
        check_objects(self, "qmap")

    @classmethod
    def recognizes(cls, config_dict: Mapping[str, Any]) -> bool:
        return bool(config_dict) and all(_is_entry(value) for value in config_dict.values())

    @classmethod
    def modernize(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        if not cls.recognizes(config_dict):
            return config_dict
        commonest = {
            kind: Counter(TYPES.get(entry[kind], entry[kind]) for entry in config_dict.values()).most_common()
            for kind in ("weights", "activations")
        }
        weights = next((name for name, _ in commonest["weights"] if name is not None), "int8")
        return {"weights": weights, "activations": commonest["activations"][0][0], "qmap": config_dict}


def _is_entry(value: Any) -> bool:
    return (
        isinstance(value, dict) and isinstance(value.get("weights"), str) and isinstance(value.get("activations"), str)
    )


@register_quantizer("quanto")
class QuantoHfQuantizer(HfQuantizer):
    """quanto's layouts."""
