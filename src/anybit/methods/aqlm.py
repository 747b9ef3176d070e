"""AQLM. A run of inputs is the sum of one vector from each of several codebooks, times a scale of its output row.

Stored, out = out_group * rows, in = in_group * columns: codes int8 / int16 / int32 [rows, columns, codebooks] (unsigned numbers
in two's complement), codebooks [codebooks, 2**nbits, out_group, in_group], scales [rows, 1, 1, 1], bias [out].
W[o*out_group + a, i*in_group + b] = scales[o] * sum over k of codebooks[k, codes[o, i, k], a, b]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from anybit._lazy import LazyModule
from anybit.errors import NotRepresentable, ShapeMismatch
from anybit.methods._calibrated import CalibratedQuantizer
from anybit.quantizers.config import QuantizationConfigMixin
from anybit.quantizers.options import check_names, check_positive, parameter_owners, refuse
from anybit.quantizers.registry import register_quantization_config, register_quantizer

if TYPE_CHECKING:
    from anybit.methods import _aqlm_layout as layouts
    from anybit.weight.layout import Layout, ModuleInfo
else:  # needed for tensors, not to select the backend
    layouts = LazyModule("anybit.methods._aqlm_layout")

NUMBERS = ("float16", "bfloat16", "float32")
WIDEST = 24  # bits of a code; a larger table would be larger than any weight


@register_quantization_config("aqlm")
@dataclass(eq=False, repr=False)
class AqlmConfig(QuantizationConfigMixin):
    """Shape of the code vectors. `linear_weights_not_to_quantize` holds parameter names, ending in ".weight"."""

    in_group_size: int = 8
    out_group_size: int = 1
    num_codebooks: int = 1
    nbits_per_codebook: int = 16
    linear_weights_not_to_quantize: list[str] | None = None

    method: ClassVar[str] = "aqlm"
    schemes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        f"aqlm-{books}x{bits}": {"num_codebooks": books, "nbits_per_codebook": bits}
        for books, bits in ((1, 16), (2, 8), (3, 8))
    }

    def post_init(self) -> None:
        check_positive(self, "in_group_size", "out_group_size", "num_codebooks", "nbits_per_codebook")
        check_names(self, "linear_weights_not_to_quantize")
        if self.linear_weights_not_to_quantize is None:
            self.linear_weights_not_to_quantize = []


@register_quantizer("aqlm")
class AqlmHfQuantizer(CalibratedQuantizer):
    """AQLM's layout. What is quantized is told by the stored tensors: `codes` or `weight`."""

    layouts_available = True
    calibrated_algorithm = "aqlm"

    def skipped_modules(self) -> Sequence[str] | None:
        listed = self.quantization_config.linear_weights_not_to_quantize
        return parameter_owners(listed) if listed or self.pre_quantized else None

    def model_config(self, config: dict[str, Any]) -> dict[str, Any]:
        self.quantization_config.linear_weights_not_to_quantize = self.left_dense()
        return super().model_config(config)

    def layout_for(self, module: ModuleInfo) -> Layout | None:
        if not self.can_be_calibrated(module):
            return None
        config, (rows, columns) = self.quantization_config, module.shape
        if config.nbits_per_codebook > WIDEST:
            raise refuse(config, "nbits_per_codebook", f"a codebook has at most 2**{WIDEST} entries")
        if rows % config.out_group_size or columns % config.in_group_size:
            self.skip_reasons[module.name] = (
                f"AQLM has no form for a shape of {module.shape}, no whole number of tiles of {config.out_group_size} x "
                f"{config.in_group_size}"
            )
            return None
        return layouts.AqlmLayout(
            module.shape,
            module.dtype,
            config.num_codebooks,
            config.nbits_per_codebook,
            config.out_group_size,
            config.in_group_size,
            module.dtype if module.dtype in NUMBERS[:2] else "float16",
        )

    def layout_of(self, module: ModuleInfo, stored: Mapping[str, Any], peek: Callable[[str], Any]) -> Layout | None:
        if not {"codes", "codebooks"} & set(stored):
            return None
        if module.kind != "linear":
            raise NotRepresentable(f"{module.name} is a packed {module.kind}; AQLM's layout is one of linear layers")
        config = self.quantization_config
        if config.nbits_per_codebook > WIDEST:
            raise NotRepresentable(
                f"{module.name}: codes of {config.nbits_per_codebook} bits name more vectors than any weight has; at most "
                f"{WIDEST} bits are read. Check nbits_per_codebook in config.json"
            )
        rows, columns = module.shape
        if rows % config.out_group_size or columns % config.in_group_size:
            raise ShapeMismatch(
                f"{module.name} has shape {module.shape}, no whole number of tiles of {config.out_group_size} x "
                f"{config.in_group_size} (out_group_size, in_group_size); config.json and tensors contradict each other"
            )
        numbers, scales = stored.get("codebooks"), stored.get("scales")
        return layouts.AqlmLayout(
            module.shape,
            module.dtype,
            config.num_codebooks,
            config.nbits_per_codebook,
            config.out_group_size,
            config.in_group_size,
            numbers.dtype if numbers is not None and numbers.dtype in NUMBERS else "float16",
            scales is not None and tuple(scales.shape[1:2]) == (columns // config.in_group_size,) != (1,),
        )
