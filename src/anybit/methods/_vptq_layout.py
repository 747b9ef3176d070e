"""How VPTQ stores one weight: one stream of bits for each run of outputs; a column's main index, then its residual one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from anybit._lazy import torch
from anybit.errors import CorruptFile
from anybit.methods._trees import fitted_tree, require_below, require_permutation
from anybit.methods._words import require_finite
from anybit.weight import packing
from anybit.weight.layout import Layout, meta
from anybit.weight.nodes import Codebook, Codes, Columns, Crop, Node, Permute, Scaled, Sum, Values
from anybit.weight.weight import Weight, row_chunks

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class VptqLayout(Layout):
    """`vector` outputs share an index; `entries`, `residuals`: of the codebooks, 0 where there is none.

    `outliers`: the first columns, with a codebook of their own. `norm_axis`: scale and bias per input (0), per output (1) or
    none. `permuted`: `perm` names the input of each stored column. `index_dtype`: what the 16 bits of an outlier's index are
    called; "float16" where the configuration says indices_as_float.
    """

    vector: int = 8
    entries: int = 65536
    residuals: int = 0
    groups: int = 1
    outliers: int = 0
    outlier_vector: int = 0
    outlier_entries: int = 0
    norm_axis: int | None = 0
    permuted: bool = True
    number_dtype: str = "float16"
    index_dtype: str = "int16"

    @property
    def group_size(self) -> int:
        return (self.shape[1] - self.outliers) // self.groups

    @property
    def widths(self) -> tuple[int, int]:
        """Bits of a main and of a residual index."""
        return (self.entries - 1).bit_length(), (self.residuals - 1).bit_length() if self.residuals else 0

    def specs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        rows, columns = self.shape
        kind = self.number_dtype
        words = -(-self.group_size * sum(self.widths) // 32)
        specs: dict[str, tuple[str, tuple[int, ...]]] = {
            "centroids.weight": (kind, (self.groups, self.entries * self.vector)),
            "indices": ("int32", (self.groups, -(-rows // self.vector), words)),
        }
        if self.residuals:
            specs["res_centroids.weight"] = (kind, (self.groups, self.residuals * self.vector))
        if self.outliers:
            specs["outlier_centroids.weight"] = (kind, (1, self.outlier_entries * self.outlier_vector))
            specs["outlier_indices"] = (self.index_dtype, (1, -(-rows // self.outlier_vector), self.outliers))
        if self.permuted:
            specs["perm"] = ("int16", (columns,))
        if self.norm_axis is not None:
            specs["weight_scale"] = specs["weight_bias"] = (kind, (rows if self.norm_axis else columns,))
        return specs

    def decode(self, tensors: Mapping[str, Tensor]) -> Weight:
        found = {name: self.take(tensors, name, *spec) for name, spec in self.specs().items()}
        for name, stored in found.items():
            if stored.is_floating_point() and name != "outlier_indices":
                require_finite(name, stored)
        parts: list[Node] = []
        if self.outliers:
            codes = found["outlier_indices"][0].view(torch.int16).to(torch.int32) & 0xFFFF
            require_below("outlier_indices", codes, self.outlier_entries)
            table = found["outlier_centroids.weight"].view(1, -1, self.outlier_vector, 1)
            parts.append(self._crop(Codebook(Codes.of(codes, 16), table, (self.outlier_vector, 1))))
        for group in range(self.groups):
            main, rest = self._split(found["indices"][group])
            books = [self._book(main, found["centroids.weight"][group])]
            if rest is not None:
                books.append(self._book(rest, found["res_centroids.weight"][group]))
            parts.append(self._crop(books[0] if rest is None else Sum(tuple(books))))
        index = None
        if self.permuted:
            index = require_permutation("perm", found["perm"].to(torch.int32) & 0xFFFF)
        return self._weight(parts, index, found.get("weight_scale"), found.get("weight_bias"))

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        tree = fitted_tree(weight, self)
        stored: dict[str, Tensor] = {}
        if self.norm_axis is not None:
            stored.update(weight_scale=tree.scale.tensor.flatten(), weight_bias=tree.offset.tensor.flatten())
            tree = tree.child
        if self.permuted:
            stored["perm"] = tree.index.to(torch.int16)
            tree = tree.child
        parts = [part.child for part in tree.parts]
        if self.outliers:
            book = parts.pop(0)
            stored["outlier_centroids.weight"] = book.tables.reshape(1, -1)
            indices = book.codes.integers().to(torch.int16)
            stored["outlier_indices"] = indices.view(getattr(torch, self.index_dtype))[None]
        books: list[Any] = [part.parts if isinstance(part, Sum) else (part, None) for part in parts]
        stored["centroids.weight"] = torch.stack([main.tables.reshape(-1) for main, _ in books])
        if self.residuals:
            stored["res_centroids.weight"] = torch.stack([rest.tables.reshape(-1) for _, rest in books])
        stored["indices"] = torch.stack(
            [self._joined(main.codes, None if rest is None else rest.codes) for main, rest in books]
        )
        return stored

    def scheme(self) -> Weight:
        rows, columns = self.shape
        parts: list[Node] = []
        if self.outliers:
            table = meta(self.number_dtype, 1, self.outlier_entries, self.outlier_vector, 1)
            codes = _unfilled(-(-rows // self.outlier_vector), self.outliers, 16)
            parts.append(self._crop(Codebook(codes, table, (self.outlier_vector, 1))))
        for _ in range(self.groups):
            books = [
                self._book(
                    _unfilled(-(-rows // self.vector), self.group_size, bits),
                    meta(self.number_dtype, count * self.vector),
                )
                for bits, count in zip(self.widths, (self.entries, self.residuals), strict=True)
                if count
            ]
            parts.append(self._crop(books[0] if len(books) == 1 else Sum(tuple(books))))
        norm = None if self.norm_axis is None else meta(self.number_dtype, rows if self.norm_axis else columns)
        return self._weight(parts, meta("int32", columns) if self.permuted else None, norm, norm)

    def _book(self, codes: Codes, table: Tensor) -> Codebook:
        return Codebook(codes, table.view(1, -1, self.vector, 1), (self.vector, 1))

    def _crop(self, part: Node) -> Crop:
        return Crop(part, self.shape[0], part.shape[1])

    def _weight(self, parts: list[Node], index: Tensor | None, scale: Tensor | None, bias: Tensor | None) -> Weight:
        tree: Node = Columns(tuple(parts))
        if index is not None:
            tree = Permute(tree, index)
        if scale is not None and bias is not None:
            turned = (lambda numbers: numbers[:, None]) if self.norm_axis else (lambda numbers: numbers[None])
            tree = Scaled(tree, Values(turned(scale)), Values(turned(bias)))
        return Weight(tree, self.dtype)

    # --- the streams ---

    def _places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Word and bit at which each column's indices begin."""
        first = torch.arange(self.group_size, device=device) * sum(self.widths)
        return first // 32, first % 32

    def _split(self, words: Tensor) -> tuple[Codes, Codes | None]:
        """int32 [vectors, words] -> main and residual codes."""
        (main_bits, rest_bits), count = self.widths, self.group_size
        used = count * (main_bits + rest_bits) % 32
        if used and bool(((words[:, -1].to(torch.int64) & 0xFFFFFFFF) >> used).any()):
            raise CorruptFile(
                f"tensor 'indices' has bits set behind its last index ({count} columns of {main_bits} + {rest_bits} bits); it "
                "was written for another shape or other codebooks"
            )
        word, bit = self._places(words.device)
        kept = [
            torch.empty(words.shape[0], packing.row_bytes(count, bits), dtype=torch.uint8, device=words.device)
            for bits in (main_bits, rest_bits)
        ]
        for start, stop in row_chunks(words.shape[0], 8 * count):
            wide = torch.nn.functional.pad(words[start:stop].to(torch.int64) & 0xFFFFFFFF, (0, 1))
            numbers = (wide[:, word] | wide[:, word + 1] << 32) >> bit
            kept[0][start:stop] = packing.pack(numbers & (self.entries - 1), main_bits)
            if rest_bits:
                kept[1][start:stop] = packing.pack(numbers >> main_bits & (self.residuals - 1), rest_bits)
        return Codes(kept[0], main_bits, count), Codes(kept[1], rest_bits, count) if rest_bits else None

    def _joined(self, main: Codes, rest: Codes | None) -> Tensor:
        """Inverse of `_split`."""
        rows, count = main.shape
        words = torch.empty(self.specs()["indices"][1][1:], dtype=torch.int32, device=main.packed.device)
        word, bit = self._places(words.device)
        for start, stop in row_chunks(rows, 8 * count):
            place = slice(start, stop), slice(0, count)
            numbers = main.integers(*place).to(torch.int64)
            if rest is not None:
                numbers = numbers | rest.integers(*place).to(torch.int64) << main.bits
            wide = torch.zeros(stop - start, words.shape[1] + 1, dtype=torch.int64, device=words.device)
            numbers = numbers << bit  # at most 63 bits; no two columns share a bit, so that sums are unions
            wide.index_add_(1, word, numbers & 0xFFFFFFFF)
            wide.index_add_(1, word + 1, numbers >> 32 & 0xFFFFFFFF)
            words[start:stop] = wide[:, :-1].to(torch.int32)
        return words


def _unfilled(rows: int, columns: int, bits: int) -> Codes:
    return Codes(meta("uint8", rows, packing.row_bytes(columns, bits)), bits, columns)
