"""How AWQ stores one weight. Weights in groups along the input share a scale and a zero point; four arrangements.

             qweight                    qzeros                          scales            (in, out: features)
gemm         int32 [in, out*bits/32]    int32 [groups, out*bits/32]     [groups, out]     4 bits: eight outputs interleaved
gemv         int32 [out, in/8]          int32 [out, width]              [out, 8*width]    padded with zeros to 8*width groups
gemv_fast    int16 [out/4, in]          float16 [8*width, out]          [8*width, out]    zeros are -(scale * zero point)
llm-awq      as gemv_fast, with the zeros called scaled_zeros
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from anybit._lazy import torch
from anybit.methods._words import (
    fitted,
    packed_codes,
    read_codes,
    require_finite,
    require_zeros,
    unpacked_codes,
    word_count,
    write_codes,
)
from anybit.weight import packing
from anybit.weight.layout import Layout, meta
from anybit.weight.nodes import Codes, Grid, Values
from anybit.weight.weight import Weight

if TYPE_CHECKING:
    from torch import Tensor

# nibble n of a gemm word holds output ORDER[n] of its eight; the output j is in nibble NIBBLE_OF[j]
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
NIBBLE_OF = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True)
class AwqLayout(Layout):
    """What the arrangements share. `symmetric`: how zero points are chosen; they are stored in any case."""

    bits: int = 4
    group_size: int = 128
    scale_dtype: str = "float16"
    symmetric: bool = False

    algorithm = "rtn"

    @property
    def groups(self) -> int:
        return self.shape[1] // self.group_size

    @property
    def padded_groups(self) -> int:
        """Groups that the gemv arrangements have room for: a whole number of 32-byte rows."""
        words = -(-self.groups // 8)
        unit = max(1, 128 // self.group_size)
        return 8 * (-(-words // unit) * unit)

    def algorithm_options(self) -> dict[str, object]:
        return {"ranges": partial(ranges, bits=self.bits, symmetric=self.symmetric), "arithmetic": "float16"}

    def scheme(self) -> Weight:
        rows, columns = self.shape
        codes = Codes(meta("uint8", rows, packing.row_bytes(columns, self.bits)), self.bits, columns)
        zero = Codes(meta("uint8", rows, packing.row_bytes(self.groups, self.bits)), self.bits, self.groups)
        return self._weight(codes, meta(self.scale_dtype, rows, self.groups), zero)

    def _weight(self, codes: Codes, scales: Tensor, zero: Codes) -> Weight:
        return Weight(Grid(codes, Values(scales), zero, block=(1, self.group_size)), self.dtype)

    def _parts(self, weight: Weight) -> tuple[Codes, Tensor, Codes]:
        grid = fitted(weight, self)
        assert isinstance(grid.codes, Codes)
        assert isinstance(grid.scale, Values)
        assert isinstance(grid.zero, Codes)
        return grid.codes, grid.scale.tensor, grid.zero


@dataclass(frozen=True)
class AwqGemmLayout(AwqLayout):
    """`interleaved`: every eight outputs are stored in ORDER (4 bits; auto-round also with 5 to 7 bits)."""

    interleaved: bool = True

    def specs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        rows, columns = self.shape
        width = word_count(rows, self.bits)
        return {
            "qweight": ("int32", (columns, width)),
            "qzeros": ("int32", (self.groups, width)),
            "scales": (self.scale_dtype, (self.groups, rows)),
        }

    def decode(self, tensors: Mapping[str, Tensor]) -> Weight:
        found = {name: self.take(tensors, name, *spec) for name, spec in self.specs().items()}
        codes, zero = self._read(found["qweight"], "qweight"), self._read(found["qzeros"], "qzeros")
        return self._weight(codes, require_finite("scales", found["scales"]).T.contiguous(), zero)

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        codes, scales, zero = self._parts(weight)
        return {"qweight": self._write(codes), "qzeros": self._write(zero), "scales": scales.T.contiguous()}

    def _read(self, words: Tensor, name: str) -> Codes:
        """[n, out words] -> codes [out, n]."""
        codes = unpacked_codes(read_codes(words, self.bits, self.shape[0], name))
        codes = codes.unflatten(-1, (-1, 8))[..., NIBBLE_OF].flatten(-2) if self.interleaved else codes
        return packed_codes(codes.T, self.bits, codes.shape[0])

    def _write(self, codes: Codes) -> Tensor:
        stored = unpacked_codes(codes).T
        stored = stored.unflatten(-1, (-1, 8))[..., ORDER].flatten(-2) if self.interleaved else stored
        return write_codes(packed_codes(stored, self.bits, stored.shape[1]))


@dataclass(frozen=True)
class AwqGemvLayout(AwqLayout):
    """Codes of one output lie in natural order."""

    def specs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        rows, columns = self.shape
        return {
            "qweight": ("int32", (rows, columns // 8)),
            "qzeros": ("int32", (rows, self.padded_groups // 8)),
            "scales": (self.scale_dtype, (rows, self.padded_groups)),
        }

    def decode(self, tensors: Mapping[str, Tensor]) -> Weight:
        found = {name: self.take(tensors, name, *spec) for name, spec in self.specs().items()}
        scales = require_finite("scales", found["scales"])
        require_zeros("scales", scales[:, self.groups :])
        codes = read_codes(found["qweight"], 4, self.shape[1], "qweight")
        zero = read_codes(found["qzeros"], 4, self.groups, "qzeros")
        return self._weight(codes, scales[:, : self.groups].contiguous(), zero)

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        codes, scales, zero = self._parts(weight)
        pad = torch.nn.functional.pad
        zero_words = write_codes(zero)
        return {
            "qweight": write_codes(codes),
            "qzeros": pad(zero_words, (0, self.padded_groups // 8 - zero_words.shape[1])),
            "scales": pad(scales, (0, self.padded_groups - self.groups)),
        }


@dataclass(frozen=True)
class AwqGemvFastLayout(AwqLayout):
    """gemv_fast and llm-awq. 64 inputs of four outputs are 256 nibbles:

    nibble = 64 * (output % 4) + 32 * (input % 64 // 32) + 8 * b + 4 * c + a, with 8 * a + 2 * b + c = input % 32
    """

    zeros_name: str = "qzeros"

    def specs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        rows, columns = self.shape
        numbers = (self.scale_dtype, (self.padded_groups, rows))
        return {"qweight": ("int16", (rows // 4, columns)), "scales": numbers, self.zeros_name: numbers}

    def decode(self, tensors: Mapping[str, Tensor]) -> Weight:
        rows, columns = self.shape
        found = {name: self.take(tensors, name, *spec) for name, spec in self.specs().items()}
        words = found.pop("qweight")
        for name, stored in found.items():
            require_zeros(name, require_finite(name, stored)[self.groups :])
            found[name] = stored[: self.groups].T.contiguous()
        nibbles = packing.unpack(packing.words_to_rows(words), 4, 4 * columns)
        parts = nibbles.view(rows // 4, columns // 64, 4, 2, 4, 2, 4)  # output % 4, input // 32, b, c, a
        codes = Codes.of(parts.permute(0, 2, 1, 3, 6, 4, 5).reshape(rows, columns), 4)
        return self._weight(codes, found["scales"], Values(found[self.zeros_name]))

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        rows, columns = self.shape
        grid = fitted(weight, self)
        assert isinstance(grid.codes, Codes)
        assert isinstance(grid.scale, Values)
        assert isinstance(grid.offset, Values)
        parts = grid.codes.integers().reshape(rows // 4, 4, columns // 64, 2, 4, 4, 2).permute(0, 2, 1, 3, 5, 6, 4)
        stream = packing.pack(parts.reshape(rows // 4, 4 * columns), 4)
        stored = {"qweight": packing.rows_to_words(stream, torch.int16)}
        for name, numbers in (("scales", grid.scale.tensor), (self.zeros_name, grid.offset.tensor)):
            padded = torch.nn.functional.pad(numbers, (0, self.padded_groups - self.groups))
            stored[name] = padded.T.contiguous()
        return stored

    def scheme(self) -> Weight:
        rows, columns = self.shape
        codes = Codes(meta("uint8", rows, columns // 2), 4, columns)
        scales, zeros = (meta(self.scale_dtype, rows, self.groups) for _ in range(2))
        return self._weight(codes, scales, Values(zeros))

    def _weight(self, codes: Codes, scales: Tensor, zero: Any) -> Weight:
        return Weight(Grid(codes, Values(scales), offset=zero, block=(1, self.group_size)), self.dtype)


def ranges(low: Tensor, high: Tensor, *, bits: int, symmetric: bool) -> dict[str, Tensor]:
    """Scale and zero point of AutoAWQ's quantizer: zero need not lie inside the range; symmetric, the lowest code is spare."""
    if symmetric:
        scale = torch.maximum(-low, high).clamp(min=1e-5) / ((1 << (bits - 1)) - 1)
        return {"scale": scale, "zero": torch.full_like(scale, 1 << (bits - 1))}
    top = (1 << bits) - 1
    scale = (high - low).clamp(min=1e-5) / top
    return {"scale": scale, "zero": (-torch.round(low / scale)).clamp(0, top) + 0}  # + 0 makes -0 a 0
