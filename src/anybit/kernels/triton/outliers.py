"""A Triton kernel for the product of a CSR matrix with few numbers a row. Imported only where Triton runs."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sparse_kernel(
    x, y, bias, offsets, places, values, count, X_ROW, X_COLUMN, Y_ROW,
    BIASED: tl.constexpr, ADDED: tl.constexpr, M: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """y[m, row] = sum over the row's numbers of x[m, column] * value, + bias, + y where ADDED. Grid: (rows, tiles of M of x)."""
    row = tl.program_id(0)
    m = tl.program_id(1) * M + tl.arange(0, M)
    mask = m < count
    start, stop = tl.load(offsets + row), tl.load(offsets + row + 1)
    total = tl.zeros((M, K), dtype=tl.float32)
    first = start
    while first < stop:
        number = first + tl.arange(0, K)
        used = number < stop
        column = tl.load(places + number, mask=used, other=0)
        value = tl.load(values + number, mask=used, other=0.0)
        place = m.to(tl.int64)[:, None] * X_ROW + column[None, :] * X_COLUMN
        own = tl.load(x + place, mask=mask[:, None] & used[None, :], other=0.0).to(tl.float32)
        total += own * value[None, :]
        first += K
    sums = tl.sum(total, axis=1)
    where = y + m.to(tl.int64) * Y_ROW + row
    if BIASED:
        sums += tl.load(bias + row).to(tl.float32)
    if ADDED:
        sums += tl.load(where, mask=mask, other=0.0)
    tl.store(where, sums.to(y.dtype.element_ty), mask=mask)
