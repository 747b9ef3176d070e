"""How SpQR stores one weight: a 64-bit word for each row of a 16 x 16 tile, and outliers that are added.

    63 62   61 ... 54   53 ... 6                      5 4 3   2 1 0
    unused  a byte      16 weight codes, first low     zero    scale     codes of this row in this tile

Rows 2b and 2b + 1 hold byte b of the tile's four halves: scale of scales, scale of zeros, zero of scales, zero of zeros.
An outlier is a word: the column (of the permuted matrix) low, a float16 high. They are listed row by row (CSR), or for 16 rows
together, one of each row at a time, filled up with zero words (PTCSR).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from anybit._lazy import torch
from anybit.errors import CorruptFile
from anybit.methods._trees import fitted_tree, require_below, require_permutation
from anybit.methods._words import require_finite
from anybit.weight import packing
from anybit.weight.layout import Layout, meta
from anybit.weight.nodes import Codes, Grid, Node, Permute, Sparse, Sum, Values
from anybit.weight.weight import Weight

if TYPE_CHECKING:
    from torch import Tensor

TILE = 16
HALVES = ("scale of scales", "scale of zeros", "zero of scales", "zero of zeros")


@dataclass(frozen=True)
class SpqrLayout(Layout):
    """`outliers`: words in col_vals. `tiled`: PTCSR. `permutation`: in_perm is "stored", "empty" or "absent"."""

    outliers: int = 0
    tiled: bool = False
    permutation: str = "stored"

    @property
    def tiles(self) -> tuple[int, int]:
        return self.shape[0] // TILE, -(-self.shape[1] // TILE)

    def specs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        rows, columns = self.shape
        down, across = self.tiles
        specs: dict[str, tuple[str, tuple[int, ...]]] = {
            "dense_weights": ("int64", (down * across * TILE,)),
            "row_offsets": ("int32", ((down if self.tiled else rows) + 1,)),
            "col_vals": ("int32", (self.outliers,)),
        }
        if self.permutation != "absent":
            specs["in_perm"] = ("int32", (columns // 2 if self.permutation == "stored" else 0,))
        return specs

    def decode(self, tensors: Mapping[str, Tensor]) -> Weight:
        found = {name: self.take(tensors, name, *spec) for name, spec in self.specs().items()}
        offsets, words = self._by_row(found["row_offsets"], found["col_vals"])
        columns = words & 0xFFFF
        require_below("col_vals", columns, self.shape[1])
        values = require_finite("col_vals", _halves(words)[:, 1])
        index = None
        if self.permutation == "stored":
            index = require_permutation("in_perm", _shorts(found["in_perm"]).flatten().to(torch.int32) & 0xFFFF)
        sparse = Sparse(offsets, columns, Values(values.contiguous()[None]), self.shape[1])
        extras = {"in_perm": found["in_perm"]} if self.permutation == "empty" else {}
        return self._weight(*self._read_tiles(found["dense_weights"]), sparse, index, extras)

    def _read_tiles(self, stored: Tensor) -> tuple[Codes, Codes, Codes, list[Tensor]]:
        """Codes of weights, scales and zeros, and the four halves [tiles down, tiles across] of the tiles."""
        rows, columns = self.shape
        down, across = self.tiles
        words = stored.view(down, across, TILE)
        if bool((words >> 62 & 3).any()):
            raise CorruptFile("tensor 'dense_weights' has bits 62 and 63 set, which SpQR never uses; a damaged file")
        pieces = (words >> 54 & 0xFF).to(torch.uint8).view(down, across, TILE // 2, 2)
        if not torch.equal(pieces[..., 0], pieces[..., 1]):
            place = torch.nonzero(pieces[..., 0] != pieces[..., 1])[0].tolist()
            raise CorruptFile(
                f"tensor 'dense_weights': rows {2 * place[2]} and {2 * place[2] + 1} of tile {place[:2]} disagree on the byte of "
                "scales they share; a damaged file, get it again"
            )
        halves = pieces[..., 0].contiguous().view(torch.float16)
        for position, name in enumerate(HALVES):
            require_finite(f"dense_weights ({name})", halves[..., position])
        by_row = words.transpose(1, 2).reshape(rows, across)
        stream = packing.words_to_rows(by_row >> 6).view(rows, across, 8)[..., :6].reshape(rows, 6 * across)
        if bool(packing.unpack(stream, 3, TILE * across - columns, columns).any()):
            raise CorruptFile(
                f"tensor 'dense_weights' has codes behind the last of {columns} inputs; it was written for another shape"
            )
        codes = Codes(stream[:, : packing.row_bytes(columns, 3)].contiguous(), 3, columns)
        scale, zero = (Codes.of((by_row >> shift & 7).to(torch.uint8), 3) for shift in (0, 3))
        return codes, scale, zero, [halves[..., position].contiguous() for position in range(4)]

    def _by_row(self, offsets: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """(row_offsets of CSR, the outliers in its order)."""
        steps = offsets.to(torch.int64).diff()
        ends = int(offsets[0]), int(offsets[-1])
        if ends != (0, self.outliers) or bool((steps < 0).any()) or (self.tiled and bool((steps % TILE).any())):
            raise CorruptFile(
                f"tensor 'row_offsets' goes from {ends[0]} to {ends[1]} for {self.outliers} words in col_vals"
                f"{' in steps that are multiples of 16' if self.tiled else ''}, and must never fall; a damaged file"
            )
        if not self.tiled:
            return offsets, words
        counts = (steps // TILE).repeat_interleave(TILE)
        own = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        return own, words[self._order(own)]

    def _order(self, offsets: Tensor) -> Tensor:
        """For PTCSR: place in the file of each outlier in CSR's order."""
        row = torch.repeat_interleave(torch.arange(self.shape[0], device=offsets.device), offsets.long().diff())
        position = torch.arange(self.outliers, device=offsets.device) - offsets.long()[row]
        return offsets.long()[row // TILE * TILE] + position * TILE + row % TILE

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        tree = fitted_tree(weight, self)
        stored: dict[str, Tensor] = {}
        if self.permutation == "stored":
            shorts = tree.index.to(torch.int16)
            stored["in_perm"] = shorts.view(torch.int32)
            tree = tree.child
        elif self.permutation == "empty":
            stored["in_perm"] = torch.empty(0, dtype=torch.int32, device=weight.device)
        grid, sparse = tree.parts
        halves = torch.stack([sparse.columns.to(torch.int16), sparse.values.tensor[0].view(torch.int16)], -1)
        words = halves.contiguous().view(torch.int32).flatten()
        offsets = sparse.row_offsets
        if self.tiled:
            in_file = torch.empty_like(words)
            in_file[self._order(offsets)] = words
            words, offsets = in_file, offsets[::TILE].contiguous()
        return {**stored, "dense_weights": self._write_tiles(grid), "row_offsets": offsets, "col_vals": words}

    def _write_tiles(self, grid: Grid) -> Tensor:
        rows, _ = self.shape
        down, across = self.tiles
        scale, zero = grid.scale, grid.zero
        assert isinstance(grid.codes, Codes)
        assert isinstance(scale, Grid)
        assert isinstance(zero, Grid)
        assert isinstance(scale.codes, Codes)
        assert isinstance(zero.codes, Codes)
        stream = torch.nn.functional.pad(grid.codes.packed, (0, 6 * across - grid.codes.packed.shape[1]))
        stream = torch.nn.functional.pad(stream.view(rows, across, 6), (0, 2))
        words = stream.contiguous().view(torch.int64)[..., 0] << 6
        words = words | scale.codes.integers().to(torch.int64) | zero.codes.integers().to(torch.int64) << 3
        parts = (scale.scale, zero.scale, scale.zero, zero.zero)
        halves = torch.stack([part.tensor for part in parts if isinstance(part, Values)], -1)
        pieces = halves.contiguous().view(torch.uint8).to(torch.int64).repeat_interleave(2, -1)
        tiles = words.view(down, TILE, across).transpose(1, 2) | pieces << 54
        return tiles.reshape(-1)

    def scheme(self) -> Weight:
        rows, columns = self.shape
        down, across = self.tiles
        codes = Codes(meta("uint8", rows, packing.row_bytes(columns, 3)), 3, columns)
        small = Codes(meta("uint8", rows, -(-across * 3 // 8)), 3, across)
        halves = [meta("float16", down, across) for _ in HALVES]
        values = Values(meta("float16", 1, self.outliers))
        sparse = Sparse(meta("int32", rows + 1), meta("int32", self.outliers), values, columns)
        index = meta("int32", columns) if self.permutation == "stored" else None
        extras = {"in_perm": meta("int32", 0)} if self.permutation == "empty" else {}
        return self._weight(codes, small, small, halves, sparse, index, extras)

    def _weight(
        self,
        codes: Codes,
        scale: Codes,
        zero: Codes,
        halves: list[Tensor],
        sparse: Sparse,
        index: Tensor | None,
        extras: Mapping[str, Tensor],
    ) -> Weight:
        # all in half precision, as the vendor: s = ss * (code - sz), z = zs * (code - zz), s * (q - z), plus the outlier
        def fine(own: Codes, factor: Tensor, start: Tensor) -> Grid:
            return Grid(own, Values(factor), Values(start), block=(TILE, 1), compute="float16")

        grid = Grid(
            codes,
            fine(scale, halves[0], halves[2]),
            fine(zero, halves[1], halves[3]),
            block=(1, TILE),
            compute="float16",
        )
        tree: Node = Sum((grid, sparse), "float16")
        return Weight(tree if index is None else Permute(tree, index), self.dtype, extras=extras)


def _shorts(words: Tensor) -> Tensor:
    """int32 [n] -> its halves as int16 [n, 2], low first."""
    return words.contiguous().view(torch.int16).view(-1, 2)


def _halves(words: Tensor) -> Tensor:
    return words.contiguous().view(torch.float16).view(-1, 2)
