"""Codebooks for the native kernels: small tables in float32, large ones as they are stored."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from anybit.kernels._codebooks import codebook_of
from anybit.kernels._grids import Refused, Slot, Workspace
from anybit.kernels.cpu import native
from anybit.weight import nodes, points
from anybit.weight.nodes import Node
from anybit.weight.weight import row_chunks

VECTORS = 5  # ANYBIT_VECTORS of grid.h
FLOATS_AND_POINTS = 3  # ANYBIT_F32_POINTS
MOST_BOOKS = 8
_SMALL = 1 << 14  # numbers of a table that are kept in float32: 64 KB, about a first cache level


def codebook_program(tree: Node, space: Workspace) -> dict[str, Any]:
    """The program of a codebook, or of a grid over one; Refused if there is none."""
    book = codebook_of(tree, space, _tables)
    if book.grid.compute != 0:
        raise Refused("numbers of a codebook in another arithmetic than float32")
    if book.books > MOST_BOOKS:
        raise Refused(f"{book.books} codebooks; up to {MOST_BOOKS} are read")
    if book.vector[1] > 16:
        raise Refused(f"vectors of {book.vector[1]} columns; up to 16 are read")
    assert book.grid.table is not None
    kind = native.KINDS[space.tensors[book.grid.table.position].dtype]
    inside = tree.codes if isinstance(tree, nodes.Grid) else tree
    assert isinstance(inside, nodes.Codebook)
    if isinstance(inside.tables, str) and points_of(inside.tables) is not None:
        kind = FLOATS_AND_POINTS
    return {"codebook": {**vars(book), "table_kind": kind}}


def _tables(tree: nodes.Codebook, space: Workspace) -> Slot:
    """Tables of a codebook. Tall vectors are read in eights, up to seven numbers beyond the last one."""
    if isinstance(tree.tables, str):
        return space.add(fixed_table(tree.tables, "meta" if space.meta else "cpu"))
    books, stacked = tree.books(), tree.books().dim() == 5
    entries, high, wide = books.shape[-3:]
    _check_codes(tree, entries, space)
    each = books.numel() // (books.shape[0] if stacked else 1)
    overread = wide == 1 and high % 8 != 0
    as_stored = each > _SMALL and books.dtype in native.KINDS and (high > 1 or (wide >= 8 and tree.count == 1))
    if as_stored and not overread:
        return space.own_slot(books, stacked)
    kept = books if as_stored else books.to(torch.float32)
    flat = kept.flatten(1) if stacked else kept.flatten()
    return space.add(torch.nn.functional.pad(flat, (0, 8)) if overread else flat, stacked)


def _check_codes(tree: nodes.Codebook, entries: int, space: Workspace) -> None:
    """Native code believes what it is told: no code names an entry beyond a table that is not full."""
    codes = tree.codes
    if space.meta or not isinstance(codes, nodes.Codes) or entries >= 1 << codes.bits:
        return
    flat = nodes.Codes(codes.packed.flatten(0, -2), codes.bits, codes.columns)
    for start, stop in row_chunks(*flat.shape):
        largest = int(flat.integers(slice(start, stop), slice(0, flat.columns)).max())
        if largest >= entries:
            raise ValueError(f"a code that names entry {largest} of a codebook with {entries}")


@functools.lru_cache(maxsize=32)
def fixed_table(name: str, device: str) -> Tensor:
    """A table that no file stores, float32 and one for all weights; its points behind it. Shared: never write into it."""
    table, words = points.table(name).to(torch.float32).flatten(), points_of(name)
    return (table if words is None else torch.cat([table, words])).to(device)


@functools.lru_cache(maxsize=32)
def points_of(name: str) -> Tensor | None:
    """The values of a table and its points as 16-bit words of indices into them, seen as float32; None of another table.

    64 bytes: the values, lifted above zero, again and again. Then a word for each point of eight numbers of up to four values,
    or of four numbers of up to eight, the first one lowest.
    """
    table = points.table(name).flatten(0, -2)
    wide = table.shape[-1]
    bits = {4: 3, 8: 2}.get(wide)
    values, index = table.unique(return_inverse=True)
    if bits is None or len(values) > 1 << bits or bool((values != values.to(torch.int8)).any()):
        return None
    lifted = torch.zeros(1 << bits, dtype=torch.int8)
    lifted[: len(values)] = (values - values.min().clamp(max=0)).to(torch.int8)
    words = (index << torch.arange(0, bits * wide, bits)).sum(-1)
    words = torch.where(words >= 1 << 15, words - (1 << 16), words).to(torch.int16)
    return torch.cat([lifted.repeat(64 >> bits).view(torch.float32), words.view(torch.float32)])
