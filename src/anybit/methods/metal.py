"""Metal and MLX. Integer codes of a row in groups: scale * code + offset.

Stored: weight uint32 [out, in*bits/32], each row one little-endian bit stream; scales [out, in/group]; offsets [out, in/group]
named qbiases (transformers) or biases (MLX); bias [out]. MLX's modes mxfp4, mxfp8 and nvfp4 have uint8 scales and no offsets.
MLX's configuration has no quant_method and lies under `quantization`; further keys in it are modules with settings of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.config import QuantizationConfigMixin
from anybit.quantizers.options import check_choice, check_flags, check_names, check_positive
from anybit.quantizers.registry import register_quantization_config, register_quantizer

# MLX's mode -> widths; None is transformers' own format
BITS: Mapping[str | None, tuple[int, ...]] = {
    None: (2, 4, 8), "affine": (2, 3, 4, 5, 6, 8), "mxfp4": (4,), "mxfp8": (8,), "nvfp4": (4,),
}  # fmt: skip


@register_quantization_config("metal")
@dataclass(eq=False, repr=False)
class MetalConfig(QuantizationConfigMixin):
    """`mode` is set for files that MLX wrote, and for those only. MLX's settings of single modules are in `extra_fields`."""

    bits: int = 4
    group_size: int = 64
    modules_to_not_convert: list[str] | None = None
    dequantize: bool = False
    mode: str | None = None

    method: ClassVar[str] = "metal"
    config_keys: ClassVar[tuple[str, ...]] = ("quantization_config", "quantization")
    loading_attributes: ClassVar[tuple[str, ...]] = ("dequantize",)

    def post_init(self) -> None:
        check_choice(self, "mode", BITS)
        check_choice(self, "bits", BITS[self.mode])
        check_positive(self, "group_size")
        check_names(self, "modules_to_not_convert")
        check_flags(self, "dequantize")

    @classmethod
    def recognizes(cls, config_dict: Mapping[str, Any]) -> bool:
        if config_dict.get("quant_method") is not None or not {"bits", "group_size"} <= config_dict.keys():
            return False
        others = [(name, value) for name, value in config_dict.items() if name not in ("bits", "group_size")]
        return config_dict.get("mode") in tuple(BITS)[1:] or all(
            isinstance(value, dict) or (isinstance(value, bool) and "." in name) for name, value in others
        )

    @classmethod
    def modernize(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        return {"mode": "affine", **config_dict} if cls.recognizes(config_dict) else config_dict

    def own_dict(self) -> dict[str, Any]:
        own = super().own_dict()
        written = (
            "bits",
            "group_size",
            *(("quant_method", "modules_to_not_convert") if self.mode is None else ("mode",)),
        )
        return {name: own[name] for name in written}


@register_quantizer("metal")
class MetalHfQuantizer(HfQuantizer):
    """Layouts of transformers' Metal format and of MLX."""
