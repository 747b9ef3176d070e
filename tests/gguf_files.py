"""A writer of small GGUF files, right or wrong on purpose, for tests. It shares nothing with the library's reader."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
LETTERS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}
_SIZES = {0: (1, 4), 1: (1, 2), 2: (32, 18), 8: (32, 34), 12: (256, 144), 14: (256, 210), 24: (1, 1), 30: (1, 2)}


def text(value: str | bytes, end: str = "<") -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack(end + "Q", len(raw)) + raw


def value(kind: int, content: Any, end: str = "<") -> bytes:
    """A typed value; the content of an array is (kind of its items, items)."""
    if kind == STRING:
        return text(content, end)
    if kind == ARRAY:
        inner, items = content
        return struct.pack(end + "IQ", inner, len(items)) + b"".join(value(inner, item, end) for item in items)
    return struct.pack(end + LETTERS[kind], content)


def guess(content: Any) -> tuple[int, Any]:
    """The type llama.cpp's converter would give a Python value."""
    if isinstance(content, tuple):
        return content  # type: ignore[return-value]
    if isinstance(content, bool):
        return BOOL, content
    if isinstance(content, str):
        return STRING, content
    if isinstance(content, list):
        return ARRAY, (guess(content[0])[0] if content else I32, content)
    return (F32 if isinstance(content, float) else U32 if content >= 0 else I32), content


def build(
    metadata: Mapping[str, Any] | Sequence[tuple[str, Any]] = (),
    tensors: Sequence[tuple[str, Sequence[int], int, bytes]] = (),
    *,
    version: int = 3,
    alignment: int = 32,
    big: bool = False,
    counts: tuple[int, int] | None = None,
    offsets: Mapping[str, int] | None = None,
) -> bytes:
    """A file. `tensors`: name, dims (fastest first), type, data. `counts` and `offsets` overrule what would be right."""
    end = ">" if big else "<"
    pairs = list(metadata.items()) if isinstance(metadata, Mapping) else list(metadata)
    head = b"GGUF" + struct.pack(end + "IQQ", version, *(counts or (len(tensors), len(pairs))))
    for key, content in pairs:
        kind, content = guess(content)
        head += text(key, end) + struct.pack(end + "I", kind) + value(kind, content, end)
    data = b""
    for name, dims, kind, content in tensors:
        offset = (offsets or {}).get(name, len(data))
        head += text(name, end) + struct.pack(f"{end}I{len(dims)}QIQ", len(dims), *dims, kind, offset)
        data += content + b"\0" * (-len(content) % alignment)
    return head + b"\0" * (-len(head) % alignment) + data


def size(dims: Sequence[int], kind: int) -> int:
    """Bytes of a tensor."""
    elements, block = _SIZES[kind]
    count = 1
    for side in dims:
        count *= side
    return count // elements * block
