"""Loops over all numbers of a matrix that roundings share. The torch code here is what is meant; see weight/encoders.py.

Matrices are [rows, columns] on any device, read a few rows at a time. `across` columns of a row (the last ones may be fewer) and,
where a block has two sizes, as many rows as its first one share a scale. `casts`: dtypes every number is rounded to first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from anybit._lazy import torch
from anybit.weight import packing
from anybit.weight.encoders import encoder
from anybit.weight.weight import row_chunks

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 1 << 18  # weights worked on at once: temporaries of 1 MB stay in the cache
SMALLEST = 1e-38  # a scale of zero is taken for this one


def cast(piece: Tensor, casts: tuple[torch.dtype, ...]) -> Tensor:
    """Rounded to one dtype after the other."""
    for dtype in casts:
        piece = piece.to(dtype)
    return piece


def blocks(numbers: Tensor, across: int) -> Tensor:
    """[rows, columns] -> [rows, blocks, across]; a short last block is filled up with its own last column."""
    missing = -numbers.shape[1] % across
    if missing:
        numbers = torch.cat([numbers, numbers[:, -1:].expand(-1, missing)], dim=1)
    return numbers.unflatten(1, (-1, across))


@encoder("row_ranges")
def row_ranges(matrix: Tensor, across: int, casts: tuple[torch.dtype, ...] = ()) -> tuple[Tensor, Tensor]:
    """The smallest and the largest number of each run, float32 [rows, runs]; not finite where one of them is not.

    A zero is never -0.0, of which it depends on the machine whether it is smaller than 0.0.
    """
    low = torch.empty(matrix.shape[0], -(-matrix.shape[1] // across), device=matrix.device)
    high = torch.empty_like(low)
    for start, stop in row_chunks(*matrix.shape):
        piece = blocks(cast(matrix[start:stop], casts), across)
        low[start:stop], high[start:stop] = piece.amin(-1), piece.amax(-1)
    return low.add_(0.0), high.add_(0.0)


@encoder("row_largest")
def row_largest(matrix: Tensor, across: int, casts: tuple[torch.dtype, ...] = ()) -> Tensor:
    """The largest magnitude of each run, float32 [rows, runs]; not finite where a number is not."""
    rows, columns = matrix.shape
    found = torch.empty(rows, -(-columns // across), device=matrix.device)
    for start, stop in row_chunks(rows, columns, CHUNK):
        found[start:stop] = blocks(cast(matrix[start:stop], casts).abs(), across).amax(-1)
    return found


def over_rows(found: Tensor, down: int, how: str) -> Tensor:
    """[rows, runs] -> [ceil(rows / down), runs]: the "amin" or "amax" of every `down` rows."""
    rows, runs = found.shape
    if down == 1:
        return found
    whole = rows // down * down
    parts = [getattr(found[:whole].view(-1, down, runs), how)(1)] if whole else []
    return torch.cat([*parts, getattr(found[whole:], how)(0, keepdim=True)] if whole < rows else parts)


@encoder("integer_codes")
def integer_codes(
    matrix: Tensor, bits: int, block: tuple[int, int], limits: tuple[int, int], scale: Tensor, *, arithmetic: torch.dtype,
    zero: Tensor | None = None, offset: Tensor | None = None, casts: tuple[torch.dtype, ...] = (), multiply: bool = False,
    zero_after: bool = False, ties: str = "even",
) -> Tensor:  # fmt: skip
    """Packed codes, uint8 [rows, bytes], of round((x - offset) / scale + zero), cut to `limits`; 0 / 0 is 0.

    Parameters lie [ceil(rows / block[0]), ceil(columns / block[1])]. Every operation is rounded: to the dtype that torch
    promotes `arithmetic`, which numbers are in at first, and the parameter's to. `multiply`: by the scale. `zero_after`: it is
    added to the rounded number. `ties`: as in rtn.py.
    """
    rows, columns = matrix.shape
    down, across = block
    packed = torch.empty(rows, packing.row_bytes(columns, bits), dtype=torch.uint8, device=matrix.device)
    for start, stop in row_chunks(rows, columns):
        own = torch.arange(start, stop, device=matrix.device) // down
        scales, zeros, offsets = (_of_rows(part, own) for part in (scale, zero, offset))
        numbers = blocks(cast(matrix[start:stop], casts).to(arithmetic), across)
        numbers = numbers if offsets is None else numbers - offsets
        numbers = numbers * scales if multiply else numbers / scales
        if zeros is not None and not zero_after:
            numbers += zeros
        _round_(numbers, ties)
        if zeros is not None and zero_after:
            numbers += zeros
        numbers = torch.where(torch.isnan(numbers), 0, numbers).clamp_(*limits)
        packed[start:stop] = packing.pack(
            numbers.to(torch.int16 if bits < 16 else torch.int32).flatten(1)[:, :columns], bits
        )
    return packed


def _of_rows(parameter: Tensor | None, block: Tensor) -> Any:
    """A parameter's value for each row, ready to be combined with [rows, blocks, across]."""
    return None if parameter is None else parameter.index_select(0, block).unsqueeze(-1)


def _round_(numbers: Tensor, ties: str) -> None:
    """To whole numbers, in place."""
    if ties == "even":
        numbers.round_()
        return
    if ties != "away":
        raise ValueError(f"ties are 'even' or 'away', not {ties!r}")
    # what lies below one half must not reach it by the addition's own rounding
    away = numbers.trunc()
    numbers.sub_(away)
    away += torch.where(numbers.abs() >= 0.5, numbers.sign(), 0)
    numbers.copy_(away)


@encoder("table_blocks")
def table_blocks(
    flat: Tensor, size: int, middles: Tensor, order: Tensor, casts: tuple[torch.dtype, ...] = ()
) -> tuple[Tensor, Tensor]:
    """4-bit codes of the levels nearest to numbers / largest magnitude, packed, and that magnitude of every `size` numbers.

    `flat` [n] is whole blocks. `order`: the codes by ascending level; `middles`: half ways between them, whose own code is the
    lower one's. The quotient is a product with the reciprocal.
    """
    codes = torch.empty(len(flat) // 2, dtype=torch.uint8, device=flat.device)
    scales = torch.empty(len(flat) // size, dtype=torch.float32, device=flat.device)
    find = _Nearest(middles, order)
    step = max(CHUNK // (2 * size), 1) * 2 * size
    for start in range(0, len(flat), step):
        piece = cast(flat[start : start + step], casts).to(torch.float32).view(-1, size)
        own = piece.abs().amax(1)
        numbers = (piece * (1.0 / own.clamp(min=SMALLEST))[:, None]).clamp_(-1, 1).view(-1)
        scales[start // size : start // size + len(own)] = own
        if bool(torch.isfinite(own).all()):
            codes[start // 2 : (start + len(numbers)) // 2] = packing.pack(find.codes(numbers), 4)
    return codes, scales


class _Nearest:
    """Codes of the nearest level; half way between two levels, the lower one.

    [-1, 1] is cut into steps, and a table tells the code of each: five times faster than a binary search. The few numbers
    that share a step with the middle of two levels are searched for.
    """

    STEPS, UNSURE = 4096, 255

    def __init__(self, middles: Tensor, order: Tensor):
        self.middles, self.order = middles, order.to(torch.uint8)
        steps = torch.arange(self.STEPS + 1, dtype=torch.int32, device=middles.device)
        places = self._step(middles)  # rounding keeps the order, so a later step is a larger number
        self.code_of_step = self.order.index_select(0, torch.searchsorted(places, steps, out_int32=True))
        self.code_of_step[places.long()] = self.UNSURE

    def _step(self, numbers: Tensor) -> Tensor:
        return ((numbers + 1) * (self.STEPS / 2)).to(torch.int32)

    def codes(self, numbers: Tensor) -> Tensor:
        """uint8 codes of numbers between -1 and 1."""
        codes = self.code_of_step.index_select(0, self._step(numbers))
        unsure = (codes == self.UNSURE).nonzero()[:, 0]
        codes[unsure] = self.order[torch.bucketize(numbers[unsure], self.middles)]
        return codes
