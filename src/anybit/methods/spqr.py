"""SpQR. 3-bit groups whose scales and zero points are 3-bit groups again, plus single outliers that are added.

Stored: dense_weights int64 (one word for each row of a 16 x 16 tile: codes of weight, scale and zero, and a piece of the tile's
four halves), row_offsets int32, col_vals int32 (column, float16 value), in_perm int32 (two input numbers in a word).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from anybit._lazy import LazyModule
from anybit.errors import MissingTensor, NotRepresentable, ShapeMismatch
from anybit.methods._calibrated import CalibratedQuantizer
from anybit.quantizers.config import QuantizationConfigMixin
from anybit.quantizers.options import check_choice, check_names, check_type, parameter_owners
from anybit.quantizers.registry import register_quantization_config, register_quantizer

if TYPE_CHECKING:
    from anybit.methods import _spqr_layout as layouts
    from anybit.weight.layout import Layout, ModuleInfo
else:  # needed for tensors, not to select the backend
    layouts = LazyModule("anybit.methods._spqr_layout")

OUTLIERS = 0.01  # of the weights, when a checkpoint is made


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
    schemes: ClassVar[Mapping[str, Mapping[str, Any]]] = {"spqr": {}}

    def post_init(self) -> None:
        for name in ("bits", "beta1", "beta2"):
            check_type(self, name, int)
        for name, only in (("bits", 3), ("beta1", 16), ("beta2", 16)):
            check_choice(self, name, (only,))
        self.shapes = {} if self.shapes is None else self.shapes
        check_type(self, "shapes", dict)
        check_names(self, "modules_to_not_convert")


@register_quantizer("spqr")
class SpQRHfQuantizer(CalibratedQuantizer):
    """SpQR's layout. What is quantized is told by the stored tensors: `dense_weights` or `weight`."""

    layouts_available = True
    calibrated_algorithm = "spqr"

    def model_config(self, config: dict[str, Any]) -> dict[str, Any]:
        self.quantization_config.modules_to_not_convert = self.left_dense()
        return super().model_config(config)

    def layout_for(self, module: ModuleInfo) -> Layout | None:
        if not self.can_be_calibrated(module):
            return None
        rows, columns = module.shape
        if rows % layouts.TILE or columns % 2 or columns > 1 << 15:
            self.skip_reasons[module.name] = (
                f"SpQR needs a multiple of {layouts.TILE} outputs and an even number of inputs up to 32768, its shape is "
                f"{module.shape}"
            )
            return None
        layout = layouts.SpqrLayout(module.shape, module.dtype, round(OUTLIERS * rows * columns))
        for own, (_, shape) in layout.specs().items():
            self.quantization_config.shapes[f"{module.name}.{own}.shape"] = shape[0]
        return layout

    def skipped_modules(self) -> Sequence[str] | None:
        return parameter_owners(self.quantization_config.modules_to_not_convert)

    def layout_of(self, module: ModuleInfo, stored: Mapping[str, Any], peek: Callable[[str], Any]) -> Layout | None:
        if not {"dense_weights", "col_vals"} & set(stored):
            return None
        if module.kind != "linear":
            raise NotRepresentable(f"{module.name} is a packed {module.kind}; SpQR's layout is one of linear layers")
        rows, columns = module.shape
        if rows % layouts.TILE or columns % 2 or columns > 1 << 15:
            raise NotRepresentable(
                f"{module.name} has shape {module.shape}; SpQR is read with a multiple of {layouts.TILE} outputs (the last "
                "tiles of other numbers lack scales) and an even number of inputs up to 32768 (outliers name them in 16 bits)"
            )
        self._check_lengths(module, stored)
        offsets, outliers, order = (stored.get(name) for name in ("row_offsets", "col_vals", "in_perm"))
        return layouts.SpqrLayout(
            module.shape,
            module.dtype,
            outliers.shape[0] if outliers is not None and len(outliers.shape) == 1 else 0,
            offsets is not None and tuple(offsets.shape) == (rows // layouts.TILE + 1,),
            "absent" if order is None else "empty" if tuple(order.shape) == (0,) else "stored",
        )

    def _check_lengths(self, module: ModuleInfo, stored: Mapping[str, Any]) -> None:
        """What `shapes` lists of the module is there, and as long as it says."""
        for own in ("dense_weights", "row_offsets", "col_vals", "in_perm"):
            listed = self.quantization_config.shapes.get(f"{module.name}.{own}.shape")
            if listed in (None, 0) and own not in stored:
                continue  # decode says what it cannot do without
            if own not in stored:
                raise MissingTensor(
                    f"tensor '{module.name}.{own}' is not in the checkpoint, but the configuration's 'shapes' says that it has "
                    f"{listed} entries; the file is incomplete, get it again"
                )
            if listed is not None and tuple(stored[own].shape) != (listed,):
                raise ShapeMismatch(
                    f"tensor '{module.name}.{own}' has shape {tuple(stored[own].shape)}; the configuration's 'shapes' says "
                    f"{listed}. They belong to different checkpoints, or one is damaged"
                )
