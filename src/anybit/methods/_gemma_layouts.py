"""How Gemma's checkpoints store one weight, and their static rounding of inputs and outputs.

Rows are bit streams, lowest bits first, of codes plus 2^(bits-1); 8-bit codes are plain int8. For 4 bits:

    byte[m]:  hhhhllll      l = code[2m] + 8      h = code[2m + 1] + 8

Turning over the top bit of every code makes it two's complement. What fills up the last byte of a row is kept as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from anybit._lazy import torch
from anybit.methods._words import fitted, require_finite
from anybit.weight import packing
from anybit.weight.activation import Activation, Product, activation_rule
from anybit.weight.layout import Layout, meta
from anybit.weight.nodes import Codes, Grid, Values
from anybit.weight.weight import Weight

if TYPE_CHECKING:
    from torch import Tensor

INPUT, OUTPUT = "input_activation_scale", "output_activation_scale"
TOP_BITS = {2: 0xAA, 4: 0x88, 8: 0}


def bytes_in_row(columns: int, bits: int) -> int:
    """Bytes that hold a row of the weight."""
    return packing.row_bytes(columns, bits)


@dataclass(frozen=True)
class GemmaLayout(Layout):
    """`code_name`, `scale_name`: what the tensors are called; `blocks`: scales of a row. `ranges`: names of the stored static
    scales; `rounds`: whether one of them is not 0, which would mean that nothing is rounded.
    """

    bits: int = 4
    code_name: str = "weight"
    scale_name: str = "weight_scale"
    stored_as: str = "uint8"
    scale_dtype: str = "float32"
    range_dtypes: tuple[str, ...] = ()
    blocks: int = 1
    ranges: tuple[str, ...] = ()
    rounds: bool = False

    algorithm: ClassVar[str | None] = "rtn"

    def algorithm_options(self) -> dict[str, object]:
        top = float((1 << (self.bits - 1)) - 1)

        def spanning(low: Tensor, high: Tensor) -> dict[str, Tensor]:
            scale = torch.maximum(-low, high) / top
            return {"scale": torch.where(scale > 0, scale, 1)}

        return {"ranges": spanning, "as_stored": True}

    def _weight(self, packed: Tensor, scale: Tensor, ranges: Mapping[str, Tensor]) -> Weight:
        columns = self.shape[1]
        grid = Grid(Codes(packed, self.bits, columns, signed=True), Values(scale), block=(1, columns // self.blocks))
        if not self.rounds:
            return Weight(grid, self.dtype, extras=dict(ranges))
        activation = Activation(
            "gemma_static", granularity="tensor", names=tuple(ranges), tensors=tuple(ranges.values())
        )
        return Weight(grid, self.dtype, activation)

    def scheme(self) -> Weight:
        rows, columns = self.shape
        ranges = {name: meta(dtype) for name, dtype in zip(self.ranges, self.range_dtypes, strict=True)}
        packed = meta("uint8", rows, bytes_in_row(columns, self.bits))
        return self._weight(packed, meta(self.scale_dtype, rows, self.blocks), ranges)

    def specs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        rows, columns = self.shape
        return {
            self.code_name: (self.stored_as, (rows, bytes_in_row(columns, self.bits))),
            self.scale_name: (self.scale_dtype, (rows, self.blocks)),
            **{name: (dtype, ()) for name, dtype in zip(self.ranges, self.range_dtypes, strict=True)},
        }

    def decode(self, tensors: Mapping[str, Tensor]) -> Weight:
        found = {name: self.take(tensors, name, *spec) for name, spec in self.specs().items()}
        scale = require_finite(self.scale_name, found[self.scale_name])
        ranges = {name: require_finite(name, found[name]) for name in self.ranges}
        return self._weight(found[self.code_name].view(torch.uint8) ^ TOP_BITS[self.bits], scale, ranges)

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        grid: Any = fitted(weight, self)
        words = grid.codes.packed ^ TOP_BITS[self.bits]
        stored = {self.code_name: words.view(getattr(torch, self.stored_as)), self.scale_name: grid.scale.tensor}
        for name, dtype in zip(self.ranges, self.range_dtypes, strict=True):
            if self.rounds:
                assert weight.activation is not None
                stored[name] = weight.activation[name]
            elif name in weight.extras:
                stored[name] = weight.extras[name]
            else:  # a weight that was just made: nothing is rounded
                stored[name] = torch.zeros((), dtype=getattr(torch, dtype), device=words.device)
        return stored


@activation_rule("gemma_static")
def gemma_static(x: Tensor, weight: Weight, bias: Tensor | None, product: Product) -> Tensor:
    """Inputs and outputs in 256 steps of a stored size, in the dtype of the input; a step of 0 leaves them as they are."""
    activation = weight.activation
    assert activation is not None
    steps = dict(zip(activation.names, activation.tensors, strict=True))
    y = product(_rounded(x, steps.get(INPUT)))
    y = (y if bias is None else y + bias.to(torch.float32)).to(x.dtype)
    return _rounded(y, steps.get(OUTPUT))


def _rounded(x: Tensor, step: Tensor | None) -> Tensor:
    if step is None:
        return x
    step = step.to(x.dtype)
    safe = torch.where(step != 0, step, torch.ones_like(step))
    return torch.where(step != 0, (x / safe).round().clamp(-128, 127) * safe, x)
