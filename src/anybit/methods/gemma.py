"""Gemma's own checkpoints. 2-, 4- or 8-bit rows and, where calibrated, static 8-bit ranges of inputs and outputs.

Stored: weight int8 [out, in] or uint8 [out, ceil(in*bits/8)] (lowest bits first, code minus 2^(bits-1)), weight_scale float32
[out, 1], input_activation_scale and output_activation_scale (0 means none), bias; for embeddings embedding_quantized and
embedding_scale [vocabulary, blocks].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.config import QuantizationConfigMixin
from anybit.quantizers.options import check_choice, check_flags, check_names, check_objects
from anybit.quantizers.registry import register_quantization_config, register_quantizer


@register_quantization_config("gemma")
@dataclass(eq=False, repr=False)
class GemmaQuantizationConfig(QuantizationConfigMixin):
    """`module_quant_configs`: pattern -> {"num_bits": n}, tried in order, for modules that are not of `num_bits`."""

    num_bits: int = 4
    quantize_embeddings: bool = False
    module_quant_configs: dict[str, dict[str, Any]] | None = None
    modules_to_not_convert: list[str] | None = None

    method: ClassVar[str] = "gemma"

    def post_init(self) -> None:
        check_choice(self, "num_bits", (2, 4, 8))
        check_flags(self, "quantize_embeddings")
        check_objects(self, "module_quant_configs")
        check_names(self, "modules_to_not_convert")


@register_quantizer("gemma")
class GemmaQuantizer(HfQuantizer):
    """Gemma's layouts."""

    requires_calibration = True
