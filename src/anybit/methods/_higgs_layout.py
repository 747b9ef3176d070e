"""How HIGGS stores one weight: codes in the order in which FLUTE's kernel reads them. N outputs, K padded inputs.

An even input and the odd one behind it make a pair, the odd code in the low bits; it is one entry of `tables2`. Words of 16
bits; `tile` outputs P (32 or 64) lie next to each other along the rows, column 2*k2 + h:

    2, 4 bits   word row c*P + p: pair u (of 8/bits) is of inputs 2*k2, 2*k2 + 1 and output (c*16/bits + h*8/bits + u)*P + p
    3 bits      16 pairs of 6 bits in 6 words, plane i of 3 and h: 5 pairs in (i, 0) and the low 14 bits of (i, 1); the top
                two bits of (0, 1), (1, 1), (2, 1) are the last pair. Pair u is of output c*512 + OUTPUT[u]*32 + p.
                Plane 0 is word row c*32 + p; planes 1 and 2 are N/16 + (2*c + i - 1)*32 + p
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from anybit._lazy import torch
from anybit.errors import CorruptFile
from anybit.methods._trees import fitted_tree
from anybit.methods._words import require_finite
from anybit.weight import packing
from anybit.weight.layout import Layout, meta
from anybit.weight.nodes import Codebook, Codes, Crop, Rotate, Values
from anybit.weight.weight import Weight

if TYPE_CHECKING:
    from torch import Tensor

OUTPUT = (0, 3, 6, 9, 12, 1, 4, 7, 10, 13, 2, 5, 8, 11, 14, 15)


@dataclass(frozen=True)
class HiggsLayout(Layout):
    """`table_dtype`: what the bits of tables2 mean; `table_label`: the dtype under which they are stored. `p`: inputs that share
    a grid point when codes are chosen; 1 for each its own."""

    bits: int = 4
    group_size: int = 256
    hadamard_size: int = 512
    tile: int = 32
    scale_dtype: str = "float16"
    tables_dtype: str = "float16"
    table_dtype: str = "float16"
    table_label: str = "float16"
    p: int = 2

    algorithm: ClassVar[str | None] = "higgs"

    def algorithm_options(self) -> dict[str, object]:
        from transformers.integrations.higgs import get_higgs_grid  # the published grids, as numbers

        grid = get_higgs_grid(self.p, 1 << (self.p * self.bits)).to(torch.float32)
        tables = grid[:, 0] if self.p == 1 else torch.arange(1 << self.bits)
        return {"grid": grid, "extras": {"tables": tables.to(getattr(torch, self.tables_dtype))}}

    @property
    def width(self) -> int:
        """Inputs, padded."""
        return -(-self.shape[1] // self.hadamard_size) * self.hadamard_size

    @property
    def together(self) -> int:
        """Outputs that are stored together."""
        return 512 if self.bits == 3 else 16 // self.bits * self.tile

    def specs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        rows, entries = self.shape[0], 1 << self.bits
        return {
            "weight": ("int16", (rows * self.bits // 16, self.width)),
            "scales": (self.scale_dtype, (rows, self.width // self.group_size)),
            "tables": (self.tables_dtype, (entries,)),
            "tables2": (self.table_label, (entries, entries, 2)),
        }

    def decode(self, tensors: Mapping[str, Tensor]) -> Weight:
        words, scales, tables, pairs = (self.take(tensors, name, *spec) for name, spec in self.specs().items())
        for name, numbers in (("scales", scales), ("tables", tables)):
            require_finite(name, numbers)
        pairs = require_finite("tables2", pairs.view(getattr(torch, self.table_dtype)))
        packed = torch.empty(self.shape[0], self.width * self.bits // 8, dtype=torch.uint8, device=words.device)
        for block in range(self.shape[0] // self.together):
            found = self._pairs(*self._pieces(words, block))
            packed[block * self.together : (block + 1) * self.together] = packing.pack(found, 2 * self.bits)
        codes = Codes(packed, 2 * self.bits, self.width // 2)
        return self._weight(codes, scales, pairs.reshape(1, -1, 1, 2), {"tables": tables})

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        book = fitted_tree(weight, self).child.child
        if "tables" not in weight.extras:
            raise CorruptFile("a HIGGS weight without its extra 'tables' cannot be written back; load it again")
        packed = book.codes.packed
        words = torch.empty(self.specs()["weight"][1], dtype=torch.int16, device=packed.device)
        for block in range(self.shape[0] // self.together):
            part = packed[block * self.together : (block + 1) * self.together]
            pieces = self._pieces(words, block)
            numbers = packing.unpack(part, 2 * self.bits, self.width // 2)
            for piece, found in zip(pieces, self._words(numbers), strict=True):
                piece.copy_(found)
        entries = 1 << self.bits
        return {
            "weight": words,
            "scales": book.scale.tensor,
            "tables": weight.extras["tables"],
            "tables2": book.tables.view(getattr(torch, self.table_label)).reshape(entries, entries, 2),
        }

    def _pieces(self, words: Tensor, block: int) -> tuple[Tensor, ...]:
        """The word rows of one block of outputs: all in one, or a piece for each plane. Views."""
        if self.bits != 3:
            return (words[block * self.tile : (block + 1) * self.tile],)
        first = self.shape[0] // 16 + 64 * block
        return words[32 * block : 32 * (block + 1)], words[first : first + 32], words[first + 32 : first + 64]

    def _pairs(self, *pieces: Tensor) -> Tensor:
        """Words [P, K] (of each plane) -> pairs [together, K/2]."""
        if self.bits != 3:
            stream = packing.words_to_rows(pieces[0])
            fields = packing.unpack(stream, 2 * self.bits, self.width * 8 // self.bits)
            parts = fields.view(self.tile, self.width // 2, 2, 8 // self.bits)  # p, k2, h, u
            return parts.permute(2, 3, 0, 1).reshape(self.together, self.width // 2)
        pairs = torch.empty(16, 32, self.width // 2, dtype=torch.uint8, device=pieces[0].device)
        last = torch.zeros(32, self.width // 2, dtype=torch.int32, device=pieces[0].device)
        for plane, words in enumerate(pieces):
            halves = words.to(torch.int32).view(32, self.width // 2, 2) & 0xFFFF
            five = halves[..., 0] | (halves[..., 1] & 0x3FFF) << 16
            for position in range(5):
                pairs[OUTPUT[5 * plane + position]] = (five >> (6 * position) & 63).to(torch.uint8)
            last |= (halves[..., 1] >> 14) << (2 * plane)
        pairs[OUTPUT[15]] = last.to(torch.uint8)
        return pairs.view(512, self.width // 2)

    def _words(self, pairs: Tensor) -> tuple[Tensor, ...]:
        """Inverse of `_pairs`."""
        if self.bits != 3:
            parts = pairs.view(2, 8 // self.bits, self.tile, self.width // 2).permute(2, 3, 0, 1)
            stream = packing.pack(parts.reshape(self.tile, -1), 2 * self.bits)
            return (packing.rows_to_words(stream, torch.int16),)
        numbers = pairs.view(16, 32, self.width // 2).to(torch.int32)
        planes = []
        for plane in range(3):
            five = torch.zeros_like(numbers[0])
            for position in range(5):
                five |= numbers[OUTPUT[5 * plane + position]] << (6 * position)
            high = five >> 16 | (numbers[OUTPUT[15]] >> (2 * plane) & 3) << 14
            planes.append(torch.stack([five & 0xFFFF, high], -1).to(torch.int16).flatten(1))
        return tuple(planes)

    def scheme(self) -> Weight:
        rows, count = self.shape[0], self.width // 2
        codes = Codes(meta("uint8", rows, packing.row_bytes(count, 2 * self.bits)), 2 * self.bits, count)
        scales = meta(self.scale_dtype, *self.specs()["scales"][1])
        tables = meta(self.table_dtype, 1, 1 << 2 * self.bits, 1, 2)
        return self._weight(codes, scales, tables, {"tables": meta(self.tables_dtype, 1 << self.bits)})

    def _weight(self, codes: Codes, scales: Tensor, tables: Tensor, extras: Mapping[str, Tensor]) -> Weight:
        book = Codebook(codes, tables, (1, 2), Values(scales), block=(1, self.group_size))
        return Weight(Crop(Rotate(book, self.hadamard_size), *self.shape), self.dtype, extras=extras)


def are_bfloat16_bits(pairs: Tensor) -> bool:
    """Whether a table labelled float16 holds bfloat16: a grid for Gaussian numbers has entries below 0.5, and the bits of a
    bfloat16 between 0.001 and 4, read as float16, are 0.8 to 2.3."""
    return bool((pairs.to(torch.float32).abs() < 0.5).to(torch.float32).mean() < 0.05)
