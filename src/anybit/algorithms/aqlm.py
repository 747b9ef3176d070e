"""AQLM (arXiv 2401.06118): every tile is a sum of vectors, one from each codebook, chosen for the layer's outputs.

1. rows are divided by their scale; residual k-means gives first codebooks
2. codes by beam search, tile after tile in order, each error passed on to the tiles to come (LDLQ, see ldlq.py)
3. codebooks by least squares for ||(W' - W) X||^2 (conjugate gradients), then the scale of each row by its closed form
4. repeated while it helps: codes by beam search over what a choice does to that error, and step 3
The authors tune codebooks of whole blocks afterwards: that is "aqlm+finetune" (finetune.py). A pass of the search costs
out * in * 2**bits multiplications for each codebook and beam: seconds for a small layer of 2 x 8 bits, hours for a large model
of 1 x 16 bits on a CPU.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from anybit.algorithms import _vectors
from anybit.errors import NotRepresentable
from anybit.weight import Codebook, Codes, Values, Weight

STEPS = 12  # of conjugate gradients


def quantize(
    dense: Tensor,
    target: Weight,
    *,
    hessian: Tensor,
    damp: float = 0.1,
    beam: int = 4,
    passes: int = 8,
    tolerance: float = 0.01,
    iterations: int = 20,
    seed: int = 0,
) -> Weight:
    """Codebooks and codes of one matrix [out, in], given `hessian` float32 [in, in].

    `damp`: share of the mean diagonal that is added. `beam`: sums kept while the codes of a tile are chosen. It ends after
    `passes`, or when one makes the error smaller by less than `tolerance`. `iterations` of k-means. The same for the same
    `seed`.
    """
    book = target.tree
    if (
        dense.dim() != 2
        or not isinstance(book, Codebook)
        or not isinstance(book.codes, Codes)
        or not isinstance(book.scale, Values)
        or book.scale.shape[1] != 1
    ):
        raise NotRepresentable("AQLM fills codebooks with one scale for each row of tiles; choose another algorithm")
    work = _Work(dense, book, _vectors.usable(hessian, damp))
    work.start(iterations, seed)
    best, kept = work.error(), work.state()
    for number in range(passes):
        (work.search if number else work.sweep)(beam)
        work.fit_tables()
        work.fit_scales()
        error = work.error()
        if error < best:
            kept = work.state()
        if error > best * (1 - tolerance):
            break
        best = error
    codes, tables, scales = kept
    return Weight(
        replace(
            book,
            codes=Codes.of(codes.flatten(1).to(torch.int32), book.codes.bits),
            tables=tables.to(book.tables.dtype),
            scale=Values(scales[:, None].to(book.scale.tensor.dtype)),
        ),
        target.dtype,
        target.activation,
    )


class _Work:
    """The matrix as tiles [down, across, d], and what is found for them. `codes` [down, across, K], `tables` [K, entries, d]."""

    def __init__(self, dense: Tensor, book: Codebook, hessian: Tensor):
        self.high, self.wide = book.vector
        self.hessian, self.weight = hessian, dense.to(torch.float32)
        self.shape = book.tables.shape
        self.dtype = book.tables.dtype
        self.scale_dtype = book.scale.tensor.dtype  # type: ignore[union-attr]

    def start(self, iterations: int, seed: int) -> None:
        rows = self.weight.view(-1, self.high * self.weight.shape[1])
        self.scales = self._as_stored(rows.square().mean(1).sqrt().clamp(min=1e-6), self.scale_dtype)
        tiles = self.tiles(self.weight) / self.scales[:, None, None]
        down, across, width = tiles.shape
        books, entries = self.shape[:2]
        self.codes = torch.empty(down, across, books, dtype=torch.int64, device=tiles.device)
        self.tables = torch.empty(books, entries, width, device=tiles.device)
        importance = self.hessian.diagonal().view(across, self.wide).mean(1) * self.scales.square()[:, None]
        left = tiles.reshape(-1, width)
        for place in range(books):
            table = _vectors.means(
                left, entries, weights=importance.flatten(), seed=seed + place, iterations=iterations
            )
            code = _vectors.nearest(left, table)
            left = left - table[code]
            self.tables[place], self.codes[..., place] = table, code.view(down, across)
        self.tables = self._as_stored(self.tables, self.dtype)

    @staticmethod
    def _as_stored(numbers: Tensor, dtype: torch.dtype) -> Tensor:
        return numbers.to(dtype).float()

    def state(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.codes.clone(), self.tables.clone().view(self.shape), self.scales.clone()

    def tiles(self, matrix: Tensor) -> Tensor:
        """[out, in] -> [down, across, d]."""
        out, width = matrix.shape
        parts = matrix.view(out // self.high, self.high, width // self.wide, self.wide)
        return parts.permute(0, 2, 1, 3).reshape(out // self.high, width // self.wide, -1)

    def matrix(self, tiles: Tensor) -> Tensor:
        """Inverse of `tiles`."""
        down, across, _ = tiles.shape
        return tiles.view(down, across, self.high, self.wide).permute(0, 2, 1, 3).reshape(down * self.high, -1)

    def sums(self, tables: Tensor) -> Tensor:
        """Matrix of what the codes name, without scales."""
        total = tables[0][self.codes[..., 0]]
        for place in range(1, self.shape[0]):
            total = total + tables[place][self.codes[..., place]]
        return self.matrix(total)

    def scaled(self, matrix: Tensor) -> Tensor:
        return matrix * self.scales.repeat_interleave(self.high)[:, None]

    def error(self) -> float:
        difference = self.scaled(self.sums(self.tables)) - self.weight
        return float((difference @ self.hessian * difference).sum())

    # --- codes ---

    def sweep(self, beam: int) -> None:
        """Codes of all tiles, one input position after the other, each error passed on to the later ones (LDLQ, see ldlq.py)."""
        factor = _vectors.upper_factor(self.hessian)
        for start, stop in _vectors.chunks(len(self.codes), beam * self.shape[1], 1 << 25):
            rows = slice(start * self.high, stop * self.high)
            weight = self.weight[rows] / self.scales[start:stop].repeat_interleave(self.high)[:, None]
            for tile in range(self.codes.shape[1]):
                own = slice(tile * self.wide, (tile + 1) * self.wide)
                inside = torch.linalg.inv(factor[own, own])
                square = inside @ inside.T  # what is left of an error after later tiles made up for it
                goal = self._flat(weight[:, own] @ square)
                self.codes[start:stop, tile], value = self._choose(self.codes[start:stop, tile], goal, square, beam)
                wrong = (weight[:, own] - value.view(-1, self.wide)) @ inside
                weight[:, own.stop :] -= wrong @ factor[own, own.stop :]

    def search(self, beam: int) -> None:
        """Codes of all tiles, one input position after the other. Rows do not touch each other."""
        entries = self.shape[1]
        for start, stop in _vectors.chunks(len(self.codes), beam * entries, 1 << 25):
            rows = slice(start * self.high, stop * self.high)
            scale = self.scales[start:stop]
            now = self.sums(self.tables)[rows]
            slope = (now - self.weight[rows] / scale.repeat_interleave(self.high)[:, None]) @ self.hessian
            for tile in range(self.codes.shape[1]):
                own = slice(tile * self.wide, (tile + 1) * self.wide)
                square = self.hessian[own, own]
                before = now[:, own].clone()
                goal = self._flat(before @ square - slope[:, own])
                self.codes[start:stop, tile], value = self._choose(self.codes[start:stop, tile], goal, square, beam)
                after = value.view(-1, self.wide)
                slope += (after - before) @ self.hessian[own]
                now[:, own] = after

    def _flat(self, part: Tensor) -> Tensor:
        """[rows, wide] -> [tiles, high * wide]."""
        return part.reshape(-1, self.high * self.wide)

    def _times(self, vectors: Tensor, square: Tensor) -> Tensor:
        return (vectors.view(-1, self.wide) @ square).view(vectors.shape)

    def _choose(self, old: Tensor, goal: Tensor, square: Tensor, beam: int) -> tuple[Tensor, Tensor]:
        """For tiles with the error v H v - 2 goal v: the codes [tiles, K] of a sum v that makes it small, and v."""
        count, width = goal.shape
        books, entries = self.shape[:2]
        sums, cost = goal.new_zeros(count, 1, width), goal.new_zeros(count, 1)
        codes = old.new_empty(count, 1, 0)
        for place in range(books):
            table = self.tables[place]
            own = (table * self._times(table, square)).sum(1)
            rest = self._times(sums, square) - goal[:, None]
            price = cost[..., None] + own + 2 * rest @ table.T  # [tiles, beam, entries]
            keep = min(beam if place + 1 < books else 1, price.shape[1] * entries)
            cost, chosen = price.flatten(1).topk(keep, dim=1, largest=False)
            before, code = chosen // entries, chosen % entries
            sums = sums.gather(1, before[..., None].expand(-1, -1, width)) + table[code]
            codes = torch.cat([codes.gather(1, before[..., None].expand(-1, -1, place)), code[..., None]], 2)
        previous = self.tables[0][old[:, 0]]
        for place in range(1, books):
            previous = previous + self.tables[place][old[:, place]]
        was = (previous * (self._times(previous, square) - 2 * goal)).sum(1)
        better = cost[:, 0] < was
        return (
            torch.where(better[:, None], codes[:, 0], old),
            torch.where(better[:, None], sums[:, 0], previous),
        )

    # --- tables and scales ---

    def fit_tables(self) -> None:
        """Least squares for all tables together; kept if, rounded, they are better."""
        before, old = self.error(), self.tables
        residual = -self._gradient(self.scaled(self.sums(old)) - self.weight)
        tables = _vectors.fitted(old, residual, lambda step: self._gradient(self.scaled(self.sums(step))), STEPS)
        self.tables = self._as_stored(tables, self.dtype)
        if not self.error() < before:
            self.tables = old

    def _gradient(self, difference: Tensor) -> Tensor:
        """Half the derivative of the error by every entry of the tables."""
        slope = self.tiles(self.scaled(difference @ self.hessian)).reshape(-1, self.tables.shape[2])
        found = torch.zeros_like(self.tables)
        for place in range(self.shape[0]):
            found[place].index_add_(0, self.codes[..., place].flatten(), slope)
        return found

    def fit_scales(self) -> None:
        sums = self.sums(self.tables)
        image = sums @ self.hessian
        above = (image * self.weight).view(len(self.scales), -1).sum(1)
        below = (image * sums).view(len(self.scales), -1).sum(1)
        before, old = self.error(), self.scales
        self.scales = self._as_stored(torch.where(below > 0, above / below.clamp(min=1e-30), old), self.scale_dtype)
        if not self.error() < before:
            self.scales = old
