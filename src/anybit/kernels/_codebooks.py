"""Codebooks as programs: a grid of codes that name vectors, and what lies beside it. Shared by the CPU and the GPU kernels.

    {"codebook": {"grid": ..., "vector": [rows, columns], "books": K, "entries": ..., "signs": ...}}

The grid is that of a weight of the same shape: its codes are those of the vectors, its scale (and zero) that of the numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from anybit.kernels._grids import COMPUTE, Grid, Refused, Slot, Workspace, grid_program
from anybit.weight import nodes
from anybit.weight.nodes import Node
from anybit.weight.packing import row_bytes

# What a kernel keeps of the tables [K, entries, rows, columns], stored or fixed.
Tables = Callable[[nodes.Codebook, Workspace], Slot]


@dataclass
class Codebook:
    """What a codebook has beyond the Grid that stands for its codes and scale."""

    grid: Grid
    vector: tuple[int, int]
    books: int
    entries: int
    sign_bits: int = 0
    sign_bytes: int = 0
    signs: Slot | None = None


def is_codebook(tree: Node) -> bool:
    """Whether a codebook is a leaf here: alone, or under a grid that scales its numbers."""
    return isinstance(tree, nodes.Codebook) or (isinstance(tree, nodes.Grid) and isinstance(tree.codes, nodes.Codebook))


def codebook_of(tree: Node, space: Workspace, tables: Tables) -> Codebook:
    """The program of a codebook; Refused if there is none."""
    around: nodes.Grid | None = None
    if isinstance(tree, nodes.Grid):
        around, tree = tree, tree.codes
        assert isinstance(tree, nodes.Codebook)
        if around.levels is not None or around.group_index is not None or tree.scale is not None:
            raise Refused("numbers of a codebook that are codes of a table or scaled twice")
    assert isinstance(tree, nodes.Codebook)
    codes, (high, wide) = tree.codes, tree.vector
    if not isinstance(codes, nodes.Codes) or codes.signed or codes.bits > 16:
        raise Refused("codes of a codebook that are not packed numbers of up to 16 bits")
    if codes.packed.shape[-1] != row_bytes(codes.columns, codes.bits):
        raise Refused(f"{codes.packed.shape[-1]} bytes a row for {codes.columns} codes of {codes.bits} bits")
    if wide & (wide - 1):
        raise Refused(f"vectors of {wide} columns; powers of two are read")
    rows, columns = tree.shape[-2:]
    entries = (tree.books() if not isinstance(tree.tables, str) else _fixed(tree)).shape[-3]
    table = tables(tree, space)
    # a grid over the codes alone carries the scale: a weight of the same shape, a code for each element of it
    compute = tree.compute if around is None else around.compute
    grid = Grid(
        rows, columns, row_bytes(codes.columns, codes.bits), codes.bits, 0, columns, COMPUTE[compute],
        space.own_slot(codes.packed, codes.packed.dim() == 3), columns, table,
    )  # fmt: skip
    stand_in = nodes.Grid(nodes.Values(_bytes_like(codes, tree.shape)), tree.scale, block=tree.block)
    if around is not None:
        stand_in = replace(around, codes=stand_in.codes)
    if stand_in.scale is not None:
        found = grid_program(stand_in, _Scales(space))["grid"]
        if found.group % wide and found.group < columns:
            raise Refused(f"scales of {found.group} columns over vectors of {wide}")
        grid.scale, grid.zero, grid.offset, grid.group = found.scale, found.zero, found.offset, found.group
    program = Codebook(grid, (high, wide), tree.count, entries)
    match tree.signs:
        case None:
            return program
        case nodes.Codes(bits=1, signed=False) as signs:
            pass
        case nodes.Codebook(codes=nodes.Codes(signed=False) as signs, tables="even_signs", scale=None, signs=None):
            if wide > 8:
                raise Refused(f"signs of eight columns over vectors of {wide}")
        case other:
            raise Refused(f"signs that are a {type(other).__name__}")
    covered = signs.columns * (1 if signs.bits == 1 else 8)
    if signs.shape[-2] != rows or covered < columns or signs.packed.shape[-1] != row_bytes(signs.columns, signs.bits):
        raise Refused(f"signs of {signs.shape[-2]} x {covered} for {rows} x {columns} weights")
    program.sign_bits, program.sign_bytes = signs.bits, row_bytes(signs.columns, signs.bits)
    program.signs = space.own_slot(signs.packed, signs.packed.dim() == 3)
    return program


def _fixed(tree: nodes.Codebook) -> Tensor:
    from anybit.weight import points

    return points.table(tree.tables)


def _bytes_like(codes: nodes.Codes, shape: tuple[int, ...]) -> Tensor:
    """A tensor of this shape that takes no memory."""
    return torch.empty(1, dtype=torch.uint8, device=codes.packed.device).expand(shape)


class _Scales(Workspace):
    """The same workspace, seen by a grid whose codes are not there."""

    def __init__(self, space: Workspace):
        self.__dict__ = space.__dict__

    def own_slot(self, tensor: Tensor, stacked: bool) -> Slot:
        return super().own_slot(tensor, stacked) if id(tensor) in self._position else Slot(0)


def leaf_of(tree: Node, space: Workspace, tables: Tables) -> dict[str, Any]:
    """The program of a grid or a codebook; Refused if there is none."""
    return {"codebook": codebook_of(tree, space, tables)} if is_codebook(tree) else grid_program(tree, space)
