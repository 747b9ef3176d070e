"""Native encoders: rows of floats -> codes, and codes <-> bits (csrc/encode*.h). Twins of the torch loops of the same names.

Each gives the bits of its torch twin, on every instruction-set level and any number of threads, or NotImplemented: for tensors
that are not plain and on the CPU, for what it has no code for, and where the library is not built. Rows that hold something
unusual for llama.cpp's searches are handed back to the torch code, which also has the words for what is wrong with them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from anybit.kernels.cpu import native

(RANGES, INTEGERS, SMALL_FLOATS, TABLE_BLOCKS, PACK, UNPACK, SEARCH, INTO_BLOCKS, FROM_BLOCKS, TURN, SWAP_HALVES,
 DENSE) = range(12)  # fmt: skip
TILE = 2048  # numbers that an encoder works on at once
SMALL = 1 << 15  # numbers that one thread encodes sooner than a second wakes up
FEW = 1 << 12  # codes that torch packs as soon as a call across the border


class Source(ctypes.Structure):
    """`anybit_source` of encode.h."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("kind", "rows", "columns", "stride")),
        ("casts", ctypes.c_int64 * 2),
    ]


def _job(name: str, *fields: tuple[str, Any]) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields)})


def _integers(*names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_int64) for name in names]


def _pointers(*names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_void_p) for name in names]


_SOURCE = ("source", Source)
_FIELDS = ("q", "sc", "mn", "d", "m", "fours")
Ranges = _job("Ranges", _SOURCE, *_integers("across"), *_pointers("low", "high"))
Integers = _job(
    "Integers", _SOURCE,
    *_integers("down", "across", "arithmetic", "multiply", "zero_after", "away", "first", "last", "bits", "row_bytes"),
    *_pointers("scale", "zero", "offset", "codes"),
)  # fmt: skip
SmallFloats = _job(
    "SmallFloats", _SOURCE,
    *_integers("down", "across", "multiply", "quotient", "exponent_bits", "mantissa_bits", "ties", "zeros", "bits", "row_bytes"),
    ("top", ctypes.c_double), *_pointers("scale", "codes"),
)  # fmt: skip
TableBlocks = _job("TableBlocks", _SOURCE, *_integers("size"), *_pointers("middles", "pairs", "scales", "codes"))
Packing = _job("Packing", *_pointers("codes", "to"), *_integers("columns", "from_stride", "to_stride", "bits", "start"))
Turn = _job("Turn", *_pointers("from", "to"), *_integers("rows", "from_stride"))
SwapHalves = _job("SwapHalves", *_pointers("from", "to"))
Dense = _job("Dense", *_pointers("weight", "x", "bias", "y"), *_integers("kind", "rows", "columns", "n"))
Fields = _job("Fields", *_pointers(*_FIELDS))
Search = _job("Search", _SOURCE, *_integers("type"), *_pointers("importance"), ("fields", Fields), *_pointers("odd"))
Blocks = _job("Blocks", *_integers("type"), ("fields", Fields), *_pointers("blocks"))


def level() -> str:
    """The instruction-set level that the encoders run at."""
    name: bytes = native.library().anybit_encoders()
    return name.decode()


def _run(what: int, job: ctypes.Structure, count: int, numbers: int, grain: int = 1) -> None:
    threads = 1 if numbers < SMALL else torch.get_num_threads()
    if not native.library().anybit_encode(what, ctypes.byref(job), count, grain, threads):
        raise RuntimeError(f"the native library has no encoder {what}")


def _plain(*tensors: Tensor) -> bool:
    """Whether a pointer says all about these tensors, and there is a library to give it to."""
    return native.why_not() is None and all(
        type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu" and not tensor.is_neg()
        for tensor in tensors
    )


def _source(matrix: Tensor, casts: tuple[torch.dtype, ...]) -> Source | None:
    """`matrix` [rows, columns] and the roundings that change anything; None for what is not read natively."""
    if matrix.dtype not in native.KINDS or not _plain(matrix) or matrix.numel() == 0:
        return None
    if matrix.shape[1] > 1 and matrix.stride(1) != 1:
        return None
    own, kinds = matrix.dtype, []
    for dtype in casts:
        if dtype not in native.KINDS:
            return None
        if dtype != own and dtype != torch.float32:
            kinds.append(native.KINDS[dtype])
            own = dtype
    if len(kinds) > 2:
        return None
    kinds += [-1] * (2 - len(kinds))
    stride = matrix.stride(0) if matrix.shape[0] > 1 else matrix.shape[1]
    return Source(matrix.data_ptr(), native.KINDS[matrix.dtype], *matrix.shape, stride, (ctypes.c_int64 * 2)(*kinds))


# --- ranges -----------------------------------------------------------------------------------------------------------------


def row_ranges(matrix: Tensor, across: int, casts: tuple[torch.dtype, ...] = ()) -> Any:
    source = _source(matrix, casts)
    if source is None:
        return NotImplemented
    low = torch.empty(matrix.shape[0], -(-matrix.shape[1] // across))
    high = torch.empty_like(low)
    _run(RANGES, Ranges(source, across, low.data_ptr(), high.data_ptr()), matrix.shape[0], matrix.numel())
    return low, high


def row_largest(matrix: Tensor, across: int, casts: tuple[torch.dtype, ...] = ()) -> Any:
    source = _source(matrix, casts)
    if source is None:
        return NotImplemented
    high = torch.empty(matrix.shape[0], -(-matrix.shape[1] // across))
    _run(RANGES, Ranges(source, across, None, high.data_ptr()), matrix.shape[0], matrix.numel())
    return high


# --- codes ------------------------------------------------------------------------------------------------------------------


def _numbers(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.to(torch.float32).contiguous()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def integer_codes(
    matrix: Tensor, bits: int, block: tuple[int, int], limits: tuple[int, int], scale: Tensor, *, arithmetic: torch.dtype,
    zero: Tensor | None = None, offset: Tensor | None = None, casts: tuple[torch.dtype, ...] = (), multiply: bool = False,
    zero_after: bool = False, ties: str = "even",
) -> Any:  # fmt: skip
    parameters = [part for part in (scale, zero, offset) if part is not None]
    source = _source(matrix, (*casts, arithmetic))
    if source is None or bits > 8 or ties not in ("even", "away") or not _plain(*parameters):
        return NotImplemented
    rounded = torch.promote_types(arithmetic, scale.dtype)  # every operation, if the others do not widen it
    if rounded not in native.KINDS or (offset is not None and torch.promote_types(arithmetic, offset.dtype) != rounded):
        return NotImplemented
    rows, columns = matrix.shape
    row_bytes = (columns * bits + 7) // 8
    packed = torch.empty(rows, row_bytes, dtype=torch.uint8)
    parts = [_numbers(part) for part in (scale, zero, offset)]
    job = Integers(
        source, *block, native.KINDS[rounded], multiply, zero_after, ties == "away", *limits, bits, row_bytes,
        *map(_pointer, parts), packed.data_ptr(),
    )  # fmt: skip
    _run(INTEGERS, job, rows, matrix.numel())
    return packed


# exponent bits, mantissa bits, largest finite value
_SMALL_FLOATS = {
    "e2m1": (2, 1, 6.0), "e2m3": (2, 3, 7.5), "e3m2": (3, 2, 28.0), "e4m3": (4, 3, 448.0), "e5m2": (5, 2, 57344.0),
}  # fmt: skip
_TIES, _ZEROS = ("even", "away", "zero"), ("signed", "below", "plain")


def small_float_codes(
    matrix: Tensor, levels: str, bits: int, block: tuple[int, int], by: Tensor, *, multiply: bool,
    casts: tuple[torch.dtype, ...], quotient: torch.dtype, ties: str, zeros: str,
) -> Any:  # fmt: skip
    source = _source(matrix, casts)
    if source is None or quotient not in native.KINDS or ties not in _TIES or zeros not in _ZEROS or not _plain(by):
        return NotImplemented
    scale = by.to(torch.float32).contiguous()
    if levels not in _SMALL_FLOATS or not bool(torch.isfinite(scale).all()):
        return NotImplemented
    rows, columns = matrix.shape
    exponent_bits, mantissa_bits, top = _SMALL_FLOATS[levels]
    row_bytes = (columns * bits + 7) // 8
    packed = torch.empty(rows, row_bytes, dtype=torch.uint8)
    job = SmallFloats(
        source, *block, multiply, native.KINDS[quotient], exponent_bits, mantissa_bits, _TIES.index(ties),
        _ZEROS.index(zeros), bits, row_bytes, top, scale.data_ptr(), packed.data_ptr(),
    )  # fmt: skip
    _run(SMALL_FLOATS, job, rows, matrix.numel())
    return packed


def table_blocks(flat: Tensor, size: int, middles: Tensor, order: Tensor, casts: tuple[torch.dtype, ...] = ()) -> Any:
    matrix = flat[None]
    source = _source(matrix, casts)
    if source is None or size % 16 or (size > TILE and size % TILE) or len(flat) % size or len(order) != 16:
        return NotImplemented
    if not _plain(middles, order):
        return NotImplemented
    scales, packed = torch.empty(len(flat) // size), torch.empty(len(flat) // 2, dtype=torch.uint8)
    middles, pairs = middles.contiguous(), None
    if order.tolist() != list(range(16)):
        pairs = (order[None, :] | (order[:, None] << 4)).to(torch.uint8).reshape(-1).contiguous()
    job = TableBlocks(source, size, middles.data_ptr(), _pointer(pairs), scales.data_ptr(), packed.data_ptr())
    _run(TABLE_BLOCKS, job, len(scales), len(flat))
    return packed, scales


# --- bits -------------------------------------------------------------------------------------------------------------------


def pack(codes: Tensor, bits: int) -> Any:
    if bits > 7 or codes.numel() < FEW or codes.is_floating_point() or codes.is_complex() or not _plain(codes):
        return NotImplemented
    columns = codes.shape[-1]
    flat = codes.to(torch.uint8).reshape(-1, columns).contiguous()
    row_bytes = (columns * bits + 7) // 8
    packed = torch.empty(*codes.shape[:-1], row_bytes, dtype=torch.uint8)
    job = Packing(flat.data_ptr(), packed.data_ptr(), columns, columns, row_bytes, bits, 0)
    _run(PACK, job, len(flat), codes.numel())
    return packed


def unpack(packed: Tensor, bits: int, columns: int, start: int = 0) -> Any:
    if bits > 7 or packed.dtype != torch.uint8 or packed.numel() < FEW or not _plain(packed):
        return NotImplemented
    flat = packed.reshape(-1, packed.shape[-1])
    if (flat.shape[1] > 1 and flat.stride(1) != 1) or start < 0 or (start + columns) * bits > 8 * flat.shape[1]:
        return NotImplemented
    codes = torch.empty(*packed.shape[:-1], columns, dtype=torch.uint8)
    stride = flat.stride(0) if len(flat) > 1 else flat.shape[1]
    job = Packing(flat.data_ptr(), codes.data_ptr(), columns, stride, columns, bits, start)
    _run(UNPACK, job, len(flat), codes.numel())
    return codes


# --- places -----------------------------------------------------------------------------------------------------------------


def turned(words: Tensor) -> Any:
    if (
        words.dim() != 2
        or words.element_size() != 4
        or words.numel() < FEW
        or words.stride(0) != 1
        or not _plain(words)
    ):
        return NotImplemented
    made = torch.empty(words.shape, dtype=words.dtype)
    columns, rows = words.shape  # of what is stored
    job = Turn(words.data_ptr(), made.data_ptr(), rows, words.stride(1))
    _run(TURN, job, columns, words.numel(), grain=64)
    return made


def halves_swapped(stored: Tensor) -> Any:
    if stored.dtype != torch.uint8 or stored.numel() < FEW or not stored.is_contiguous() or not _plain(stored):
        return NotImplemented
    made = torch.empty_like(stored)
    _run(SWAP_HALVES, SwapHalves(stored.data_ptr(), made.data_ptr()), stored.numel(), stored.numel(), grain=1 << 12)
    return made


def dense_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
    """x [..., in] @ weight.T + bias in their common dtype."""
    if not weight.is_contiguous() or not _plain(x, weight) or weight.dtype not in native.KINDS:
        return NotImplemented
    rows, columns = weight.shape
    inputs = x.to(torch.float32).contiguous()
    y = torch.empty(*x.shape[:-1], rows, dtype=x.dtype)
    n = inputs.numel() // columns
    bias_place = None if bias is None else bias.data_ptr()
    job = Dense(
        weight.data_ptr(), inputs.data_ptr(), bias_place, y.data_ptr(), native.KINDS[weight.dtype], rows, columns, n
    )
    _run(DENSE, job, rows, weight.numel(), grain=16)
    return y


# --- GGUF -------------------------------------------------------------------------------------------------------------------

# enum anybit_block_type: position in this table. Bytes of a block, its numbers, then bytes of its fields
BLOCKS: dict[str, tuple[int, int, dict[str, int]]] = {
    "Q4_0": (18, 32, {"q": 16, "d": 2}),
    "Q4_1": (20, 32, {"q": 16, "d": 2, "m": 2}),
    "Q5_0": (22, 32, {"q": 20, "d": 2}),
    "Q5_1": (24, 32, {"q": 20, "d": 2, "m": 2}),
    "Q8_0": (34, 32, {"q": 32, "d": 2}),
    "Q2_K": (84, 256, {"q": 64, "sc": 8, "mn": 8, "d": 2, "dmin": 2}),
    "Q3_K": (110, 256, {"q": 96, "sc": 12, "d": 2}),
    "Q4_K": (144, 256, {"q": 128, "sc": 6, "mn": 6, "d": 2, "dmin": 2}),
    "Q5_K": (176, 256, {"q": 160, "sc": 6, "mn": 6, "d": 2, "dmin": 2}),
    "Q6_K": (210, 256, {"q": 192, "sc": 16, "d": 2}),
    "IQ4_NL": (18, 32, {"q": 16, "d": 2}),
    "IQ4_XS": (136, 256, {"q": 128, "sc": 6, "d": 2}),
    "MXFP4": (17, 32, {"q": 16, "d": 1}),
    "TQ1_0": (54, 256, {"fives": 48, "fours": 4, "d": 2}),
    "TQ2_0": (66, 256, {"q": 64, "d": 2}),
}
_PLACE = {"dmin": "m", "fives": "q"}  # a field's name in C, where it is another


def _field_pointers(fields: dict[str, Tensor]) -> ctypes.Structure:
    return Fields(**{_PLACE.get(name, name): field.data_ptr() for name, field in fields.items()})


def _empty_fields(kind: str, lead: tuple[int, ...], blocks: int) -> dict[str, Tensor]:
    """[*lead, blocks * n] of every field; float16 numbers, bytes otherwise."""
    found = {}
    for name, count in BLOCKS[kind][2].items():
        halves = name in ("d", "m", "dmin") and count == 2
        found[name] = torch.empty(
            *lead, blocks * (count // 2 if halves else count), dtype=torch.float16 if halves else torch.uint8
        )
    return found


def block_fields(
    matrix: Tensor, kind: str, importance: Tensor | None, again: Callable[[Tensor], dict[str, Tensor]]
) -> Any:
    """`again` does the rows that are left over with the torch code."""
    source = _source(matrix, ())
    if source is None or kind not in BLOCKS or matrix.shape[1] % BLOCKS[kind][1]:
        return NotImplemented
    if importance is not None and not _plain(importance):
        return NotImplemented
    importance = _numbers(importance)
    rows, columns = matrix.shape
    fields = _empty_fields(kind, (rows,), columns // BLOCKS[kind][1])
    odd = torch.empty(rows, dtype=torch.uint8)
    job = Search(source, list(BLOCKS).index(kind), _pointer(importance), _field_pointers(fields), odd.data_ptr())
    _run(SEARCH, job, rows, matrix.numel())
    left = odd.nonzero()[:, 0]
    if len(left):
        for name, own in again(matrix.index_select(0, left)).items():
            fields[name][left] = own
    return fields


def blocks_of(kind: str, fields: dict[str, Tensor], blocks: Tensor) -> Any:
    """Fills `blocks`; NotImplemented leaves them alone."""
    own = {name: field.contiguous() for name, field in fields.items()} if _plain(*fields.values(), blocks) else None
    if kind not in BLOCKS or own is None or set(own) != set(BLOCKS[kind][2]) or not blocks.is_contiguous():
        return NotImplemented
    job = Blocks(list(BLOCKS).index(kind), _field_pointers(own), blocks.data_ptr())
    size, numbers, _ = BLOCKS[kind]
    count = blocks.numel() // size
    _run(INTO_BLOCKS, job, count, count * numbers, 64)
    return blocks


def fields_of_blocks(kind: str, blocks: Tensor) -> Any:
    """Fields [*lead, n] of blocks uint8 [*lead, bytes]."""
    if kind not in BLOCKS or not _plain(blocks) or blocks.dtype != torch.uint8 or not blocks.is_contiguous():
        return NotImplemented
    size, numbers, _ = BLOCKS[kind]
    fields = _empty_fields(kind, tuple(blocks.shape[:-1]), blocks.shape[-1] // size)
    job = Blocks(list(BLOCKS).index(kind), _field_pointers(fields), blocks.data_ptr())
    count = blocks.numel() // size
    _run(FROM_BLOCKS, job, count, count * numbers, 64)
    return fields


ENCODERS: dict[str, Callable[..., Any]] = {
    twin.__name__: twin
    for twin in (
        row_ranges, row_largest, integer_codes, small_float_codes, table_blocks, pack, unpack, turned, halves_swapped,
        dense_product, block_fields, blocks_of, fields_of_blocks,
    )
}  # fmt: skip
