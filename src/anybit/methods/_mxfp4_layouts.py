"""MXFP4's layout, and that of dense numbers which transformers stores under its names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from anybit.algorithms import minifloat
from anybit.methods._float_evidence import contradiction, missing
from anybit.methods._scaled_floats import ScaledFloatLayout, check_form, require_scale
from anybit.weight.layout import Layout, ModuleInfo, meta
from anybit.weight.nodes import Transpose, Values
from anybit.weight.weight import Weight

if TYPE_CHECKING:
    from torch import Tensor

GROUP = 32
FLOATS = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Mxfp4Layout(ScaledFloatLayout):
    """E2M1 codes and a power of two for each 32 inputs. `flat`: groups are not an axis of their own."""

    levels: str = "e2m1"
    block: tuple[int, int] = (1, GROUP)
    weight_name: str = "_blocks"
    weight_dtype: str = "uint8"
    scale_name: str = "_scales"
    scale_dtype: str = "uint8"
    flat: bool = False

    def weight_spec(self) -> tuple[int, ...]:
        *lead, columns = self.shape
        return (*lead, columns // 2) if self.flat else (*lead, columns // GROUP, GROUP // 2)

    def algorithm_options(self) -> dict[str, object]:
        return {"rule": self.scales, "ties": "away", "through": ("bfloat16",)}

    def scales(self, largest: Tensor) -> minifloat.Scales:
        """max / 6, rounded up to a power of two; byte 0 for an empty block, whose codes are 0."""
        exponents = minifloat.e8m0(largest / 6.0, "ceil")
        powers = minifloat.e8m0_numbers(exponents)
        return minifloat.Scales(powers, divisor=powers.masked_fill(exponents == 0, 0.0))


@dataclass(frozen=True)
class DenseBlocksLayout(Layout):
    """Dense numbers [experts, in, out] under the name of packed ones."""

    stored: str = "bfloat16"

    @property
    def spec(self) -> tuple[int, ...]:
        experts, rows, columns = self.shape
        return (experts, columns, rows)

    def decode(self, tensors: Mapping[str, Tensor]) -> Weight:
        numbers = self.take(tensors, "_blocks", self.stored, self.spec)
        for expert in numbers:
            require_scale("_blocks", expert)
        return Weight(Transpose(Values(numbers)), self.dtype)

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        tree: Any = check_form(weight, self)
        return {"_blocks": tree.child.tensor}

    def scheme(self) -> Weight:
        return Weight(Transpose(Values(meta(self.stored, *self.spec))), self.dtype)


def layout_of(module: ModuleInfo, stored: Mapping[str, Any]) -> Layout | None:
    """The layout of stored experts; None for tensors that are none."""
    blocks = stored.get("_blocks")
    if blocks is None:
        if "_scales" in stored:
            raise missing(module, "_blocks", "its scales are")
        return None
    if blocks.dtype in FLOATS and "_scales" not in stored:
        return DenseBlocksLayout(module.shape, module.dtype, blocks.dtype)
    if module.shape[-1] % GROUP:
        raise contradiction(module, stored, ("_blocks", "_scales"), f"MXFP4 with groups of {GROUP} inputs")
    return Mxfp4Layout(module.shape, module.dtype, flat=len(blocks.shape) == 3)
