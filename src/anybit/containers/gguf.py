"""The GGUF header, versions 2 and 3, either byte order, read before any data.

    "GGUF", version u32, tensors u64, pairs u64
    pairs    key, type u32, value                 a string is a length u64 and UTF-8; an array is type u32, count u64, items
    tensors  name, n u32, n sides u64 (fastest first), type u32, offset u64
    padding to general.alignment, then data; offsets count from there

Typed values go to `Contents.values` under their keys. A tensor of a block type is uint8 [..., rows, bytes of a row], and
`TensorInfo.encoding` names the type. In a big-endian file (the version read as little endian has its low half zero) words
inside blocks are big-endian too; `TensorInfo.byte_order` puts them right when data is read.

Everything is counted against the file's size and fixed limits before it is allocated. Text (names, templates) stays text.
"""

from __future__ import annotations

import re
import struct
from array import array
from typing import Any, NoReturn

from anybit.containers.info import LARGEST, Contents, TensorInfo, elements, shorten
from anybit.containers.rawfile import RawFile
from anybit.errors import CorruptFile, UnsafeFile
from anybit.weight.block_types import REMOVED, TYPES

MAGIC = b"GGUF"
VERSIONS = (2, 3)
AGAIN = "Download the file again, or make it anew with llama.cpp's converter"
SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.gguf$", re.IGNORECASE)

# What real files need many times over, and a reader can hold and walk in under a second.
MAX_HEADER_BYTES = 64 << 20
MAX_PAIRS = 1 << 16
MAX_TENSORS = 1 << 16
MAX_STRINGS = 1 << 21
MAX_NAME_BYTES = 1 << 10
MAX_TEXT_BYTES = 8 << 20
MAX_NESTING = 4
MAX_ALIGNMENT = 1 << 30
MAX_DIMENSIONS = 4


# types of metadata values: struct's letter of a number; bool, string and array are read by hand
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_TYPE_NAMES = (
    "uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "bool", "string", "array", "uint64", "int64", "float64",
)  # fmt: skip


def read(file: RawFile) -> Contents:
    """Tensors, in the order of their data, and typed metadata of one .gguf file."""
    header = _Header(file)
    contents = header.parse()
    _check_split(file, contents.values)
    return contents


class _Header:
    """A walk over the header through a window of the file. `where`: what is being read, for messages."""

    def __init__(self, file: RawFile):
        self.file, self.where = file, "the header"
        self.window, self.start, self.position = b"", 0, 0  # the window begins at byte `start` of the file
        self.big = False
        self.strings = 0

    def fail(self, what: str) -> NoReturn:
        raise CorruptFile(f"{self.file.path}, {self.where}: {what}. {AGAIN}")

    # --- bytes -----------------------------------------------------------------------------------------------------------

    def need(self, count: int) -> int:
        """Make `count` bytes available at the position; returns the place in the window and moves on."""
        end = self.start + self.position + count
        if end > self.file.size:
            self.fail(f"it needs {count} bytes at byte {end - count}, but the file ends at byte {self.file.size}")
        if end > MAX_HEADER_BYTES:
            self.fail(f"the header goes on after {MAX_HEADER_BYTES} bytes, which no model needs")
        if self.position + count > len(self.window):
            self.start += self.position
            size = min(max(count, 1 << 20), self.file.size - self.start)
            self.window, self.position = self.file.bytes(self.start, size), 0
        place, self.position = self.position, self.position + count
        return place

    def number(self, letter: str) -> Any:
        form = (">" if self.big else "<") + letter
        return struct.unpack_from(form, self.window, self.need(struct.calcsize(form)))[0]

    def text(self, limit: int, what: str, errors: str = "strict") -> str:
        length = self.number("Q")
        if length > limit:
            self.fail(f"{what} of {length} bytes, the limit is {limit}")
        place = self.need(length)
        raw = self.window[place : place + length]
        try:
            return raw.decode(errors=errors)
        except UnicodeDecodeError as error:
            self.fail(f"{what} {shorten(raw)} is not UTF-8 ({error.reason} at byte {error.start})")

    # --- the whole -------------------------------------------------------------------------------------------------------

    def parse(self) -> Contents:
        tensors, pairs = self._counts()
        values: dict[str, Any] = {}
        for number in range(pairs):
            self.where = f"metadata {number + 1} of {pairs}"
            key = self._name("key")
            self.where = f"metadata {shorten(key)}"
            if key in values:
                self.fail("the key appears twice")
            values[key] = self._value(self.number("I"), MAX_NESTING)
        alignment = self._alignment(values)
        infos: dict[str, TensorInfo] = {}
        for number in range(tensors):
            self.where = f"tensor {number + 1} of {tensors}"
            info = self._tensor()
            if info.name in infos:
                self.fail("the name appears twice")
            infos[info.name] = info
        end = self.start + self.position
        data = end + -end % alignment
        return Contents(self._placed(list(infos.values()), data, alignment), {}, values)

    def _counts(self) -> tuple[int, int]:
        start = self.file.bytes(0, min(24, self.file.size))
        if start[:4] != MAGIC:
            if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
                raise UnsafeFile(
                    f"{self.file.path} is named like a GGUF file, but is a pickle, which could run code; it was not read"
                )
            raise CorruptFile(f"{self.file.path} is no GGUF file: it starts with {start[:4]!r}, not {MAGIC!r}. {AGAIN}")
        self.need(4)
        version = self.number("I")
        if version and not version & 0xFFFF:
            self.big, version = True, int.from_bytes(version.to_bytes(4, "little"), "big")
        if version not in VERSIONS:
            self.fail(f"version {version}; versions {' and '.join(map(str, VERSIONS))} are read")
        tensors, pairs = self.number("Q"), self.number("Q")
        rest = self.file.size - self.position
        for what, count, least, limit in (
            ("tensors", tensors, 24, MAX_TENSORS),
            ("metadata entries", pairs, 13, MAX_PAIRS),
        ):
            if count * least > rest or count > limit:
                self.fail(f"{count} {what}, but {rest} bytes hold at most {min(rest // least, limit)}")
        return tensors, pairs

    def _name(self, what: str) -> str:
        name = self.text(MAX_NAME_BYTES, what)
        if not name:
            self.fail(f"its {what} is empty")
        return name

    # --- metadata --------------------------------------------------------------------------------------------------------

    def _value(self, kind: int, nesting: int) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _BOOL:
            return self._bools(1)[0]
        if kind == _STRING:
            self._count_strings(1)
            return self.text(MAX_TEXT_BYTES, "text")
        if kind == _ARRAY:
            return self._array(nesting)
        self.fail(f"unknown value type {kind}; types 0 to {len(_TYPE_NAMES) - 1} are known")

    def _array(self, nesting: int) -> Any:
        kind, count = self.number("I"), self.number("Q")
        rest = self.file.size - self.start - self.position
        least = {_BOOL: 1, _STRING: 8, _ARRAY: 12}.get(kind) or struct.calcsize("=" + _NUMBERS.get(kind, "B"))
        if count * least > rest:
            self.fail(f"an array of {count} items of {least} bytes or more, but {rest} bytes are left in the file")
        if kind in _NUMBERS:
            letter = _NUMBERS[kind]
            place = self.need(count * least)
            numbers = array(letter)
            numbers.frombytes(self.window[place : place + count * least])
            if self.big:
                numbers.byteswap()
            return numbers
        if kind == _BOOL:
            return self._bools(count)
        if kind == _STRING:
            self._count_strings(count)
            return self._texts(count)
        if kind == _ARRAY:
            if nesting == 0:
                self.fail(f"arrays inside arrays, deeper than {MAX_NESTING}")
            self._count_strings(count)
            return [self._array(nesting - 1) for _ in range(count)]
        self.fail(f"an array of unknown value type {kind}; types 0 to {len(_TYPE_NAMES) - 1} are known")

    def _texts(self, count: int) -> list[str]:
        """Many short texts: the same as `text`, without a call for each. Tokens may be any bytes (surrogates keep them)."""
        found: list[str] = []
        unpack = struct.Struct(">Q" if self.big else "<Q").unpack_from
        for _ in range(count):
            position, window = self.position, self.window
            if position + 8 <= len(window):
                end = position + 8 + unpack(window, position)[0]
                if end <= len(window):
                    found.append(window[position + 8 : end].decode(errors="surrogateescape"))
                    self.position = end
                    continue
            found.append(self.text(MAX_TEXT_BYTES, "text", "surrogateescape"))
        return found

    def _bools(self, count: int) -> list[bool]:
        place = self.need(count)
        raw = self.window[place : place + count]
        if raw.translate(None, b"\0\1"):
            self.fail("a bool is neither 0 nor 1")
        self._count_strings(count // 8)
        return [byte == 1 for byte in raw]

    def _count_strings(self, count: int) -> None:
        self.strings += count
        if self.strings > MAX_STRINGS:
            self.fail(f"more than {MAX_STRINGS} texts and arrays in the metadata")

    def _alignment(self, values: dict[str, Any]) -> int:
        self.where = "metadata 'general.alignment'"
        alignment = values.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            self.fail(f"{shorten(alignment)} is no alignment; it is a power of two")
        return alignment

    # --- tensors ---------------------------------------------------------------------------------------------------------

    def _tensor(self) -> TensorInfo:
        """`offset` is still relative to the data."""
        name = self._name("name")
        self.where = f"tensor {shorten(name)}"
        count = self.number("I")
        if count > MAX_DIMENSIONS:
            self.fail(f"{count} dimensions, the limit is {MAX_DIMENSIONS}")
        sides = [self.number("Q") for _ in range(count)]
        number, offset = self.number("I"), self.number("Q")
        kind = TYPES.get(number)
        if kind is None:
            was = f" ({REMOVED[number]}, which llama.cpp no longer has)" if number in REMOVED else ""
            self.fail(
                f"unknown tensor type {number}{was}; known are {', '.join(f'{n} {t.name}' for n, t in TYPES.items())}"
            )
        total = elements(sides) if all(side <= LARGEST for side in sides) else None
        if total is None or total * kind.bytes > LARGEST:
            self.fail(f"the sides {sides} have more elements than 64 bits can count")
        width = sides[0] if sides else 1
        if width % kind.elements:
            self.fail(f"rows of {width} weights are not whole blocks of {kind.elements} ({kind.name})")
        shape = tuple(reversed(sides))
        if kind.elements > 1:
            shape = (*shape[:-1], width // kind.elements * kind.bytes) if sides else (kind.bytes,)
        size = total // kind.elements * kind.bytes
        if offset > self.file.size:
            self.fail(f"its data begins at byte {offset} of the data, but the file has {self.file.size} bytes in all")
        encoding = kind.name if kind.dtype == "uint8" else ""
        order = kind.byte_order if self.big and max(kind.words) > 1 else ()
        return TensorInfo(
            name, kind.dtype, shape, size, str(self.file.path), offset, encoding=encoding, byte_order=order
        )

    def _placed(self, tensors: list[TensorInfo], data: int, alignment: int) -> list[TensorInfo]:
        """With offsets from the start of the file, in the order of their data; inside the file, aligned, apart."""
        placed = []
        end, before = data, "the header"
        for info in sorted(tensors, key=lambda info: (info.offset, info.nbytes)):
            self.where = f"tensor {shorten(info.name)}"
            offset = data + info.offset
            if info.offset % alignment:
                self.fail(f"its data begins at byte {info.offset} of the data, which is no multiple of {alignment}")
            if offset + info.nbytes > self.file.size:
                self.fail(
                    f"the file is truncated: the data ends at byte {offset + info.nbytes}, the file has {self.file.size}"
                )
            if offset < end and info.nbytes:
                self.fail(f"its data begins at byte {offset} and overlaps {before}, which ends at byte {end}")
            if info.nbytes:
                end, before = offset + info.nbytes, f"tensor {shorten(info.name)}"
            placed.append(_at(info, offset))
        return placed


def _at(info: TensorInfo, offset: int) -> TensorInfo:
    return TensorInfo(
        info.name,
        info.dtype,
        info.shape,
        info.nbytes,
        info.file,
        offset,
        encoding=info.encoding,
        byte_order=info.byte_order,
    )


def _check_split(file: RawFile, values: dict[str, Any]) -> None:
    """A file that is one of several says so in its name, by which the others are found."""
    count = values.get("split.count", 0)
    number = values.get("split.no", 0)
    if type(count) is not int or type(number) is not int:
        raise CorruptFile(
            f"{file.path}: split.count {shorten(count)} and split.no {shorten(number)} are not numbers. {AGAIN}"
        )
    named = SPLIT_NAME.match(file.path.name)
    if count > 1 and not named:
        raise CorruptFile(
            f"{file.path} is part {number + 1} of {count}, and its name does not lead to the others. Give the parts their names "
            f"back: NAME-{number + 1:05d}-of-{count:05d}.gguf"
        )
    if count > 1 and named and (int(named["number"]), int(named["total"])) != (number + 1, count):
        raise CorruptFile(
            f"{file.path} says that it is part {number + 1} of {count}. Give it its name back: "
            f"{named['stem']}-{number + 1:05d}-of-{count:05d}.gguf"
        )
