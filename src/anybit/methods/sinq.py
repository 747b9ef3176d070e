"""SINQ. Groups with a scale per row and a second scale per column, found by Sinkhorn normalisation.

Stored: W_q (packed as HQQ does), meta.scale and meta.zero [rows, 1] or each as 8-bit codes x with s and m, meta.scale2 [1, in] or
one for each tile, bias; model.safetensors.index.json.meta.json holds bits, group, shape and packing of each layer.
W = ((code - zero) * scale) * scale2
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.config import QuantizationConfigMixin
from anybit.quantizers.options import InvalidOption, check_choice, check_names, check_positive
from anybit.quantizers.registry import register_quantization_config, register_quantizer

FLAGS = ("sinq", "is_sinq", "sinq_quantized")


@register_quantization_config("sinq")
@dataclass(eq=False, repr=False)
class SinqConfig(QuantizationConfigMixin):
    """`method` "asinq" also weighs by activations. A stored layer carries its own settings."""

    nbits: int = 4
    group_size: int = 64
    tiling_mode: str = "1D"
    method: str = "sinq"  # type: ignore[misc]  # an option; read from the class it is the quant_method, the same word
    modules_to_not_convert: list[str] | None = None
    _extra_kwargs: dict[str, Any] = field(default_factory=dict)

    claims: ClassVar[tuple[str, ...]] = FLAGS

    def post_init(self) -> None:
        for name in ("nbits", "group_size"):
            try:
                setattr(self, name, int(getattr(self, name)))
            except (TypeError, ValueError) as error:
                raise InvalidOption(
                    f"SinqConfig: {name} is {getattr(self, name)!r}; it must be a whole number"
                ) from error
        check_positive(self, "nbits", "group_size")
        self.tiling_mode, self.method = str(self.tiling_mode), str(self.method).lower()
        check_choice(self, "method", ("sinq", "asinq"))
        check_names(self, "modules_to_not_convert")

    @classmethod
    def recognizes(cls, config_dict: Mapping[str, Any]) -> bool:
        named = (config_dict.get(key) for key in ("quantization_method", "backend", "approach"))
        return config_dict.get("quant_method") is None and ("sinq_version" in config_dict or "sinq" in named)

    @classmethod
    def found_in(cls, folder: Path, model_config: Mapping[str, Any]) -> dict[str, Any] | None:
        inside = super().found_in(folder, model_config)
        return {} if inside is None and any(model_config.get(flag) is True for flag in FLAGS) else inside


@register_quantizer("sinq")
class SinqHfQuantizer(HfQuantizer):
    """SINQ's layouts."""
