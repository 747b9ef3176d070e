"""How AQLM stores one weight: unsigned codes in two's complement, several to a tile, and one scale for each row of tiles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from anybit._lazy import torch
from anybit.errors import CorruptFile
from anybit.methods._trees import fitted_tree
from anybit.methods._words import require_finite
from anybit.weight import packing
from anybit.weight.layout import Layout, meta
from anybit.weight.nodes import Codebook, Codes, Values
from anybit.weight.weight import Weight, row_chunks

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class AqlmLayout(Layout):
    """`grouped`: a scale for each tile, not for each row of tiles; only the authors' research code writes that."""

    books: int = 1
    bits: int = 16
    out_group: int = 1
    in_group: int = 8
    number_dtype: str = "float16"
    grouped: bool = False

    @property
    def tiles(self) -> tuple[int, int]:
        return self.shape[0] // self.out_group, self.shape[1] // self.in_group

    @property
    def code_dtype(self) -> str:
        return "int8" if self.bits <= 8 else "int16" if self.bits <= 16 else "int32"

    def specs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        down, across = self.tiles
        return {
            "codes": (self.code_dtype, (down, across, self.books)),
            "codebooks": (self.number_dtype, (self.books, 1 << self.bits, self.out_group, self.in_group)),
            "scales": (self.number_dtype, (down, across if self.grouped else 1, 1, 1)),
        }

    def decode(self, tensors: Mapping[str, Tensor]) -> Weight:
        stored, tables, scales = (self.take(tensors, name, *spec) for name, spec in self.specs().items())
        require_finite("codebooks", tables)
        require_finite("scales", scales)
        rows = stored.flatten(1)
        packed = torch.empty(
            rows.shape[0], packing.row_bytes(rows.shape[1], self.bits), dtype=torch.uint8, device=rows.device
        )
        half = 1 << (self.bits - 1)
        for start, stop in row_chunks(*rows.shape):
            part = rows[start:stop]
            if self.bits not in (8, 16) and bool(((part < -half) | (part >= half)).any()):
                raise CorruptFile(
                    f"tensor 'codes' holds codes from {int(part.min())} to {int(part.max())}; a codebook of {1 << self.bits} "
                    f"entries has {-half} to {half - 1} (two's complement). It was written for another nbits_per_codebook"
                )
            packed[start:stop] = packing.pack(part.to(torch.int32) & ((1 << self.bits) - 1), self.bits)
        return self._weight(Codes(packed, self.bits, rows.shape[1]), tables, scales[..., 0, 0])

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        book = fitted_tree(weight, self)
        (kind, shape), half = self.specs()["codes"], 1 << (self.bits - 1)
        codes = torch.empty(shape, dtype=getattr(torch, kind), device=book.tables.device)
        rows = codes.flatten(1)  # a view
        for start, stop in row_chunks(*rows.shape):
            numbers = packing.unpack(book.codes.packed[start:stop], self.bits, rows.shape[1]).to(torch.int32)
            rows[start:stop] = ((numbers ^ half) - half).to(codes.dtype)
        return {"codes": codes, "codebooks": book.tables, "scales": book.scale.tensor[..., None, None]}

    def scheme(self) -> Weight:
        down, across = self.tiles
        count = across * self.books
        codes = Codes(meta("uint8", down, packing.row_bytes(count, self.bits)), self.bits, count)
        tables = meta(self.number_dtype, *self.specs()["codebooks"][1])
        return self._weight(codes, tables, meta(self.number_dtype, down, across if self.grouped else 1))

    def _weight(self, codes: Codes, tables: Tensor, scales: Tensor) -> Weight:
        vector = (self.out_group, self.in_group)
        block = vector if self.grouped else (self.out_group, self.shape[1])
        return Weight(Codebook(codes, tables, vector, Values(scales), block=block), self.dtype)
