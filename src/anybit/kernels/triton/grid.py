"""Triton kernels for one grid of codes or one codebook: a product with few rows of input, and decoding.

Imported only where Triton runs.

Codes are read from the canonical packing (weight/packing.py) in runs that start on a byte: the codes of one byte for 1, 2, 4
and 8 bits, eight codes in `bits` bytes for the others.

    bits = 4   run r of a row: byte r         codes 2r, 2r+1           bits = 3   run r: bytes 3r .. 3r+2   codes 8r .. 8r+7

The run of a codebook is one vector: its K codes lie side by side in the stream, wherever in a byte they start.

A tile is [rows, runs]; code p of every run is decoded together, and meets the inputs run * PER + p. So no register is ever
shuffled to put codes in order, and a group of columns (a multiple of eight) never cuts a run.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

# the enumerations of ../cpu/csrc/grid.h, as Triton's kernels may see them
UNSIGNED, SIGNED, TABLE, E4M3, E5M2 = (tl.constexpr(number) for number in range(5))
F32, BF16, F16 = (tl.constexpr(number) for number in range(3))
E8M0, NESTED = tl.constexpr(6), tl.constexpr(7)
# Triton's interpreter cuts bfloat16 off instead of rounding, and cannot multiply it
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"))


@triton.jit
def _read(pointer, mask, other: tl.constexpr):
    """A load; without a mask all of it."""
    if mask is None:
        value = tl.load(pointer)
    else:
        value = tl.load(pointer, mask=mask, other=other)
    return value


@triton.jit
def _number(pointer, at, mask, other: tl.constexpr, KIND: tl.constexpr, NEGATED: tl.constexpr):
    """Parameters as float32; E8M0 bytes are 2**(byte - 127), 255 is NaN."""
    if KIND == E8M0:
        byte = _read(pointer + at, mask, 127).to(tl.int32)
        bits = tl.where(byte == 0, 0x00400000, byte << 23)
        value = tl.where(byte == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)
    else:
        value = _read(pointer + at, mask, other).to(tl.float32)
    if NEGATED:
        value = -value
    return value


@triton.jit
def _rounded(value, COMPUTE: tl.constexpr):
    """As an operation in the format's own dtype would leave it."""
    if COMPUTE == BF16:
        if INTERPRETED:
            bits = value.to(tl.int32, bitcast=True)
            return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        return value.to(tl.bfloat16).to(tl.float32)
    if COMPUTE == F16:
        return value.to(tl.float16).to(tl.float32)
    return value


@triton.jit
def _level(code, table, mask, BITS: tl.constexpr, LEVELS: tl.constexpr):
    """int32 codes -> float32 levels. FP8 goes through float16, whose exponent is wider: no card needs FP8 units for it."""
    if LEVELS == UNSIGNED:
        return code.to(tl.float32)
    if LEVELS == SIGNED:
        return ((code ^ (1 << (BITS - 1))) - (1 << (BITS - 1))).to(tl.float32)
    if LEVELS == TABLE:
        return _read(table + code, mask, 0.0)
    if LEVELS == E4M3:  # s eeee mmm -> s 0eeee mmm0000000, a number 2**8 too small
        half = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
        return half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return (code << 8).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _code(codes, raw, row_start, run, mask, p: tl.constexpr, BITS: tl.constexpr):
    """Code p of every run: from its byte, or from the one or two bytes it lies in."""
    if 8 % BITS == 0:
        return (raw >> (p * BITS)) & ((1 << BITS) - 1)
    first: tl.constexpr = p * BITS // 8
    shift: tl.constexpr = p * BITS % 8
    at = row_start + run * BITS + first
    value = tl.load(codes + at, mask=mask, other=0).to(tl.int32) >> shift
    if shift + BITS > 8:
        value |= tl.load(codes + at + 1, mask=mask, other=0).to(tl.int32) << (8 - shift)
    return value & ((1 << BITS) - 1)


@triton.jit
def _from_stream(codes, row_start, number, mask, BITS: tl.constexpr, ROW_BYTES: tl.constexpr):
    """Codes by their number in the row, wherever they lie: up to three bytes."""
    bit = number * BITS
    byte = bit >> 3
    value = tl.load(codes + row_start + byte, mask=mask, other=0).to(tl.int32)
    if 8 % BITS != 0:
        value |= tl.load(codes + row_start + byte + 1, mask=mask & (byte + 1 < ROW_BYTES), other=0).to(tl.int32) << 8
    if BITS > 9:
        value |= tl.load(codes + row_start + byte + 2, mask=mask & (byte + 2 < ROW_BYTES), other=0).to(tl.int32) << 16
    return (value >> (bit & 7)) & ((1 << BITS) - 1)


@triton.jit
def _vector_codes(
    codes, signs, row_start, run, row, mask, BITS: tl.constexpr, ROW_BYTES: tl.constexpr, PER: tl.constexpr, BOOKS: tl.constexpr,
    SIGN_BITS: tl.constexpr, SIGN_BYTES: tl.constexpr,
):  # fmt: skip
    """What all elements of a vector share: its first two codes, and the code of its eight signs."""
    first = _from_stream(codes, row_start, run * BOOKS, mask, BITS, ROW_BYTES)
    second = first
    if BOOKS > 1:
        second = _from_stream(codes, row_start, run * BOOKS + 1, mask, BITS, ROW_BYTES)
    pattern = first
    if SIGN_BITS > 1:
        pattern = _from_stream(signs, row.to(tl.int64) * SIGN_BYTES, run * PER >> 3, mask, SIGN_BITS, SIGN_BYTES)
    return first, second, pattern


@triton.jit
def _vector_level(
    codes, table, signs, sign_table, first, second, pattern, row_start, run, row, mask, p: tl.constexpr, BITS: tl.constexpr,
    ROW_BYTES: tl.constexpr, COMPUTE: tl.constexpr, PER: tl.constexpr, HIGH: tl.constexpr, BOOKS: tl.constexpr,
    ENTRIES: tl.constexpr, SIGN_BITS: tl.constexpr, SIGN_BYTES: tl.constexpr,
):  # fmt: skip
    """Element p of the vector that the codes of a run name: the tables' vectors added in order, each sum rounded."""
    element = (row % HIGH) * PER + p
    total = _rounded(tl.load(table + first * (HIGH * PER) + element, mask=mask, other=0.0).to(tl.float32), COMPUTE)
    for book in tl.static_range(1, BOOKS):
        code = second
        if book > 1:
            code = _from_stream(codes, row_start, run * BOOKS + book, mask, BITS, ROW_BYTES)
        place = (book * ENTRIES + code) * (HIGH * PER) + element
        value = _rounded(tl.load(table + place, mask=mask, other=0.0).to(tl.float32), COMPUTE)
        total = _rounded(total + value, COMPUTE)
    if SIGN_BITS > 0:
        column = run * PER + p
        if SIGN_BITS == 1:  # a bit for every weight
            negative = _from_stream(signs, row.to(tl.int64) * SIGN_BYTES, column, mask, 1, SIGN_BYTES) > 0
        else:  # a code for every eight weights
            negative = tl.load(sign_table + pattern * 8 + (column & 7), mask=mask, other=0.0) > 0
        total = tl.where(negative, -total, total)
    return total


@triton.jit
def _nested_code(pointer, at, mask, BITS: tl.constexpr):
    """Codes by their number in a stream that may end with the byte in which a code begins."""
    if BITS == 8:
        code = _read(pointer + at, mask, 0).to(tl.int32)
    else:
        byte = at * BITS >> 3
        code = _read(pointer + byte, mask, 0).to(tl.int32)
        if 8 % BITS != 0:
            used = (at * BITS & 7) + BITS > 8
            if mask is not None:
                used = used & mask
            code |= tl.load(pointer + byte + 1, mask=used, other=0).to(tl.int32) << 8
        code = (code >> (at * BITS & 7)) & ((1 << BITS) - 1)
    return code


@triton.jit
def _parameter(
    pointer, inner, shift, table, row, group, mask, other: tl.constexpr,
    KIND: tl.constexpr, DOWN: tl.constexpr, STRIDE: tl.constexpr, WIDTH: tl.constexpr, NEGATED: tl.constexpr,
    COMPUTE: tl.constexpr, BITS: tl.constexpr, LEVELS: tl.constexpr, GROUP: tl.constexpr, INNER: tl.constexpr,
    INNER_NEGATED: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """One value per (row / DOWN, group). Of codes: level * inner + shift, codes counted as one stream; GROUP 0: one `inner`."""
    at = (row // DOWN) * STRIDE
    if WIDTH > 1:
        at = at + group
    if KIND == NESTED:
        code = _nested_code(pointer, at, mask, BITS)
        value = _level(code, table, mask, BITS, LEVELS)
        if GROUP == 0:
            value *= _number(inner, 0, None, 1.0, INNER, INNER_NEGATED)
        else:
            value *= _number(inner, at // (GROUP if GROUP > 0 else 1), mask, 1.0, INNER, INNER_NEGATED)
        if SHIFT != 0:
            value += _number(shift, 0, None, 0.0, SHIFT, False)
    else:
        value = _number(pointer, at, mask, other, KIND, NEGATED)
    return _rounded(value, COMPUTE)


@triton.jit
def _weigh(level, s, z, o, SCALED: tl.constexpr, INVERTED: tl.constexpr, SHIFTED: tl.constexpr, MOVED: tl.constexpr,
           COMPUTE: tl.constexpr):  # fmt: skip
    """(level - zero) * scale + offset, each operation in the format's dtype."""
    w = _rounded(level, COMPUTE)
    if SHIFTED:
        w = _rounded(w - z, COMPUTE)
    if SCALED and INVERTED:
        w = _rounded(w / s, COMPUTE)
    elif SCALED:
        w = _rounded(w * s, COMPUTE)
    if MOVED:
        w = _rounded(w + o, COMPUTE)
    return w


@triton.jit
def _product_kernel(
    x, y, bias, codes, table, scale, scale_inner, scale_shift, scale_table, zero, zero_inner, zero_shift, zero_table,
    offset, offset_inner, offset_shift, offset_table, signs, sign_table, permutation, tile_expert, tile_first, tile_stop,
    count, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INPUTS: tl.constexpr, ROW_BYTES: tl.constexpr,
    BITS: tl.constexpr, LEVELS: tl.constexpr, GROUP: tl.constexpr, COMPUTE: tl.constexpr,
    VECTOR: tl.constexpr, HIGH: tl.constexpr, BOOKS: tl.constexpr, ENTRIES: tl.constexpr, SIGN_BITS: tl.constexpr,
    SIGN_BYTES: tl.constexpr,
    S_KIND: tl.constexpr, S_DOWN: tl.constexpr, S_STRIDE: tl.constexpr, S_WIDTH: tl.constexpr, S_INVERTED: tl.constexpr,
    S_NEGATED: tl.constexpr, S_BITS: tl.constexpr, S_LEVELS: tl.constexpr, S_GROUP: tl.constexpr, S_INNER: tl.constexpr,
    S_INNER_NEGATED: tl.constexpr, S_SHIFT: tl.constexpr,
    Z_KIND: tl.constexpr, Z_DOWN: tl.constexpr, Z_STRIDE: tl.constexpr, Z_WIDTH: tl.constexpr, Z_NEGATED: tl.constexpr,
    Z_BITS: tl.constexpr, Z_LEVELS: tl.constexpr, Z_GROUP: tl.constexpr, Z_INNER: tl.constexpr,
    Z_INNER_NEGATED: tl.constexpr, Z_SHIFT: tl.constexpr,
    O_KIND: tl.constexpr, O_DOWN: tl.constexpr, O_STRIDE: tl.constexpr, O_WIDTH: tl.constexpr, O_NEGATED: tl.constexpr,
    O_BITS: tl.constexpr, O_LEVELS: tl.constexpr, O_GROUP: tl.constexpr, O_INNER: tl.constexpr,
    O_INNER_NEGATED: tl.constexpr, O_SHIFT: tl.constexpr,
    CODES_EXPERT: tl.constexpr, TABLE_EXPERT: tl.constexpr, S_EXPERT: tl.constexpr, Z_EXPERT: tl.constexpr,
    O_EXPERT: tl.constexpr, SIGNS_EXPERT: tl.constexpr,
    S_INNER_EXPERT: tl.constexpr, S_SHIFT_EXPERT: tl.constexpr, S_TABLE_EXPERT: tl.constexpr,
    Z_INNER_EXPERT: tl.constexpr, Z_SHIFT_EXPERT: tl.constexpr, Z_TABLE_EXPERT: tl.constexpr,
    O_INNER_EXPERT: tl.constexpr, O_SHIFT_EXPERT: tl.constexpr, O_TABLE_EXPERT: tl.constexpr,
    X_ROW, X_COLUMN, Y_PART, Y_ROW,
    PERMUTED: tl.constexpr, GROUPED: tl.constexpr, BIASED: tl.constexpr,
    ONE_GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, R: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """y[part, m, n] = sum over the part's columns of x[m, c] * weight[n, c], for M rows of x and N rows of the weight.

    Grid: (blocks of rows of the weight, tiles of rows of x, parts of the columns). M = 1 multiplies and adds; more rows go
    through tl.dot, which wants at least 16. Tiles of a stack of experts say which expert they belong to and their rows of x.
    """
    PER: tl.constexpr = VECTOR if BOOKS > 0 else (8 // BITS if 8 % BITS == 0 else 8)
    RUNS: tl.constexpr = (COLUMNS + PER - 1) // PER
    n = tl.program_id(0) * N + tl.arange(0, N)
    tile = tl.program_id(1)
    part = tl.program_id(2)
    first = tile * M
    stop = count
    if GROUPED:
        expert = tl.load(tile_expert + tile)
        first = tl.load(tile_first + tile)
        stop = tl.load(tile_stop + tile)
        if first >= stop:
            return
        wide = expert.to(tl.int64)
        codes += wide * CODES_EXPERT
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
        signs += wide * SIGNS_EXPERT
    m = first + tl.arange(0, M)
    n_mask = n < ROWS
    m_mask = m < stop
    row_start = (n // HIGH).to(tl.int64)[:, None] * ROW_BYTES
    if M == 1:
        total = tl.zeros((N, R), dtype=tl.float32)
    else:
        total = tl.zeros((M, N), dtype=tl.float32)
    steps: tl.constexpr = (RUNS + R * SPLITS - 1) // (R * SPLITS)
    for step in range(steps):
        run = (part * steps + step) * R + tl.arange(0, R)
        mask = n_mask[:, None] & (run < RUNS)[None, :]
        raw = run[None, :]
        if BOOKS == 0 and 8 % BITS == 0:
            raw = tl.load(codes + row_start + run[None, :], mask=mask, other=0).to(tl.int32)
        if ONE_GROUP:  # the tile lies in one group: a value per row
            group = (part * steps + step) * R * PER // GROUP
            own_rows = n[:, None]
            own_mask = n_mask[:, None] & (group * GROUP < COLUMNS)
        else:
            group = (run * PER // GROUP)[None, :]
            own_rows = n[:, None] + tl.zeros((1, R), dtype=tl.int32)
            own_mask = mask
        s, z, o = 1.0, 0.0, 0.0
        if S_KIND != 0:
            s = _parameter(
                scale, scale_inner, scale_shift, scale_table, own_rows, group, own_mask, 1.0, S_KIND, S_DOWN, S_STRIDE,
                S_WIDTH, S_NEGATED, COMPUTE, S_BITS, S_LEVELS, S_GROUP, S_INNER, S_INNER_NEGATED, S_SHIFT,
            )  # fmt: skip
        if Z_KIND != 0:
            z = _parameter(
                zero, zero_inner, zero_shift, zero_table, own_rows, group, own_mask, 0.0, Z_KIND, Z_DOWN, Z_STRIDE,
                Z_WIDTH, Z_NEGATED, COMPUTE, Z_BITS, Z_LEVELS, Z_GROUP, Z_INNER, Z_INNER_NEGATED, Z_SHIFT,
            )  # fmt: skip
        if O_KIND != 0:
            o = _parameter(
                offset, offset_inner, offset_shift, offset_table, own_rows, group, own_mask, 0.0, O_KIND, O_DOWN, O_STRIDE,
                O_WIDTH, O_NEGATED, COMPUTE, O_BITS, O_LEVELS, O_GROUP, O_INNER, O_INNER_NEGATED, O_SHIFT,
            )  # fmt: skip
        if BOOKS > 0:
            head, second, pattern = _vector_codes(
                codes,
                signs,
                row_start,
                run[None, :],
                n[:, None],
                mask,
                BITS,
                ROW_BYTES,
                PER,
                BOOKS,
                SIGN_BITS,
                SIGN_BYTES,
            )
        for p in tl.static_range(PER):
            if BOOKS > 0:
                level = _vector_level(
                    codes, table, signs, sign_table, head, second, pattern, row_start, run[None, :], n[:, None], mask, p,
                    BITS, ROW_BYTES, COMPUTE, PER, HIGH, BOOKS, ENTRIES, SIGN_BITS, SIGN_BYTES,
                )  # fmt: skip
            else:
                code = _code(codes, raw, row_start, run[None, :], mask, p, BITS)
                level = _level(code, table, mask, BITS, LEVELS)
            w = _weigh(level, s, z, o, S_KIND != 0, S_INVERTED, Z_KIND != 0, O_KIND != 0, COMPUTE)
            column = run * PER + p
            used = column < COLUMNS
            if PERMUTED:
                column = tl.load(permutation + column, mask=used, other=-1)
                used = column >= 0
            else:
                used = used & (column < INPUTS)
            if M == 1:
                own = tl.load(x + first * X_ROW + column * X_COLUMN, mask=used, other=0.0).to(tl.float32)
                total += tl.where(used[None, :], w, 0.0) * own[None, :]
            else:
                place = m.to(tl.int64)[:, None] * X_ROW + column[None, :] * X_COLUMN
                own = tl.load(x + place, mask=m_mask[:, None] & used[None, :], other=0.0)
                kept = tl.where(used[None, :], w, 0.0).to(own.dtype)
                if INTERPRETED:
                    own, kept = own.to(tl.float32), kept.to(tl.float32)
                total = tl.dot(own, tl.trans(kept), total, input_precision="ieee")
    if M == 1:
        sums = tl.sum(total, axis=1)
        if BIASED:
            sums += tl.load(bias + n, mask=n_mask, other=0.0).to(tl.float32)
        tl.store(y + part * Y_PART + first * Y_ROW + n, sums.to(y.dtype.element_ty), mask=n_mask)
    else:
        if BIASED:
            total += tl.load(bias + n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
        place = part * Y_PART + m.to(tl.int64)[:, None] * Y_ROW + n[None, :]
        tl.store(y + place, total.to(y.dtype.element_ty), mask=m_mask[:, None] & n_mask[None, :])


@triton.jit
def _decode_kernel(
    out, codes, table, scale, scale_inner, scale_shift, scale_table, zero, zero_inner, zero_shift, zero_table,
    offset, offset_inner, offset_shift, offset_table, signs, sign_table, count, first_row,
    COLUMNS: tl.constexpr, ROW_BYTES: tl.constexpr,
    BITS: tl.constexpr, LEVELS: tl.constexpr, GROUP: tl.constexpr, COMPUTE: tl.constexpr,
    VECTOR: tl.constexpr, HIGH: tl.constexpr, BOOKS: tl.constexpr, ENTRIES: tl.constexpr, SIGN_BITS: tl.constexpr,
    SIGN_BYTES: tl.constexpr,
    S_KIND: tl.constexpr, S_DOWN: tl.constexpr, S_STRIDE: tl.constexpr, S_WIDTH: tl.constexpr, S_INVERTED: tl.constexpr,
    S_NEGATED: tl.constexpr, S_BITS: tl.constexpr, S_LEVELS: tl.constexpr, S_GROUP: tl.constexpr, S_INNER: tl.constexpr,
    S_INNER_NEGATED: tl.constexpr, S_SHIFT: tl.constexpr,
    Z_KIND: tl.constexpr, Z_DOWN: tl.constexpr, Z_STRIDE: tl.constexpr, Z_WIDTH: tl.constexpr, Z_NEGATED: tl.constexpr,
    Z_BITS: tl.constexpr, Z_LEVELS: tl.constexpr, Z_GROUP: tl.constexpr, Z_INNER: tl.constexpr,
    Z_INNER_NEGATED: tl.constexpr, Z_SHIFT: tl.constexpr,
    O_KIND: tl.constexpr, O_DOWN: tl.constexpr, O_STRIDE: tl.constexpr, O_WIDTH: tl.constexpr, O_NEGATED: tl.constexpr,
    O_BITS: tl.constexpr, O_LEVELS: tl.constexpr, O_GROUP: tl.constexpr, O_INNER: tl.constexpr,
    O_INNER_NEGATED: tl.constexpr, O_SHIFT: tl.constexpr,
    N: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """out [count, COLUMNS] = rows first_row .. of the weight, in the order of the codes."""
    PER: tl.constexpr = VECTOR if BOOKS > 0 else (8 // BITS if 8 % BITS == 0 else 8)
    own = tl.program_id(0) * N + tl.arange(0, N)
    run = tl.program_id(1) * R + tl.arange(0, R)
    row_mask = own < count
    row = first_row + own
    row_start = (row // HIGH).to(tl.int64)[:, None] * ROW_BYTES
    mask = row_mask[:, None] & (run * PER < COLUMNS)[None, :]
    raw = run[None, :]
    if BOOKS == 0 and 8 % BITS == 0:
        raw = tl.load(codes + row_start + run[None, :], mask=mask, other=0).to(tl.int32)
    group = (run * PER // GROUP)[None, :]
    rows = row[:, None] + tl.zeros((1, R), dtype=tl.int32)
    s, z, o = 1.0, 0.0, 0.0
    if S_KIND != 0:
        s = _parameter(
            scale, scale_inner, scale_shift, scale_table, rows, group, mask, 1.0, S_KIND, S_DOWN, S_STRIDE,
            S_WIDTH, S_NEGATED, COMPUTE, S_BITS, S_LEVELS, S_GROUP, S_INNER, S_INNER_NEGATED, S_SHIFT,
        )  # fmt: skip
    if Z_KIND != 0:
        z = _parameter(
            zero, zero_inner, zero_shift, zero_table, rows, group, mask, 0.0, Z_KIND, Z_DOWN, Z_STRIDE,
            Z_WIDTH, Z_NEGATED, COMPUTE, Z_BITS, Z_LEVELS, Z_GROUP, Z_INNER, Z_INNER_NEGATED, Z_SHIFT,
        )  # fmt: skip
    if O_KIND != 0:
        o = _parameter(
            offset, offset_inner, offset_shift, offset_table, rows, group, mask, 0.0, O_KIND, O_DOWN, O_STRIDE,
            O_WIDTH, O_NEGATED, COMPUTE, O_BITS, O_LEVELS, O_GROUP, O_INNER, O_INNER_NEGATED, O_SHIFT,
        )  # fmt: skip
    if BOOKS > 0:
        head, second, pattern = _vector_codes(
            codes,
            signs,
            row_start,
            run[None, :],
            row[:, None],
            mask,
            BITS,
            ROW_BYTES,
            PER,
            BOOKS,
            SIGN_BITS,
            SIGN_BYTES,
        )
    for p in tl.static_range(PER):
        if BOOKS > 0:
            level = _vector_level(
                codes, table, signs, sign_table, head, second, pattern, row_start, run[None, :], row[:, None], mask, p,
                BITS, ROW_BYTES, COMPUTE, PER, HIGH, BOOKS, ENTRIES, SIGN_BITS, SIGN_BYTES,
            )  # fmt: skip
        else:
            code = _code(codes, raw, row_start, run[None, :], mask, p, BITS)
            level = _level(code, table, mask, BITS, LEVELS)
        w = _weigh(level, s, z, o, S_KIND != 0, S_INVERTED, Z_KIND != 0, O_KIND != 0, COMPUTE)
        column = run * PER + p
        place = own.to(tl.int64)[:, None] * COLUMNS + column[None, :]
        tl.store(out + place, w.to(out.dtype.element_ty), mask=row_mask[:, None] & (column < COLUMNS)[None, :])
