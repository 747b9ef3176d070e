"""Quark's small floats, with one scale, a scale for each row, or powers of two; and weights that were rounded and kept dense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from anybit._lazy import torch
from anybit.algorithms import minifloat
from anybit.errors import CorruptFile
from anybit.methods._quark_integers import SMALLEST, QuarkLayout
from anybit.methods._quark_states import MX, measured
from anybit.methods._scaled_floats import ScaledFloatLayout, Spec, check_form, require_scale
from anybit.methods._words import require_finite
from anybit.weight.activation import Activation
from anybit.weight.layout import Layout, meta
from anybit.weight.nodes import Node, Scaled, Values
from anybit.weight.weight import Weight

if TYPE_CHECKING:
    from torch import Tensor

MX_OF = {own[0]: own for own in MX.values()}
FP8 = {"float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2"}


@dataclass(frozen=True)
class FloatLayout(ScaledFloatLayout):
    """Small floats by Quark's rules. `mode`: how the exponent of a block's power of two is rounded."""

    mode: str = "even"

    def decode(self, tensors: Mapping[str, Tensor]) -> Weight:
        weight = super().decode(tensors)
        if self.levels == "e5m2":  # the only one here, beside E4M3, that has infinity and NaN
            bad = (tensors["weight"].view(torch.uint8) & 0x7C) == 0x7C
            if bool(bad.any()):
                raise CorruptFile(f"tensor 'weight' holds infinity or NaN ({int(bad.sum())} codes); get the file again")
        return weight

    def measured_inputs(self, low: Tensor, high: Tensor) -> Activation:
        assert self.inputs is not None
        return measured(self.inputs, low, high)

    def algorithm_options(self) -> dict[str, object]:
        return {"rule": self.scales, "through": (self.dtype,), "quotient": "float32" if self._powers else self.dtype}

    @property
    def _powers(self) -> bool:
        return self.scale_dtype == "uint8"

    def scales(self, largest: Tensor) -> minifloat.Scales:
        if not self._powers:
            return self._plain_scales(largest)
        _, exponent, even = MX_OF[self.levels]
        found = minifloat.e8m0(largest, even if self.mode == "even" else self.mode).to(torch.int32) - exponent
        if self.mode != "even":
            found = found.masked_fill(largest == 0, 127 - 23)  # an empty block has the smallest scale
        return minifloat.Scales(minifloat.e8m0_numbers(found.clamp_(0, 254).to(torch.uint8)))

    def _plain_scales(self, largest: Tensor) -> minifloat.Scales:
        """The largest magnitude on the largest number. Quark divides in the weight's dtype, as the scale is in it."""
        dtype = getattr(torch, self.dtype)
        stored = getattr(torch, self.scale_dtype)
        scale = (largest / minifloat.FORMATS[self.levels][2]).to(stored)
        scale = scale.masked_fill(scale == 0, SMALLEST)
        return minifloat.Scales(scale.to(torch.float32), divisor=scale.to(dtype).to(torch.float32))


@dataclass(frozen=True)
class FakeLayout(QuarkLayout):
    """A weight that was rounded and kept dense; its scale says only how."""

    element: str = "bfloat16"

    def weight_spec(self) -> tuple[str, tuple[int, ...]]:
        return self.element, self.shape

    def read(self, weight: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[Node, dict[str, Tensor]]:
        if weight.device.type != "meta":
            require_finite("weight", weight)
        extras = {self.scale[0]: scale}
        if self.zero is not None and zero is not None:
            extras[self.zero[0]] = zero
        return Values(weight), extras

    def write(self, weight: Weight) -> dict[str, Tensor]:
        tree: Any = weight.tree
        return {"weight": tree.tensor, **weight.extras}


@dataclass(frozen=True)
class ProgressiveLayout(Layout):
    """A weight in FP8 whose codes were quantized again, e.g. to int4: what `inner` stores, times the scale of the FP8.

    Stored: weight, weight_scale_2 and weight_zero_point_2 of the inner level, weight_scale of the outer one.
    """

    inner: Layout = Layout((0, 0))  # noqa: RUF009 frozen
    outer: Spec = ("weight_scale", "float32", ())

    def _split(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        names = {"weight_scale_2": "weight_scale", "weight_zero_point_2": "weight_zero_point"}
        return {names.get(name, name): tensor for name, tensor in tensors.items() if name != self.outer[0]}

    def decode(self, tensors: Mapping[str, Tensor]) -> Weight:
        scale = self.take(tensors, *self.outer)
        require_scale(self.outer[0], scale)
        return self._above(self.inner.decode(self._split(tensors)), scale)

    @staticmethod
    def _above(below: Weight, scale: Tensor) -> Weight:
        return replace(below, tree=Scaled(below.tree, Values(scale.reshape(-1, 1))))

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        tree: Any = check_form(weight, self)
        below = self.inner.encode(replace(weight, tree=tree.child))
        names = {"weight_scale": "weight_scale_2", "weight_zero_point": "weight_zero_point_2"}
        found = {names.get(name, name): tensor for name, tensor in below.items()}
        return {**found, self.outer[0]: tree.scale.tensor.reshape(self.outer[2])}

    def scheme(self) -> Weight:
        _, dtype, shape = self.outer
        return self._above(self.inner.scheme(), meta(dtype, *shape))
