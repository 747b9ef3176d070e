"""Codes as planes of bits: the form that planes.py reads, and the way back to the canonical packing.

A code of 3, 5, 6 or 7 bits is cut into planes of 4, 2 and 1 bits, the highest bits first; other codes are one plane. A plane of
`width` bits is cut into blocks of 512 / width columns, [blocks, rows, 16 words of 32 bits]: what a tile of rows reads of a block
lies in one run. Column 16 c + w of a block is in word w, and the even c have the lower halves of the words:

    width = 4    word w:   7 7 7 7  5 5 5 5  3 3 3 3  1 1 1 1 | 6 6 6 6  4 4 4 4  2 2 2 2  0 0 0 0      (digits are c)

So one shift and one mask give two codes, each in the place of a mantissa of 16-bit floats, and 16 words side by side are 16
neighbouring columns: the depth of a step of tensor cores, and the least run of columns with a scale of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from anybit.kernels._grids import E4M3, SIGNED, Grid, Workspace
from anybit.weight import nodes
from anybit.weight.nodes import Node
from anybit.weight.packing import pack, unpack

WORDS = 16
LINE = 4 * WORDS  # bytes of a row in a block of a plane
WIDTHS: dict[int, tuple[int, ...]] = {
    1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,),
}  # fmt: skip
_CHUNK = 1 << 24  # codes that are moved at a time
_MOST_FILLING = 8  # at most one column in so many is added to fill the last block


def block_columns(bits: int) -> int:
    """Columns of a block of all planes."""
    return 512 // WIDTHS[bits][-1]


def filled(columns: int, bits: int) -> int:
    """Columns once the last block is filled."""
    return -(-columns // block_columns(bits)) * block_columns(bits)


def _levels(tree: Node) -> Any:
    """Those of the grid that a leaf is made of."""
    while not isinstance(tree, nodes.Grid):
        tree = tree.child  # type: ignore[attr-defined]
    return tree.levels


def moved(tree: Node, grid: Grid, space: Workspace) -> dict[str, Any] | None:
    """Cut the codes of a leaf's grid into planes, which take their place in the workspace; None: they stay what they are."""
    if space.quantized_inputs and grid.bits == 8 and grid.levels in (SIGNED, E4M3):
        return None  # units for 8-bit numbers read them as they are
    bits, block = grid.bits, block_columns(grid.bits)
    columns = grid.row_bytes * 8 // bits  # as they are stored: a crop may leave some out
    whole = grid.group >= grid.columns
    if (
        grid.compute != 0
        or columns * bits % 8
        or columns < grid.columns
        or (filled(columns, bits) - columns) * _MOST_FILLING > columns
    ):
        return None
    if not whole and (grid.group % WORDS or (block % grid.group and grid.group % block)):
        return None
    slot = grid.codes.position
    codes = space.tensors[slot]
    lead = codes.shape[0] if grid.codes.stride else 1
    rows = codes.numel() * codes.element_size() // max(1, lead * grid.row_bytes)
    if rows < grid.rows or rows * lead * grid.row_bytes != codes.numel():
        return None
    width = filled(columns, bits)
    shapes = [(lead, width * one // 512, rows, LINE) for one in WIDTHS[bits]]
    if space.meta:
        planes = [torch.empty(shape, dtype=torch.uint8, device="meta") for shape in shapes]
    else:
        flat = codes.view(torch.uint8).view(lead, rows, grid.row_bytes)
        planes = cut(flat, bits, columns, flip=grid.levels == SIGNED and bits < 8)
    small_floats = _levels(tree) == "e2m1" and bits == 4
    form = {
        "slot": slot, "bits": bits, "columns": columns, "rows": rows, "flip": grid.levels == SIGNED and bits < 8,
        "shape": list(codes.shape), "dtype": str(codes.dtype).removeprefix("torch."), "small_floats": small_floats,
        "planes": [space.add(plane).position for plane in planes],
    }  # fmt: skip
    space.tensors[slot] = torch.empty(0, dtype=codes.dtype, device=codes.device)
    return form


def _pieces(lead: int, rows: int, columns: int) -> Iterator[tuple[int, slice]]:
    step = max(1, _CHUNK // max(columns, 1))
    for expert in range(lead):
        for first in range(0, rows, step):
            yield expert, slice(first, min(rows, first + step))


def _offsets(bits: int) -> list[tuple[int, int]]:
    """(width, place of its lowest bit in the code) of every plane."""
    found, left = [], bits
    for width in WIDTHS[bits]:
        left -= width
        found.append((width, left))
    return found


def _place(c: int, width: int) -> int:
    """Where in a word the code of columns 16 c + w lies."""
    return (c & 1) * 16 + (c >> 1) * width


def cut(packed: Tensor, bits: int, columns: int, flip: bool = False) -> list[Tensor]:
    """Canonical bytes [lead, rows, bytes] -> planes [lead, blocks, rows, 64] uint8. `flip`: signed codes, from 0 up."""
    lead, rows, _ = packed.shape
    width = filled(columns, bits)
    planes = [
        torch.empty(lead, width * one // 512, rows, WORDS, dtype=torch.int32, device=packed.device)
        for one in WIDTHS[bits]
    ]
    for expert, own in _pieces(lead, rows, columns):
        codes = unpack(packed[expert, own], bits, columns)
        codes = codes ^ (1 << (bits - 1)) if flip else codes
        codes = torch.nn.functional.pad(codes, (0, width - columns))
        for plane, (one, low) in zip(planes, _offsets(bits), strict=True):
            fields = ((codes >> low) & ((1 << one) - 1)).view(codes.shape[0], -1, 32 // one, WORDS)
            words = torch.zeros(*fields.shape[:2], WORDS, dtype=torch.int32, device=packed.device)
            for c in range(32 // one):
                words |= fields[:, :, c].to(torch.int32) << _place(c, one)
            plane[expert, :, own] = words.transpose(0, 1)
    return [plane.view(torch.uint8) for plane in planes]


def joined(planes: list[Tensor], bits: int, columns: int, flip: bool = False) -> Tensor:
    """Inverse of `cut`: canonical bytes [lead, rows, bytes]."""
    lead, _, rows, _ = planes[0].shape
    found = torch.empty(lead, rows, columns * bits // 8, dtype=torch.uint8, device=planes[0].device)
    for expert, own in _pieces(lead, rows, columns):
        codes = torch.zeros(own.stop - own.start, filled(columns, bits), dtype=torch.uint8, device=found.device)
        for plane, (one, low) in zip(planes, _offsets(bits), strict=True):
            words = plane[expert, :, own].contiguous().view(torch.int32).transpose(0, 1)  # [rows, blocks, 16]
            fields = codes.view(codes.shape[0], -1, 32 // one, WORDS)
            for c in range(32 // one):
                fields[:, :, c] |= (((words >> _place(c, one)) & ((1 << one) - 1)) << low).to(torch.uint8)
        codes = codes[:, :columns]
        found[expert, own] = pack(codes ^ (1 << (bits - 1)) if flip else codes, bits)
    return found


def restored_codes(form: dict[str, Any], tensors: list[Tensor]) -> Tensor:
    """The codes as the weight had them."""
    planes = [tensors[position] for position in form["planes"]]
    found = joined(planes, form["bits"], form["columns"], form["flip"])
    return found.view(getattr(torch, form["dtype"])).view(form["shape"])
