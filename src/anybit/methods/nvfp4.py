"""NVFP4 as transformers makes it while loading: E2M1 codes, an E4M3 scale for each 16 inputs, a float scale for the matrix.

transformers stores none of it: NVFP4 on disk is compressed-tensors or modelopt. Only linears without a bias whose sides are
multiples of 16 are quantized.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.config import QuantizationConfigMixin
from anybit.quantizers.options import check_names
from anybit.quantizers.registry import register_quantization_config, register_quantizer


@register_quantization_config("nvfp4")
@dataclass(eq=False, repr=False)
class NVFP4Config(QuantizationConfigMixin):
    """Which modules stay as they are."""

    modules_to_not_convert: list[str] | None = None

    method: ClassVar[str] = "nvfp4"

    def post_init(self) -> None:
        check_names(self, "modules_to_not_convert")


@register_quantizer("nvfp4")
class NVFP4HfQuantizer(HfQuantizer):
    """NVFP4's layout."""
