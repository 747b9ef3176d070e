"""EETQ. int8 rows, stored in the order in which a CUTLASS kernel reads them.

Stored: weight int8 [in, out] (permuted, interleaved bytes, each plus 128), weight_scales float16 [out], bias float16 [out].
W[o, i] = weight_scales[o] * code[o, i]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from anybit._lazy import LazyModule
from anybit.errors import NotRepresentable
from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.config import QuantizationConfigMixin
from anybit.quantizers.options import check_choice, check_names
from anybit.quantizers.registry import register_quantization_config, register_quantizer

if TYPE_CHECKING:
    from anybit.methods import _eetq_layout as layouts
    from anybit.weight.layout import Layout, ModuleInfo
else:  # needed for tensors, not to select the backend
    layouts = LazyModule("anybit.methods._eetq_layout")

TILE = 64  # inputs and outputs that are laid out together, but on Volta
SCALES = ("float16", "bfloat16", "float32")


@register_quantization_config("eetq")
@dataclass(eq=False, repr=False)
class EetqConfig(QuantizationConfigMixin):
    """int8 weights only. `gpu_arch`: the compute capability the bytes are laid out for, 70 or 75 to 89; None finds out."""

    weights: str = "int8"
    modules_to_not_convert: list[str] | None = None
    gpu_arch: int | None = None

    method: ClassVar[str] = "eetq"
    loading_attributes: ClassVar[tuple[str, ...]] = ("gpu_arch",)
    optional: ClassVar[tuple[str, ...]] = ("gpu_arch",)
    schemes: ClassVar[Mapping[str, Mapping[str, Any]]] = {"eetq": {}}

    def post_init(self) -> None:
        check_choice(self, "weights", ("int8",))
        check_choice(self, "gpu_arch", (None, 70, 75, 80, 86, 89))
        check_names(self, "modules_to_not_convert")


@register_quantizer("eetq")
class EetqHfQuantizer(HfQuantizer):
    """EETQ's layout. Nothing in a checkpoint says for which GPU it was made, but its numbers do."""

    layouts_available = True

    def __init__(self, quantization_config: QuantizationConfigMixin, *, pre_quantized: bool = True, **kwargs: Any):
        super().__init__(quantization_config, pre_quantized=pre_quantized, **kwargs)
        arch = self.quantization_config.gpu_arch
        self.volta: bool | None = None if arch is None else arch == 70

    # --- reading ---

    def layout_of(self, module: ModuleInfo, stored: Mapping[str, Any], peek: Callable[[str], Any]) -> Layout | None:
        weight, scales = stored.get("weight"), stored.get("weight_scales")
        if scales is None and getattr(weight, "dtype", None) != "int8":
            return None
        if module.kind not in ("linear", "router"):
            raise NotRepresentable(f"{module.name} is a packed {module.kind}; EETQ's layout is one of linear layers")
        dtype = scales.dtype if scales is not None and scales.dtype in SCALES else "float16"
        layout = layouts.EetqLayout(module.shape, module.dtype, scale_dtype=dtype)
        if weight is None or (weight.dtype, tuple(weight.shape)) != layout.specs()["weight"]:
            return layout  # whoever compares tensors and layout says what is wrong
        if self.volta is None:
            self.volta = self._is_volta(module, peek("weight"))
        if not self.volta and any(size % TILE for size in module.shape):
            raise NotRepresentable(
                f"tensor {weight.name!r} in {weight.file}: {module.shape[1]} inputs and {module.shape[0]} outputs are no "
                f"multiples of {TILE}, which the layout for sm75 to sm89 needs. If it was made on Volta, say gpu_arch=70"
            )
        return layouts.EetqLayout(module.shape, module.dtype, self.volta, dtype)

    def _is_volta(self, module: ModuleInfo, weight: Any) -> bool:
        """Which of the two orders gives every output a code at the end of the range, as EETQ's scales do."""
        if any(size % TILE for size in module.shape):
            return True
        usual, volta = (layouts.rows_that_reach_the_end(weight, order) for order in (False, True))
        if volta > usual:
            self.decide(
                f"bytes lie as Volta (sm70) reads them: {volta:.0%} of the outputs then have a code of 127 or -128, "
                f"{usual:.0%} in the order for sm75 to sm89",
                module.name,
            )
        return volta > usual

    # --- creating ---

    def layout_for(self, module: ModuleInfo) -> Layout | None:
        if not self.should_convert(module):
            return None
        if module.kind != "linear":
            self.skip_reasons[module.name] = f"EETQ has no form for a {module.class_name} ({module.kind})"
            return None
        if not self.volta and any(size % TILE for size in module.shape):
            self.skip_reasons[module.name] = (
                f"EETQ lays out {TILE} inputs and outputs together, its shape is {module.shape}"
            )
            return None
        if module.shape[0] * module.shape[1] % 4:
            self.skip_reasons[module.name] = f"EETQ lays out 4 bytes together, its shape is {module.shape}"
            return None
        return layouts.EetqLayout(module.shape, module.dtype, bool(self.volta))
