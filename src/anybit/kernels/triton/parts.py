"""A Triton kernel that adds up what the parts of the columns gave, in a fixed order. Imported only where Triton runs."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sum_kernel(
    parts, y, bias, PART, ROW, Y_ROW, ROWS: tl.constexpr, SPLITS: tl.constexpr, BIASED: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """y[m, n] = parts[0, m, n] + parts[1, m, n] + ... + bias[n]. Grid: (tiles of n, m)."""
    n = tl.program_id(0) * N + tl.arange(0, N)
    m = tl.program_id(1).to(tl.int64)
    mask = n < ROWS
    total = tl.zeros((N,), dtype=tl.float32)
    for part in tl.static_range(SPLITS):
        total += tl.load(parts + part * PART + m * ROW + n, mask=mask, other=0.0)
    if BIASED:
        total += tl.load(bias + n, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + m * Y_ROW + n, total.to(y.dtype.element_ty), mask=mask)
