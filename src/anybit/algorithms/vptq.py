"""VPTQ (arXiv 2409.17066): vectors of one column from a codebook, column by column, each error passed on to later columns.

1. normalise (a mean and a deviation per input or per output), and put columns with large inputs first, where the target can
2. k-means of the vectors, weighted by how much the inputs of their column matter
3. GPTQ's sweep with "nearest centroid" for rounding; with a residual codebook, k-means of what the first sweep left over and
   a second sweep with both
4. codebooks by least squares for the layer's outputs, given the codes; another sweep with those; the best of all is kept
Outlier columns, the first ones, have a codebook of their own. A sweep compares each vector with every centroid: with 65536 of
them that is hours for a large model on a CPU, with 256 about the time of GPTQ. The authors' fine-tuning of whole blocks is
"vptq+finetune" (finetune.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from anybit.algorithms import _vectors
from anybit.errors import NotRepresentable
from anybit.weight import Codebook, Codes, Columns, Crop, Node, Permute, Scaled, Sum, Values, Weight

BLOCK = 128
STEPS = 12  # of conjugate gradients


@dataclass
class _Part:
    """Columns `start` to `stop` and their codebooks; `tables` [entries, v] and `codes` [vectors, columns] for each."""

    books: tuple[Codebook, ...]
    start: int
    stop: int
    tables: list[Tensor]
    codes: list[Tensor]

    def value(self, rows: int, tables: Sequence[Tensor] | None = None) -> Tensor:
        """What the codes stand for, with these tables or its own: [rows, columns]."""
        found = [table[codes] for table, codes in zip(tables or self.tables, self.codes, strict=True)]
        return sum(found[1:], found[0]).transpose(1, 2).flatten(0, 1)[:rows]

    def round(self, column: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The nearest sum for one column [rows], and the codes."""
        vector = self.books[0].vector[0]
        points = torch.nn.functional.pad(column, (0, -len(column) % vector)).view(-1, vector)
        left, codes = points, []
        for table in self.tables:
            codes.append(_vectors.nearest(left, table))
            left = left - table[codes[-1]]
        return (points - left).flatten()[: len(column)], codes


def quantize(
    dense: Tensor,
    target: Weight,
    *,
    hessian: Tensor,
    damp: float = 0.1,
    iterations: int = 20,
    sweeps: int = 4,
    seed: int = 0,
) -> Weight:
    """Codebooks and indices of one matrix [out, in], given `hessian` float32 [in, in].

    `damp`: share of the mean diagonal that is added. `iterations` of k-means. `sweeps`: further ones, each
    with codebooks that fit the codes of the one before. The same for the same `seed`.
    """
    norm = target.tree if isinstance(target.tree, Scaled) else None
    ordered: Any = target.tree if norm is None else norm.child
    columns = ordered.child if isinstance(ordered, Permute) else ordered
    if not isinstance(columns, Columns) or dense.dim() != 2:
        raise NotRepresentable("VPTQ fills codebooks for runs of columns of one matrix; choose another algorithm")
    weight = dense.to(torch.float32).clone()
    hessian = _vectors.usable(hessian, damp)
    scale = bias = None
    importance = torch.ones(len(weight), 1, device=dense.device)
    if norm is not None:
        assert isinstance(norm.scale, Values)
        axis = 0 if norm.scale.shape[0] == 1 else 1
        dtype = norm.scale.tensor.dtype
        bias = weight.mean(axis, keepdim=True).to(dtype)
        scale = (weight - bias.float()).square().mean(axis, keepdim=True).sqrt().clamp(min=1e-4).to(dtype)
        weight = (weight - bias.float()) / scale.float()
        if axis == 0:  # an error of a column counts as many times more as the column is enlarged
            hessian = hessian * scale.float() * scale.float().T
        else:
            importance = scale.float().square()
    index = torch.arange(weight.shape[1], device=dense.device)
    if isinstance(ordered, Permute):
        index = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    weight, hessian = weight[:, index], hessian[index][:, index]
    parts = _parts(columns, weight)
    for number, part in enumerate(parts):
        _fit(part, weight, hessian, importance, 0, iterations, seed + number)
    factor = _vectors.upper_factor(hessian)
    left = _sweep(weight.clone(), factor, parts)
    if any(len(part.books) > 1 for part in parts):
        for number, part in enumerate(parts):
            if len(part.books) > 1:
                _fit(part, left, hessian, importance, 1, iterations, seed + number)
        _sweep(weight.clone(), factor, parts)
    _improve(weight, hessian, factor, parts, sweeps)
    tree: Node = replace(
        columns, parts=tuple(_filled(own, part) for own, part in zip(columns.parts, parts, strict=True))
    )
    if isinstance(ordered, Permute):
        tree = Permute(tree, index.to(torch.int32))
    if norm is not None and scale is not None and bias is not None:
        tree = replace(norm, child=tree, scale=Values(scale), offset=Values(bias))
    return Weight(tree, target.dtype, target.activation)


def _improve(weight: Tensor, hessian: Tensor, factor: Tensor, parts: list[_Part], sweeps: int) -> None:
    """Codebooks by least squares for the codes, then a sweep with them, as long as that helps."""

    def error() -> float:
        wrong = torch.cat([part.value(len(weight)) for part in parts], 1) - weight
        return float((wrong @ hessian * wrong).sum())

    least, best = error(), [(list(part.tables), [own.clone() for own in part.codes]) for part in parts]
    for number in range(2 * sweeps):
        if number % 2 == 0:
            _fit_tables(weight, hessian, parts)
        else:
            _sweep(weight.clone(), factor, parts)
        now = error()
        if now < least:
            least, best = now, [(list(part.tables), [own.clone() for own in part.codes]) for part in parts]
    for part, (tables, codes) in zip(parts, best, strict=True):
        part.tables, part.codes = tables, codes


def _fit_tables(weight: Tensor, hessian: Tensor, parts: list[_Part]) -> None:
    """All codebooks together, rounded to the dtypes they are stored in."""
    sizes = [table.numel() for part in parts for table in part.tables]

    def matrix(numbers: Tensor) -> Tensor:
        pieces, found = iter(numbers.split(sizes)), []
        for part in parts:
            tables = [next(pieces).view(table.shape) for table in part.tables]
            found.append(part.value(len(weight), tables))
        return torch.cat(found, 1)

    def gradient(difference: Tensor) -> Tensor:
        slope, found = difference @ hessian, []
        for part in parts:
            own = slope[:, part.start : part.stop]
            vector = part.books[0].vector[0]
            tiles = (
                torch.nn.functional.pad(own, (0, 0, 0, -len(own) % vector)).unflatten(0, (-1, vector)).transpose(1, 2)
            )
            for table, codes in zip(part.tables, part.codes, strict=True):
                sums = torch.zeros_like(table).index_add_(0, codes.flatten(), tiles.flatten(0, 1))
                found.append(sums.flatten())
        return torch.cat(found)

    start = torch.cat([table.flatten() for part in parts for table in part.tables])
    residual = gradient(weight - matrix(start))
    numbers = iter(_vectors.fitted(start, residual, lambda step: gradient(matrix(step)), STEPS).split(sizes))
    for part in parts:
        part.tables = [
            next(numbers).view(table.shape).to(book.tables.dtype).float()
            for table, book in zip(part.tables, part.books, strict=True)
        ]


def _parts(columns: Columns, weight: Tensor) -> list[_Part]:
    found, start = [], 0
    for crop in columns.parts:
        inside = crop.child if isinstance(crop, Crop) else crop
        books: Any = inside.parts if isinstance(inside, Sum) else (inside,)
        if not all(isinstance(book, Codebook) and isinstance(book.codes, Codes) for book in books):
            raise NotRepresentable(f"VPTQ fills codebooks, not a {type(inside).__name__}; choose another algorithm")
        stop = start + crop.shape[1]
        down = books[0].codes.shape[0]
        codes = [torch.empty(down, stop - start, dtype=torch.int64, device=weight.device) for _ in books]
        found.append(_Part(books, start, stop, [], codes))
        start = stop
    return found


def _fit(
    part: _Part, weight: Tensor, hessian: Tensor, importance: Tensor, place: int, iterations: int, seed: int
) -> None:
    """One codebook of a part, rounded to the dtype it is stored in."""
    book = part.books[place]
    vector, entries = book.vector[0], book.tables.shape[1]
    own = torch.nn.functional.pad(weight[:, part.start : part.stop], (0, 0, 0, -len(weight) % vector))
    points = own.T.reshape(-1, vector)
    rows = torch.nn.functional.pad(importance[:, 0], (0, -len(weight) % vector)).view(-1, vector).mean(1)
    weights = hessian.diagonal()[part.start : part.stop, None] * rows
    table = _vectors.means(points, entries, weights=weights.flatten(), seed=seed, iterations=iterations)
    part.tables.append(table.to(book.tables.dtype).float())


def _sweep(weight: Tensor, factor: Tensor, parts: list[_Part]) -> Tensor:
    """Round every column of `weight` (changed); what was left over of each when its turn came."""
    columns = weight.shape[1]
    left = torch.empty_like(weight)
    owner = {column: part for part in parts for column in range(part.start, part.stop)}
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors = torch.empty(len(weight), stop - start, device=weight.device)
        for column in range(start, stop):
            part = owner[column]
            rounded, codes = part.round(weight[:, column])
            for own, code in zip(part.codes, codes, strict=False):  # without a residual codebook in the first sweep
                own[:, column - part.start] = code
            left[:, column] = weight[:, column] - rounded
            error = left[:, column] / factor[column, column]
            weight[:, column:stop] -= error[:, None] * factor[column, column:stop]
            errors[:, column - start] = error
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return left


def _filled(crop: Node, part: _Part) -> Node:
    books = tuple(
        replace(
            book,
            codes=Codes.of(codes, book.codes.bits),  # type: ignore[attr-defined]
            tables=table.to(book.tables.dtype).view(1, -1, book.vector[0], 1),
        )
        for book, table, codes in zip(part.books, part.tables, part.codes, strict=True)
    )
    assert isinstance(crop, Crop)
    return replace(crop, child=books[0] if len(books) == 1 else replace(crop.child, parts=books))  # type: ignore[call-arg]
