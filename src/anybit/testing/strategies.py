"""Hypothesis strategies: random weight trees of every kind of node, with numbers. Needs hypothesis."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from hypothesis import strategies as st

from anybit.weight import nodes
from anybit.weight.nodes import Node
from anybit.weight.weight import Weight

if TYPE_CHECKING:
    from torch import Tensor

Draw = Callable[[Any], Any]
WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16)
COMPUTE = ("float32", "bfloat16", "float16")
_TABLES = {2: ("ternary",), 4: ("nf4", "fp4_bnb", "e2m1", "iq4_nl"), 6: ("e2m3", "e3m2"), 8: ("e4m3",)}

seeds = st.integers(0, 1 << 30)
sizes = st.integers(1, 13)


def _generator(draw: Draw) -> torch.Generator:
    return torch.Generator().manual_seed(draw(seeds))


def floats(draw: Draw, *shape: int) -> Tensor:
    dtype = getattr(torch, draw(st.sampled_from(COMPUTE)))
    return (torch.rand(shape, generator=_generator(draw)) * 2 - 0.9).to(dtype)


@st.composite
def values(draw: Draw, rows: int, columns: int, invertible: bool = False) -> nodes.Values:
    """Stored numbers, sometimes bytes read through a table. `invertible`: no zeros, and perhaps inverted."""
    if not invertible and draw(st.booleans()):
        number = torch.randint(110, 135, (rows, columns), generator=_generator(draw), dtype=torch.uint8)
        return nodes.Values(number, levels="e8m0")
    tensor = floats(draw, rows, columns)
    tensor = torch.where(tensor.abs() < 0.05, torch.full_like(tensor, 0.5), tensor)
    return nodes.Values(tensor, inverted=invertible and draw(st.booleans()), negated=draw(st.booleans()))


@st.composite
def codes(
    draw: Draw, rows: int, columns: int, bits: int | None = None, below: int | None = None, signed: bool | None = None
) -> nodes.Codes:
    bits = bits or draw(st.sampled_from(WIDTHS))
    signed = draw(st.booleans()) if signed is None else signed
    numbers = torch.randint(0, min(1 << bits, below or 1 << bits), (rows, columns), generator=_generator(draw))
    return nodes.Codes.of(numbers, bits, signed)


@st.composite
def parameter(
    draw: Draw, rows: int, columns: int, block: tuple[int, int], groups: int | None = None, depth: int = 1
) -> Node:
    """Values per block, or shared along an axis; sometimes a grid of its own."""
    height = draw(st.sampled_from((1, -(-rows // block[0]))))
    width = draw(st.sampled_from((1, groups if groups is not None else -(-columns // block[1]))))
    if depth and draw(st.integers(0, 3)) == 0:
        return draw(grids(height, width, depth=0))
    return draw(values(height, width, invertible=draw(st.booleans())))


@st.composite
def grids(draw: Draw, rows: int, columns: int, depth: int = 1) -> nodes.Grid:
    block = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    kind = draw(st.sampled_from(("integers", "table", "stored table", "values")))
    levels: Any = None
    if kind == "table":
        bits = draw(st.sampled_from(sorted(_TABLES)))
        levels = draw(st.sampled_from(_TABLES[bits]))
        own: Node = draw(codes(rows, columns, bits, below=3 if bits == 2 else 127, signed=False))
    elif kind == "stored table":
        levels = floats(draw, 5)
        own = draw(codes(rows, columns, 3, below=5, signed=False))
    elif kind == "values":
        own = nodes.Values(torch.randint(-9, 9, (rows, columns), generator=_generator(draw), dtype=torch.int8))
    else:
        own = draw(codes(rows, columns))
    groups = group_index = None
    if depth and draw(st.integers(0, 3)) == 0:
        groups = draw(st.integers(1, 4))
        group_index = torch.randint(0, groups, (columns,), generator=_generator(draw), dtype=torch.int32)
    present = draw(st.lists(st.sampled_from(("scale", "zero", "offset")), unique=True))
    parts = {name: draw(parameter(rows, columns, block, groups, depth)) for name in present}
    return nodes.Grid(
        own, levels=levels, block=block, group_index=group_index, compute=draw(st.sampled_from(COMPUTE)), **parts
    )


@st.composite
def codebooks(draw: Draw, rows: int | None = None, columns: int | None = None) -> nodes.Codebook:
    """Sizes are rounded down to whole vectors; without sizes one to three vectors each way."""
    high, wide = draw(st.sampled_from(((1, 8), (8, 1), (2, 4), (1, 1))))
    down = max(rows // high, 1) if rows else draw(st.integers(1, 3))
    across = max(columns // wide, 1) if columns else draw(st.integers(1, 3))
    books, entries = draw(st.integers(1, 4)), draw(st.sampled_from((3, 16)))
    own = draw(codes(down, across * books, draw(st.sampled_from((4, 8, 12, 16))), below=entries, signed=False))
    block = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    shape = (down * high, across * wide)
    scale = draw(st.none() | parameter(*shape, block))
    signs = draw(st.none() | codes(*shape, 1, signed=False))
    return nodes.Codebook(
        own, floats(draw, books, entries, high, wide), (high, wide), scale, signs, block, draw(st.sampled_from(COMPUTE))
    )


@st.composite
def sparse(draw: Draw, rows: int, columns: int) -> nodes.Sparse:
    mask = torch.rand(rows, columns, generator=_generator(draw)) < draw(st.sampled_from((0.0, 0.3, 1.0)))
    places = torch.nonzero(mask)
    offsets = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    stored = len(places)
    own: Node = nodes.Values(floats(draw, 1, stored))
    if stored and draw(st.booleans()):
        own = nodes.Grid(draw(codes(1, stored, 8)), nodes.Values(torch.tensor([[0.25]])))
    return nodes.Sparse(offsets, places[:, 1].to(torch.int32), own, columns)


@st.composite
def masked(draw: Draw, rows: int, columns: int) -> nodes.Masked:
    mask = torch.rand(rows, columns, generator=_generator(draw)) < 0.5
    offsets = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
    return nodes.Masked(
        nodes.Codes.of(mask.to(torch.uint8), 1), nodes.Values(floats(draw, 1, int(mask.sum()))), offsets
    )


@st.composite
def trees(draw: Draw, rows: int | None = None, columns: int | None = None, depth: int = 2) -> Node:
    """Any matrix."""
    rows, columns = rows or draw(sizes), columns or draw(sizes)
    if depth == 0 or draw(st.integers(0, 2)) == 0:
        leaf = draw(st.sampled_from((values, grids, sparse, masked, _cropped_codebook)))
        return draw(leaf(rows, columns))
    kind = draw(st.sampled_from(("sum", "columns", "rows", "permute", "transpose", "scaled", "rotate", "view", "crop")))
    below = depth - 1
    match kind:
        case "sum":
            parts = tuple(draw(trees(rows, columns, below)) for _ in range(draw(st.integers(1, 3))))
            return nodes.Sum(parts, draw(st.sampled_from(COMPUTE)))
        case "columns" if columns > 1:
            cut = draw(st.integers(1, columns - 1))
            return nodes.Columns((draw(trees(rows, cut, below)), draw(trees(rows, columns - cut, below))))
        case "rows" if rows > 1:
            cut = draw(st.integers(1, rows - 1))
            return nodes.Rows((draw(trees(cut, columns, below)), draw(trees(rows - cut, columns, below))))
        case "permute":
            order = torch.randperm(columns, generator=_generator(draw)).to(torch.int32)
            return nodes.Permute(draw(trees(rows, columns, below)), order)
        case "transpose":
            return nodes.Transpose(draw(trees(columns, rows, below)))
        case "scaled":
            scale = draw(st.none() | parameter(rows, columns, (1, 1)))
            offset = draw(st.none() | parameter(rows, columns, (1, 1)))
            return nodes.Scaled(draw(trees(rows, columns, below)), scale, offset, draw(st.sampled_from(COMPUTE)))
        case "rotate":
            return draw(_rotated(rows, columns, below))
        case "view":
            return draw(_viewed(rows, columns, below))
    padded = draw(trees(rows + draw(st.integers(0, 3)), columns + draw(st.integers(0, 3)), below))
    return nodes.Crop(padded, rows, columns)


@st.composite
def _cropped_codebook(draw: Draw, rows: int, columns: int) -> Node:
    book = draw(codebooks(rows + 7, columns + 7))
    return nodes.Crop(book, rows, columns) if book.shape != (rows, columns) else book


@st.composite
def _rotated(draw: Draw, rows: int, columns: int, depth: int) -> Node:
    side = draw(st.sampled_from(("input", "output")))
    size = draw(st.sampled_from((2, 4, 8)))
    matrix = torch.randn(size, size, generator=_generator(draw)) if draw(st.booleans()) else None
    high, wide = (rows, -(-columns // size) * size) if side == "input" else (-(-rows // size) * size, columns)
    turned = nodes.Rotate(draw(trees(high, wide, depth)), size, side, matrix)
    return turned if turned.shape == (rows, columns) else nodes.Crop(turned, rows, columns)


@st.composite
def _viewed(draw: Draw, rows: int, columns: int, depth: int) -> Node:
    """The same elements in another width; groups straddle rows. Sometimes with slack behind the last element."""
    width = draw(st.integers(1, rows * columns))
    return nodes.View(draw(trees(-(-rows * columns // width), width, depth)), rows, columns)


@st.composite
def weights(draw: Draw, rows: int | None = None, columns: int | None = None) -> Weight:
    return Weight(draw(trees(rows, columns)), draw(st.sampled_from(COMPUTE)))
