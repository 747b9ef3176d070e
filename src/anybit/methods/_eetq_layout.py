"""How EETQ stores one weight: int8 codes in the order in which a CUTLASS kernel of one GPU generation loads them.

Codes Q[r, c] of input r and output c, k inputs and n outputs, become bytes in four steps; Volta (sm70) has only the last:

    rows      every 16 inputs in the order 0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15: what one tensor core instruction wants
    turn      outputs first: the k codes of an output lie together
    pairs     two outputs share a run: 64 codes of the first, 64 of the second, the next 64 of the first, ...
    bytes     code + 128, and the middle two of every 4 bytes change places (conversion to float16 takes them two by two)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from anybit._lazy import torch
from anybit.methods._words import fitted, require_finite
from anybit.weight.layout import Layout, meta
from anybit.weight.nodes import Codes, Grid, Values
from anybit.weight.weight import Weight

if TYPE_CHECKING:
    from torch import Tensor

ROWS = (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)
PLACE_OF_ROW = tuple(sorted(range(16), key=lambda place: ROWS[place]))
MIDDLE = (0, 2, 1, 3)
TILE = 64


@dataclass(frozen=True)
class EetqLayout(Layout):
    """`volta`: made for sm70, not for sm75 to sm89."""

    volta: bool = False
    scale_dtype: str = "float16"

    algorithm = "rtn"

    def algorithm_options(self) -> dict[str, object]:
        return {"ranges": ranges, "ties": "away"}

    def specs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        rows, columns = self.shape
        return {"weight": ("int8", (columns, rows)), "weight_scales": (self.scale_dtype, (rows,))}

    def decode(self, tensors: Mapping[str, Tensor]) -> Weight:
        stored, scales = (self.take(tensors, name, *spec) for name, spec in self.specs().items())
        codes = Codes(codes_of(stored, self.volta).view(torch.uint8), 8, self.shape[1], signed=True)
        return self._weight(codes, Values(require_finite("weight_scales", scales)[:, None]))

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        grid = fitted(weight, self)
        assert isinstance(grid.codes, Codes)
        assert isinstance(grid.scale, Values)
        return {"weight": bytes_of(grid.codes.packed, self.volta), "weight_scales": grid.scale.tensor[:, 0]}

    def scheme(self) -> Weight:
        rows, columns = self.shape
        codes = Codes(meta("uint8", rows, columns), 8, columns, signed=True)
        return self._weight(codes, Values(meta(self.scale_dtype, rows, 1)))

    def _weight(self, codes: Codes, scale: Values) -> Weight:
        return Weight(Grid(codes, scale, block=(1, self.shape[1])), self.dtype)


def codes_of(stored: Tensor, volta: bool) -> Tensor:
    """Stored int8 [in, out] -> the codes they stand for, int8 [out, in]."""
    inputs, outputs = stored.shape
    plain = _swapped(stored)
    if volta:
        return plain.view(inputs, outputs).T.contiguous()
    turned = plain.view(outputs // 2, inputs // TILE, 2, TILE).transpose(1, 2)
    return turned.reshape(outputs, inputs // 16, 16)[:, :, list(PLACE_OF_ROW)].view(outputs, inputs)


def bytes_of(codes: Tensor, volta: bool) -> Tensor:
    """Inverse of `codes_of`; codes as uint8 or int8."""
    outputs, inputs = codes.shape
    if volta:
        return _swapped(codes.T.contiguous()).view(inputs, outputs)
    turned = codes.view(outputs, inputs // 16, 16)[:, :, list(ROWS)].view(outputs // 2, 2, inputs // TILE, TILE)
    return _swapped(turned.transpose(1, 2).contiguous()).view(inputs, outputs)


def _swapped(numbers: Tensor) -> Tensor:
    """The last step, which is its own inverse: the top bit flipped is 128 added. int8, flat."""
    flat = numbers.reshape(-1).view(torch.uint8) ^ 0x80
    return flat.view(-1, 4)[:, list(MIDDLE)].reshape(-1).view(torch.int8)


def ranges(low: Tensor, high: Tensor) -> dict[str, Tensor]:
    """The largest magnitude over 128, although 128 is no code: a positive one is cut to 127. An empty row gets 1."""
    scale = torch.maximum(-low, high) / 128
    return {"scale": torch.where(scale > 0, scale, 1)}


def rows_that_reach_the_end(stored: Tensor, volta: bool) -> float:
    """Share of outputs with a code of 127 or -128. EETQ's scales make it 1, and any other order of the bytes mixes outputs."""
    numbers = codes_of(stored, volta)
    reached = (numbers == 127) | (numbers == -128)
    return float((reached.any(1) | ~numbers.any(1)).to(torch.float32).mean())
