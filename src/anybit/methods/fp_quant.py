"""FP-Quant. NVFP4 or MXFP4 codes of weights, and of inputs, after a block Hadamard rotation.

Stored: forward_hadamard_matrix and backward_hadamard_matrix bfloat16 [n, n], weight_global_scale and act_global_scale [1], bias;
and qweight uint8 [out, in/2] with scales uint8, or dqweight bfloat16 [out, in] (rotated basis, pseudoquantization), or weight
bfloat16 [out, in] (original basis, store_master_weights).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from anybit._lazy import LazyModule
from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.config import QuantizationConfigMixin
from anybit.quantizers.options import check_choice, check_flags, check_names, refuse
from anybit.quantizers.registry import register_quantization_config, register_quantizer

if TYPE_CHECKING:
    from anybit.methods import _fp_quant_layouts as layouts
    from anybit.weight import Layout, ModuleInfo
else:
    layouts = LazyModule("anybit.methods._fp_quant_layouts")

# forward_dtype -> (forward methods, sizes of the rotation, the first one being the default)
FORWARD = {"nvfp4": (("abs_max",), (16, 32, 64, 128)), "mxfp4": (("abs_max", "quest"), (32, 64, 128))}


@register_quantization_config("fp_quant")
@dataclass(eq=False, repr=False)
class FPQuantConfig(QuantizationConfigMixin):
    """`forward_dtype` is the stored format; `backward_dtype` matters to training only."""

    forward_dtype: str = "nvfp4"
    forward_method: str = "abs_max"
    backward_dtype: str = "bf16"
    store_master_weights: bool = False
    hadamard_group_size: int | None = None
    pseudoquantization: bool = False
    transform_init: str = "hadamard"
    modules_to_not_convert: list[str] | None = None

    method: ClassVar[str] = "fp_quant"
    schemes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "fp-quant-nvfp4": {},
        "fp-quant-mxfp4": {"forward_dtype": "mxfp4"},
        "fp-quant-quest": {"forward_dtype": "mxfp4", "forward_method": "quest"},
    }

    def post_init(self) -> None:
        check_choice(self, "forward_dtype", FORWARD)
        methods, sizes = FORWARD[self.forward_dtype]
        if self.hadamard_group_size is None:
            self.hadamard_group_size = sizes[0]
        check_choice(self, "forward_method", methods)
        check_choice(self, "hadamard_group_size", sizes)
        check_choice(self, "backward_dtype", ("bf16", "mxfp8", "mxfp4"))
        if self.backward_dtype != "bf16" and self.forward_dtype != "mxfp4":
            raise refuse(self, "backward_dtype", f"with forward_dtype {self.forward_dtype!r} it must be 'bf16'")
        check_choice(self, "transform_init", ("hadamard", "identity", "gsr"))
        check_flags(self, "store_master_weights", "pseudoquantization")
        check_names(self, "modules_to_not_convert")
        if self.modules_to_not_convert is None:
            self.modules_to_not_convert = ["lm_head"]


@register_quantizer("fp_quant")
class FPQuantHfQuantizer(HfQuantizer):
    """FP-Quant's layouts. Modules not to convert are named by the ends of their names."""

    layouts_available = True

    def begin(self, model: Any, slots: Sequence[Any]) -> None:
        super().begin(model, slots)
        self.skip_reasons = {
            slot.module: f"{name!r} is among the modules not to convert"
            for slot in slots
            for name in self.modules_to_not_convert
            if slot.module.endswith(name)
        }

    def layout_of(self, module: ModuleInfo, stored: Mapping[str, Any], peek: Callable[[str], Any]) -> Layout | None:
        return layouts.layout_of(self, module, stored)

    def layout_for(self, module: ModuleInfo) -> Layout | None:
        size = self.quantization_config.hadamard_group_size
        if module.kind != "linear":
            self.skip_reasons.setdefault(module.name, "FP-Quant quantizes linear layers only")
        elif module.shape[1] % size:
            self.skip_reasons.setdefault(
                module.name, f"{module.shape[1]} inputs are no multiple of {size}, the rotation's size"
            )
        if not self.should_convert(module):
            return None
        return layouts.layout_for(self.quantization_config, module)
