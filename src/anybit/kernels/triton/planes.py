"""Triton kernels for grids whose codes lie in planes (planes_form.py): a product on tensor cores, and decoding of rows.

Imported only where Triton runs.

    y[m, n] = sum over groups g of  scale[n, g] * (sum over columns of g of level * x  -  zero[n, g] * sum of x)  + offset ...

Levels meet inputs of 16 bits as 16-bit floats, which integers of up to 8 bits, FP8 and E2M1 are exactly: rounded to the
input's dtype are entries of other tables only. Scale, zero and offset come in once a group, in float32. A whole number q of b
bits, put into the upper bits of the mantissa of 1.0, is 1 + q / 2**b: no conversion, and what is too much goes with the zero.
The sum of x is a product with ones, so it lies where the sums do.

The tile: N rows of the weight are the rows of the tensor cores' product, M rows of x its columns; a step is 16 columns of the
weight, that is 16 words, and the words of a block are read ahead into shared memory while the block before is multiplied.
"""

from __future__ import annotations

import triton
import triton.language as tl

from anybit.kernels.triton.grid import E4M3, E5M2, INTERPRETED, NESTED, SIGNED, TABLE, UNSIGNED, _level, _parameter

E2M1 = tl.constexpr(8)  # beside the kinds of levels that grids know


@triton.jit
def _field(raw, c: tl.constexpr, WIDTH: tl.constexpr, AT: tl.constexpr, TAKEN: tl.constexpr, FROM: tl.constexpr):
    """TAKEN bits from bit FROM on, of the codes of columns c and c ^ 1 of every word, at bit AT of its halves."""
    shift: tl.constexpr = (c // 2) % (16 // WIDTH) * WIDTH + FROM - AT
    # the highest bit of a mask is a sign to Triton
    mask: tl.constexpr = ((((1 << TAKEN) - 1) << AT) * 0x00010001 + (1 << 31)) % (1 << 32) - (1 << 31)
    if shift >= 0:
        moved = raw >> shift
    else:
        moved = raw << -shift
    return moved & mask


@triton.jit
def _codes(raw, raw_second, raw_third, c: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, THIRD: tl.constexpr,
           TOP: tl.constexpr):  # fmt: skip
    """The codes of columns c and c ^ 1 of every word, their highest bits below bit TOP of its halves."""
    both = _field(raw, c, FIRST, TOP - FIRST, FIRST, 0)
    if SECOND > 0:
        both |= _field(raw_second, c, SECOND if SECOND > 0 else 1, TOP - FIRST - SECOND, SECOND, 0)
    if THIRD > 0:
        both |= _field(raw_third, c, THIRD if THIRD > 0 else 1, TOP - FIRST - SECOND - THIRD, THIRD, 0)
    return both


@triton.jit
def _half(both, c: tl.constexpr):
    """The half of the words that is column c."""
    if c % 2 == 1:
        half = both >> 16
    else:
        half = both
    return half


@triton.jit
def _numbers_of(raw, raw_second, raw_third, table, c: tl.constexpr, BITS: tl.constexpr, FIRST: tl.constexpr,
                SECOND: tl.constexpr, THIRD: tl.constexpr, LEVELS: tl.constexpr, MANTISSA: tl.constexpr, EXACT: tl.constexpr,
                DTYPE: tl.constexpr):  # fmt: skip
    """Column c in the input's dtype: 1 + code / 2**bits where EXACT, small floats less by a power of two."""
    if EXACT:
        ONES: tl.constexpr = 0x3C003C00 if MANTISSA == 10 else 0x3F803F80
        both = _codes(raw, raw_second, raw_third, c, FIRST, SECOND, THIRD, MANTISSA) | ONES
        number = _half(both, c).to(tl.int16).to(DTYPE, bitcast=True)
    elif LEVELS == E4M3 or LEVELS == E5M2 or LEVELS == E2M1:  # noqa: SIM109 - Triton has no `in`
        # sign and the rest to their places in float16, whose exponent is wider
        STORED: tl.constexpr = 2 if LEVELS == E5M2 else (3 if LEVELS == E4M3 else 1)  # bits of the mantissa
        both = _field(raw, c, FIRST, 15, 1, BITS - 1) | _field(raw, c, FIRST, 10 - STORED, BITS - 1, 0)
        number = _half(both, c).to(tl.int16).to(tl.float16, bitcast=True).to(DTYPE)
    else:
        code = _half(_codes(raw, raw_second, raw_third, c, FIRST, SECOND, THIRD, BITS), c) & 0xFFFF
        if LEVELS == TABLE:
            number = tl.load(table + code).to(DTYPE)
        else:
            number = _level(code, table, None, BITS, LEVELS).to(DTYPE)
    return number


@triton.jit
def _multiplied(left, right, total):
    """left [N, 16] @ right [16, M] added to a float32 total."""
    if INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def _planes_kernel(
    x, y, bias, first_plane, second_plane, third_plane, table,
    scale, scale_inner, scale_shift, scale_table, zero, zero_inner, zero_shift, zero_table,
    offset, offset_inner, offset_shift, offset_table, permutation, tile_expert, tile_first, tile_stop, count,
    ROWS: tl.constexpr, HEIGHT: tl.constexpr, COLUMNS: tl.constexpr, INPUTS: tl.constexpr,
    BITS: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, THIRD: tl.constexpr, LEVELS: tl.constexpr,
    GROUP: tl.constexpr,
    S_KIND: tl.constexpr, S_DOWN: tl.constexpr, S_STRIDE: tl.constexpr, S_WIDTH: tl.constexpr, S_INVERTED: tl.constexpr,
    S_NEGATED: tl.constexpr, S_BITS: tl.constexpr, S_LEVELS: tl.constexpr, S_GROUP: tl.constexpr, S_INNER: tl.constexpr,
    S_INNER_NEGATED: tl.constexpr, S_SHIFT: tl.constexpr,
    Z_KIND: tl.constexpr, Z_DOWN: tl.constexpr, Z_STRIDE: tl.constexpr, Z_WIDTH: tl.constexpr, Z_NEGATED: tl.constexpr,
    Z_BITS: tl.constexpr, Z_LEVELS: tl.constexpr, Z_GROUP: tl.constexpr, Z_INNER: tl.constexpr,
    Z_INNER_NEGATED: tl.constexpr, Z_SHIFT: tl.constexpr,
    O_KIND: tl.constexpr, O_DOWN: tl.constexpr, O_STRIDE: tl.constexpr, O_WIDTH: tl.constexpr, O_NEGATED: tl.constexpr,
    O_BITS: tl.constexpr, O_LEVELS: tl.constexpr, O_GROUP: tl.constexpr, O_INNER: tl.constexpr,
    O_INNER_NEGATED: tl.constexpr, O_SHIFT: tl.constexpr,
    FIRST_EXPERT: tl.constexpr, SECOND_EXPERT: tl.constexpr, THIRD_EXPERT: tl.constexpr, TABLE_EXPERT: tl.constexpr,
    S_EXPERT: tl.constexpr, Z_EXPERT: tl.constexpr, O_EXPERT: tl.constexpr,
    S_INNER_EXPERT: tl.constexpr, S_SHIFT_EXPERT: tl.constexpr, S_TABLE_EXPERT: tl.constexpr,
    Z_INNER_EXPERT: tl.constexpr, Z_SHIFT_EXPERT: tl.constexpr, Z_TABLE_EXPERT: tl.constexpr,
    O_INNER_EXPERT: tl.constexpr, O_SHIFT_EXPERT: tl.constexpr, O_TABLE_EXPERT: tl.constexpr,
    X_ROW, X_COLUMN, Y_PART, Y_ROW,
    PERMUTED: tl.constexpr, GROUPED: tl.constexpr, BIASED: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr, MANTISSA: tl.constexpr,
    EXACT: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """y[part, m, n] = sum over the part's blocks of columns of x[m, c] * weight[n, c].

    Grid: (tiles of rows of the weight, tiles of rows of x, parts of the columns). Rows beyond the end are read as the first and
    not written. Tiles of a stack of experts say which expert they belong to and their rows of x.
    """
    BLOCK: tl.constexpr = 512 // (THIRD if THIRD > 0 else (SECOND if SECOND > 0 else FIRST))
    BLOCKS: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    WHOLE: tl.constexpr = GROUP >= COLUMNS
    STEPS: tl.constexpr = BLOCK // 16
    DTYPE: tl.constexpr = x.dtype.element_ty
    # planes of signed codes are from 0 up
    LOWERED: tl.constexpr = (1 << (BITS - 1)) if LEVELS == SIGNED and BITS < 8 else 0
    TAKEN: tl.constexpr = ((1 << BITS) if EXACT else 0) + LOWERED
    SUMMED: tl.constexpr = TAKEN > 0 or Z_KIND != 0 or O_KIND != 0
    READ: tl.constexpr = UNSIGNED if LEVELS == SIGNED and BITS < 8 else LEVELS

    n = tl.program_id(0) * N + tl.arange(0, N)
    tile = tl.program_id(1)
    part = tl.program_id(2)
    start = tile * M
    stop = count
    if GROUPED:
        expert = tl.load(tile_expert + tile)
        start = tl.load(tile_first + tile).to(tl.int32)
        stop = tl.load(tile_stop + tile).to(tl.int32)
        if start >= stop:
            return
        wide = expert.to(tl.int64)
        first_plane += wide * FIRST_EXPERT
        second_plane += wide * SECOND_EXPERT
        third_plane += wide * THIRD_EXPERT
        table += wide * TABLE_EXPERT
        scale += wide * S_EXPERT
        zero += wide * Z_EXPERT
        offset += wide * O_EXPERT
        if S_KIND == NESTED:
            scale_inner += wide * S_INNER_EXPERT
            scale_shift += wide * S_SHIFT_EXPERT
            scale_table += wide * S_TABLE_EXPERT
        if Z_KIND == NESTED:
            zero_inner += wide * Z_INNER_EXPERT
            zero_shift += wide * Z_SHIFT_EXPERT
            zero_table += wide * Z_TABLE_EXPERT
        if O_KIND == NESTED:
            offset_inner += wide * O_INNER_EXPERT
            offset_shift += wide * O_SHIFT_EXPERT
            offset_table += wide * O_TABLE_EXPERT
    m = start + tl.arange(0, M)
    n_mask = n < ROWS
    m_mask = m < stop
    own_n = tl.where(n_mask, n, 0)
    own_m = tl.where(m_mask, m, start).to(tl.int64)
    w = tl.arange(0, 16)
    place = own_n[:, None] * 16 + w[None, :]
    firsts = first_plane.to(tl.pointer_type(tl.int32)) + place
    seconds = second_plane.to(tl.pointer_type(tl.int32)) + place
    thirds = third_plane.to(tl.pointer_type(tl.int32)) + place
    inputs = x + own_m[None, :] * X_ROW
    ones = tl.full((N, 16), 1.0, tl.float32 if INTERPRETED else DTYPE)

    total = tl.zeros((N, M), dtype=tl.float32)
    sums = tl.zeros((N, M), dtype=tl.float32)
    product = tl.zeros((N, M), dtype=tl.float32)
    per_part: tl.constexpr = (BLOCKS + SPLITS - 1) // SPLITS
    EVEN: tl.constexpr = BLOCKS % SPLITS == 0
    for step in range(per_part):
        block = part * per_part + step
        stored = block if EVEN else tl.minimum(block, BLOCKS - 1)  # beyond the last block inputs are zero
        for c in tl.static_range(STEPS):
            if c % (32 // FIRST) == 0:
                line = stored * (BLOCK * FIRST // 512) + c * FIRST // 32
                raw = tl.load(firsts + line.to(tl.int64) * (HEIGHT * 16))
                if SECOND == 0:
                    raw_second = raw
                if THIRD == 0:
                    raw_third = raw
            if SECOND > 0 and c % (32 // (SECOND if SECOND > 0 else 1)) == 0:
                line = stored * (BLOCK * SECOND // 512) + c * SECOND // 32
                raw_second = tl.load(seconds + line.to(tl.int64) * (HEIGHT * 16))
            if THIRD > 0 and c % (32 // (THIRD if THIRD > 0 else 1)) == 0:
                line = stored * (BLOCK * THIRD // 512) + c * THIRD // 32
                raw_third = tl.load(thirds + line.to(tl.int64) * (HEIGHT * 16))
            level = _numbers_of(
                raw, raw_second, raw_third, table, c, BITS, FIRST, SECOND, THIRD, READ, MANTISSA, EXACT, DTYPE
            )
            column = block * BLOCK + c * 16 + w
            if PERMUTED:
                column = tl.load(permutation + column, mask=column < COLUMNS, other=-1)
                own = tl.load(inputs + column[:, None] * X_COLUMN, mask=(column >= 0)[:, None], other=0.0)
            elif EVEN and INPUTS % BLOCK == 0 and COLUMNS <= INPUTS:
                own = tl.load(inputs + column[:, None] * X_COLUMN)
            else:
                own = tl.load(inputs + column[:, None] * X_COLUMN, mask=(column < INPUTS)[:, None], other=0.0)
            product = _multiplied(level, own, product)
            if SUMMED:
                sums = _multiplied(ones, own, sums)
            if not WHOLE and (c == STEPS - 1 or ((c + 1) * 16) % GROUP == 0):
                group = tl.minimum((block * BLOCK + c * 16) // GROUP, (COLUMNS - 1) // GROUP)
                total += _weighed(
                    product, sums, own_n, group, scale, scale_inner, scale_shift, scale_table, zero, zero_inner, zero_shift,
                    zero_table, offset, offset_inner, offset_shift, offset_table, FACTOR, TAKEN,
                    S_KIND, S_DOWN, S_STRIDE, S_WIDTH, S_INVERTED, S_NEGATED, S_BITS, S_LEVELS, S_GROUP, S_INNER,
                    S_INNER_NEGATED, S_SHIFT, Z_KIND, Z_DOWN, Z_STRIDE, Z_WIDTH, Z_NEGATED, Z_BITS, Z_LEVELS, Z_GROUP,
                    Z_INNER, Z_INNER_NEGATED, Z_SHIFT, O_KIND, O_DOWN, O_STRIDE, O_WIDTH, O_NEGATED, O_BITS, O_LEVELS,
                    O_GROUP, O_INNER, O_INNER_NEGATED, O_SHIFT,
                )  # fmt: skip
                product = tl.zeros((N, M), dtype=tl.float32)
                sums = tl.zeros((N, M), dtype=tl.float32)
    if WHOLE:
        total = _weighed(
            product, sums, own_n, 0, scale, scale_inner, scale_shift, scale_table, zero, zero_inner, zero_shift,
            zero_table, offset, offset_inner, offset_shift, offset_table, FACTOR, TAKEN,
            S_KIND, S_DOWN, S_STRIDE, S_WIDTH, S_INVERTED, S_NEGATED, S_BITS, S_LEVELS, S_GROUP, S_INNER,
            S_INNER_NEGATED, S_SHIFT, Z_KIND, Z_DOWN, Z_STRIDE, Z_WIDTH, Z_NEGATED, Z_BITS, Z_LEVELS, Z_GROUP,
            Z_INNER, Z_INNER_NEGATED, Z_SHIFT, O_KIND, O_DOWN, O_STRIDE, O_WIDTH, O_NEGATED, O_BITS, O_LEVELS,
            O_GROUP, O_INNER, O_INNER_NEGATED, O_SHIFT,
        )  # fmt: skip
    if BIASED:
        total += tl.load(bias + n, mask=n_mask, other=0.0).to(tl.float32)[:, None]
    where = y + part * Y_PART + m.to(tl.int64)[:, None] * Y_ROW + n[None, :]
    tl.store(where, tl.trans(total).to(y.dtype.element_ty), mask=m_mask[:, None] & n_mask[None, :])


@triton.jit
def _weighed(
    product, sums, row, group, scale, scale_inner, scale_shift, scale_table, zero, zero_inner, zero_shift, zero_table,
    offset, offset_inner, offset_shift, offset_table, FACTOR: tl.constexpr, TAKEN: tl.constexpr,
    S_KIND: tl.constexpr, S_DOWN: tl.constexpr, S_STRIDE: tl.constexpr, S_WIDTH: tl.constexpr, S_INVERTED: tl.constexpr,
    S_NEGATED: tl.constexpr, S_BITS: tl.constexpr, S_LEVELS: tl.constexpr, S_GROUP: tl.constexpr, S_INNER: tl.constexpr,
    S_INNER_NEGATED: tl.constexpr, S_SHIFT: tl.constexpr,
    Z_KIND: tl.constexpr, Z_DOWN: tl.constexpr, Z_STRIDE: tl.constexpr, Z_WIDTH: tl.constexpr, Z_NEGATED: tl.constexpr,
    Z_BITS: tl.constexpr, Z_LEVELS: tl.constexpr, Z_GROUP: tl.constexpr, Z_INNER: tl.constexpr,
    Z_INNER_NEGATED: tl.constexpr, Z_SHIFT: tl.constexpr,
    O_KIND: tl.constexpr, O_DOWN: tl.constexpr, O_STRIDE: tl.constexpr, O_WIDTH: tl.constexpr, O_NEGATED: tl.constexpr,
    O_BITS: tl.constexpr, O_LEVELS: tl.constexpr, O_GROUP: tl.constexpr, O_INNER: tl.constexpr,
    O_INNER_NEGATED: tl.constexpr, O_SHIFT: tl.constexpr,
):  # fmt: skip
    """scale * (FACTOR * product - (TAKEN + zero) * sums) + offset * sums, of one group of every row."""
    found = product * FACTOR
    if Z_KIND != 0:
        z = _parameter(zero, zero_inner, zero_shift, zero_table, row, group, None, 0.0, Z_KIND, Z_DOWN, Z_STRIDE, Z_WIDTH,
                       Z_NEGATED, 0, Z_BITS, Z_LEVELS, Z_GROUP, Z_INNER, Z_INNER_NEGATED, Z_SHIFT)  # fmt: skip
        found -= (z + TAKEN)[:, None] * sums
    elif TAKEN > 0:
        found -= sums * TAKEN
    if S_KIND != 0:
        s = _parameter(scale, scale_inner, scale_shift, scale_table, row, group, None, 1.0, S_KIND, S_DOWN, S_STRIDE, S_WIDTH,
                       S_NEGATED, 0, S_BITS, S_LEVELS, S_GROUP, S_INNER, S_INNER_NEGATED, S_SHIFT)  # fmt: skip
        if S_INVERTED:
            s = 1.0 / s
        found = found * s[:, None]
    if O_KIND != 0:
        o = _parameter(offset, offset_inner, offset_shift, offset_table, row, group, None, 0.0, O_KIND, O_DOWN, O_STRIDE,
                       O_WIDTH, O_NEGATED, 0, O_BITS, O_LEVELS, O_GROUP, O_INNER, O_INNER_NEGATED, O_SHIFT)  # fmt: skip
        found += o[:, None] * sums
    return found


@triton.jit
def _planes_rows_kernel(
    out, index, first_plane, second_plane, third_plane, table,
    scale, scale_inner, scale_shift, scale_table, zero, zero_inner, zero_shift, zero_table,
    offset, offset_inner, offset_shift, offset_table, count, first_row,
    HEIGHT: tl.constexpr, COLUMNS: tl.constexpr,
    BITS: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, THIRD: tl.constexpr, LEVELS: tl.constexpr,
    GROUP: tl.constexpr,
    S_KIND: tl.constexpr, S_DOWN: tl.constexpr, S_STRIDE: tl.constexpr, S_WIDTH: tl.constexpr, S_INVERTED: tl.constexpr,
    S_NEGATED: tl.constexpr, S_BITS: tl.constexpr, S_LEVELS: tl.constexpr, S_GROUP: tl.constexpr, S_INNER: tl.constexpr,
    S_INNER_NEGATED: tl.constexpr, S_SHIFT: tl.constexpr,
    Z_KIND: tl.constexpr, Z_DOWN: tl.constexpr, Z_STRIDE: tl.constexpr, Z_WIDTH: tl.constexpr, Z_NEGATED: tl.constexpr,
    Z_BITS: tl.constexpr, Z_LEVELS: tl.constexpr, Z_GROUP: tl.constexpr, Z_INNER: tl.constexpr,
    Z_INNER_NEGATED: tl.constexpr, Z_SHIFT: tl.constexpr,
    O_KIND: tl.constexpr, O_DOWN: tl.constexpr, O_STRIDE: tl.constexpr, O_WIDTH: tl.constexpr, O_NEGATED: tl.constexpr,
    O_BITS: tl.constexpr, O_LEVELS: tl.constexpr, O_GROUP: tl.constexpr, O_INNER: tl.constexpr,
    O_INNER_NEGATED: tl.constexpr, O_SHIFT: tl.constexpr,
    INDEXED: tl.constexpr, N: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """out [count, COLUMNS] = rows first_row .. of the weight, or those that `index` names, in the order of the codes.

    Grid: (tiles of rows, blocks of columns). The arithmetic is (level - zero) * scale + offset in float32.
    """
    BLOCK: tl.constexpr = 512 // (THIRD if THIRD > 0 else (SECOND if SECOND > 0 else FIRST))
    own = tl.program_id(0) * N + tl.arange(0, N)
    block = tl.program_id(1)
    row_mask = own < count
    if INDEXED:
        row = tl.load(index + own, mask=row_mask, other=0).to(tl.int32)
    else:
        row = tl.where(row_mask, first_row + own, first_row)
    w = tl.arange(0, 16)
    place = row[:, None] * 16 + w[None, :]
    LOWERED: tl.constexpr = (1 << (BITS - 1)) if LEVELS == SIGNED and BITS < 8 else 0
    READ: tl.constexpr = UNSIGNED if LEVELS == SIGNED and BITS < 8 else LEVELS
    for c in tl.static_range(BLOCK // 16):
        if c % (32 // FIRST) == 0:
            line = (block * (BLOCK * FIRST // 512) + c * FIRST // 32).to(tl.int64)
            raw = tl.load(first_plane.to(tl.pointer_type(tl.int32)) + line * (HEIGHT * 16) + place)
            if SECOND == 0:
                raw_second = raw
            if THIRD == 0:
                raw_third = raw
        if SECOND > 0 and c % (32 // (SECOND if SECOND > 0 else 1)) == 0:
            line = (block * (BLOCK * SECOND // 512) + c * SECOND // 32).to(tl.int64)
            raw_second = tl.load(second_plane.to(tl.pointer_type(tl.int32)) + line * (HEIGHT * 16) + place)
        if THIRD > 0 and c % (32 // (THIRD if THIRD > 0 else 1)) == 0:
            line = (block * (BLOCK * THIRD // 512) + c * THIRD // 32).to(tl.int64)
            raw_third = tl.load(third_plane.to(tl.pointer_type(tl.int32)) + line * (HEIGHT * 16) + place)
        value = (
            _numbers_of(raw, raw_second, raw_third, table, c, BITS, FIRST, SECOND, THIRD, READ, 0, False, tl.float32)
            * FACTOR
        )
        if LOWERED > 0:
            value -= LOWERED
        group = tl.minimum((block * BLOCK + c * 16) // GROUP, (COLUMNS - 1) // GROUP)
        if Z_KIND != 0:
            z = _parameter(zero, zero_inner, zero_shift, zero_table, row, group, None, 0.0, Z_KIND, Z_DOWN, Z_STRIDE, Z_WIDTH,
                           Z_NEGATED, 0, Z_BITS, Z_LEVELS, Z_GROUP, Z_INNER, Z_INNER_NEGATED, Z_SHIFT)  # fmt: skip
            value -= z[:, None]
        if S_KIND != 0:
            s = _parameter(scale, scale_inner, scale_shift, scale_table, row, group, None, 1.0, S_KIND, S_DOWN, S_STRIDE,
                           S_WIDTH, S_NEGATED, 0, S_BITS, S_LEVELS, S_GROUP, S_INNER, S_INNER_NEGATED, S_SHIFT)  # fmt: skip
            value = value / s[:, None] if S_INVERTED else value * s[:, None]
        if O_KIND != 0:
            o = _parameter(offset, offset_inner, offset_shift, offset_table, row, group, None, 0.0, O_KIND, O_DOWN, O_STRIDE,
                           O_WIDTH, O_NEGATED, 0, O_BITS, O_LEVELS, O_GROUP, O_INNER, O_INNER_NEGATED, O_SHIFT)  # fmt: skip
            value += o[:, None]
        column = block * BLOCK + c * 16 + w
        where = out + own.to(tl.int64)[:, None] * COLUMNS + column[None, :]
        tl.store(where, value.to(out.dtype.element_ty), mask=row_mask[:, None] & (column < COLUMNS)[None, :])
