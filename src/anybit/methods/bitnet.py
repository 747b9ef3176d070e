"""BitNet. Weights -1, 0, 1 with one scale per matrix; inputs are int8 per token.

Stored: weight uint8 [out/4, in] (four ternary codes in a byte, the first quarter of the rows in the lowest bits), or unpacked
values, or master weights (online); weight_scale [1], which "bitlinear" divides by and "autobitlinear" multiplies with (its bias
too); bias [out]; rms_norm.weight [in].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.config import QuantizationConfigMixin
from anybit.quantizers.options import check_choice, check_flags, check_names, check_type
from anybit.quantizers.registry import register_quantization_config, register_quantizer


@register_quantization_config("bitnet")
@dataclass(eq=False, repr=False)
class BitNetQuantConfig(QuantizationConfigMixin):
    """`linear_class` decides what weight_scale means, `quantization_mode` whether packed or master weights are stored."""

    modules_to_not_convert: list[str] | None = None
    linear_class: str = "bitlinear"
    quantization_mode: str = "offline"
    use_rms_norm: bool = False
    rms_norm_eps: float | None = 1e-6

    method: ClassVar[str] = "bitnet"

    def post_init(self) -> None:
        check_choice(self, "linear_class", ("bitlinear", "autobitlinear"))
        check_choice(self, "quantization_mode", ("online", "offline"))
        check_flags(self, "use_rms_norm")
        check_type(self, "rms_norm_eps", float, int, None)
        check_names(self, "modules_to_not_convert")


@register_quantizer("bitnet")
class BitNetHfQuantizer(HfQuantizer):
    """BitNet's layouts."""

    requires_calibration = True
