"""HIGGS. Pairs of inputs from a grid that suits Gaussian numbers, after a Hadamard rotation; stored in FLUTE's order.

Stored, in padded to a multiple of hadamard_size: weight int16 [out*bits/16, in] (the order depends on
tune_metadata[module].template_id), scales [out, in/group_size], tables [2**bits], tables2 [2**bits, 2**bits, 2], bias [out].
W = (tables2[pair of codes] * scale) rotated back by the normalised Sylvester matrix in runs of hadamard_size
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.config import QuantizationConfigMixin
from anybit.quantizers.options import check_choice, check_names, check_objects, check_positive, refuse
from anybit.quantizers.registry import register_quantization_config, register_quantizer


@register_quantization_config("higgs")
@dataclass(eq=False, repr=False)
class HiggsConfig(QuantizationConfigMixin):
    """`p` inputs share a grid point; `tune_metadata` tells, for each module, the order its codes lie in."""

    bits: int = 4
    p: int = 2
    modules_to_not_convert: list[str] | None = None
    hadamard_size: int = 512
    group_size: int = 256
    tune_metadata: dict[str, Any] | None = None

    method: ClassVar[str] = "higgs"

    def post_init(self) -> None:
        check_choice(self, "bits", (2, 3, 4))
        check_choice(self, "p", (1, 2))
        check_choice(self, "group_size", (64, 128, 256))
        check_positive(self, "hadamard_size")
        check_names(self, "modules_to_not_convert")
        check_objects(self, "tune_metadata")
        if self.hadamard_size % self.group_size:
            raise refuse(self, "hadamard_size", f"it must be a multiple of group_size, {self.group_size}")
        if self.tune_metadata is None:
            self.tune_metadata = {}


@register_quantizer("higgs")
class HiggsHfQuantizer(HfQuantizer):
    """HIGGS's layout."""
