"""SpQR. 3-bit groups whose scales and zero points are 3-bit groups again, plus single outliers that are added.

Stored: dense_weights int64 (one word for each row of a 16 x 16 tile: codes of weight, scale and zero, and a piece of the tile's
four halves), row_offsets int32, col_vals int32 (column, float16 value), in_perm int32 (two input numbers in a word).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from anybit._lazy import LazyModule
from anybit.errors import NotRepresentable
from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.config import QuantizationConfigMixin
from anybit.quantizers.options import check_choice, check_names, check_type, parameter_owners
from anybit.quantizers.registry import register_quantization_config, register_quantizer

if TYPE_CHECKING:
    from anybit.methods import _spqr_layout as layouts
    from anybit.weight.layout import Layout, ModuleInfo
else:  # needed for tensors, not to select the backend
    layouts = LazyModule("anybit.methods._spqr_layout")


@register_quantization_config("spqr")
@dataclass(eq=False, repr=False)
class SpQRConfig(QuantizationConfigMixin):
    """`shapes` holds the length of each stored tensor; `modules_to_not_convert` holds parameter names."""

    bits: int = 3
    beta1: int = 16
    beta2: int = 16
    shapes: dict[str, int] | None = None
    modules_to_not_convert: list[str] | None = None

    method: ClassVar[str] = "spqr"

    def post_init(self) -> None:
        for name in ("bits", "beta1", "beta2"):
            check_type(self, name, int)
        for name, only in (("bits", 3), ("beta1", 16), ("beta2", 16)):
            check_choice(self, name, (only,))
        self.shapes = {} if self.shapes is None else self.shapes
        check_type(self, "shapes", dict)
        check_names(self, "modules_to_not_convert")


@register_quantizer("spqr")
class SpQRHfQuantizer(HfQuantizer):
    """SpQR's layout. What is quantized is told by the stored tensors: `dense_weights` or `weight`."""

    requires_calibration = True
    layouts_available = False

    def skipped_modules(self) -> Sequence[str] | None:
        return parameter_owners(self.quantization_config.modules_to_not_convert)

    def layout_of(self, module: ModuleInfo, stored: Mapping[str, Any], peek: Callable[[str], Any]) -> Layout | None:
        if not {"dense_weights", "col_vals"} & set(stored):
            return None
        if module.kind != "linear":
            raise NotRepresentable(f"{module.name} is a packed {module.kind}; SpQR's layout is one of linear layers")
        rows, columns = module.shape
        if rows % layouts.TILE or columns % layouts.TILE or columns > 1 << 15:
            raise NotRepresentable(
                f"{module.name} has shape {module.shape}; SpQR is read in whole tiles of {layouts.TILE} x {layouts.TILE} (the "
                "last tile of other shapes lacks scales) and up to 32768 inputs (columns of outliers are 16-bit numbers)"
            )
        offsets, outliers, order = (stored.get(name) for name in ("row_offsets", "col_vals", "in_perm"))
        return layouts.SpqrLayout(
            module.shape,
            module.dtype,
            outliers.shape[0] if outliers is not None and len(outliers.shape) == 1 else 0,
            offsets is not None and tuple(offsets.shape) == (rows // layouts.TILE + 1,),
            "absent" if order is None else "empty" if tuple(order.shape) == (0,) else "stored",
        )
