"""The safetensors header, read before any data: 8 bytes of length, a JSON object, then the data without gaps.

    { "__metadata__": {str: str, ...}, NAME: {"dtype": CODE, "shape": [...], "data_offsets": [begin, end]}, ... }

The object is walked member by member instead of parsed whole: a hostile header could nest or repeat its way to many times
its own size in Python objects. Nothing is allocated for a tensor before its numbers agree with each other and with the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from anybit.containers.info import BY_CODE, LARGEST, MAX_DIMENSIONS, Contents, TensorInfo, elements, shorten
from anybit.containers.rawfile import RawFile
from anybit.errors import CorruptFile, UnsafeFile, did_you_mean

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors package
AGAIN = "Download the file again or write it with the safetensors package"

_SPACE = rb"[ \t\r\n]*"
_TEXT = rb'"[^"\\\x00-\x1f]*(?:\\[^\x00-\x1f][^"\\\x00-\x1f]*)*"'
_KEY = re.compile(_SPACE + b"(" + _TEXT + b")" + _SPACE + b":" + _SPACE)
_STRING = re.compile(_TEXT)
# an entry as writers make them; whatever else JSON allows, and every mistake, is left to the slow walk
_NUMBER = rb"(?:0|[1-9][0-9]{0,17})"
_USUAL = re.compile(
    rb'\{ ?"dtype": ?"([A-Z0-9_]{1,16})", ?"shape": ?\[((?:' + _NUMBER + rb"(?:, ?" + _NUMBER + rb"){0,63})?)\], ?"
    rb'"data_offsets": ?\[(' + _NUMBER + rb"), ?(" + _NUMBER + rb")\] ?\}"
)
# the same with a name that needs no unescaping, and what follows
_MEMBER = re.compile(_SPACE + rb'"([^"\\\x00-\x1f]*)"' + _SPACE + b":" + _SPACE + _USUAL.pattern + _SPACE + rb"([,}])")
_FLAT_OBJECT = re.compile(rb"\{[^{}]{0,4096}\}")
_COMMA_OR_END = re.compile(_SPACE + rb"([,}])")
_OPEN = re.compile(rb"\{" + _SPACE + rb"(\})?")
_BLANK = re.compile(_SPACE)


def read(file: RawFile) -> Contents:
    """Tensors, in the order of their data, and metadata of one .safetensors file."""
    if file.size < 8:
        raise CorruptFile(
            f"{file.path} has {file.size} bytes; a safetensors file starts with a header of at least 8. {AGAIN}"
        )
    start = file.bytes(0, 8)
    length = int.from_bytes(start, "little")
    if length > MAX_HEADER_BYTES and (start[:4] == b"PK\x03\x04" or start[:1] == b"\x80"):
        raise UnsafeFile(
            f"{file.path} is named like a safetensors file, but is a pickle, which could run code; it was not read"
        )
    if length > MAX_HEADER_BYTES:
        raise CorruptFile(
            f"{file.path}: header of {length} bytes, the limit is {MAX_HEADER_BYTES}; "
            f"this is not a safetensors file (it starts with {start!r}). {AGAIN}"
        )
    if 8 + length > file.size:
        raise CorruptFile(f"{file.path}: header of {length} bytes, but the file has {file.size} bytes in all. {AGAIN}")
    tensors, metadata = _Header(file, file.bytes(8, length)).parse()
    _check_coverage(file, tensors, 8 + length)
    return Contents(tensors, metadata)


class _Header:
    """A walk over the header's bytes. `where` is the tensor being read, for messages."""

    def __init__(self, file: RawFile, raw: bytes):
        self.file, self.raw, self.position, self.where = file, raw, 0, ""
        self.path = str(file.path)
        self.sizes: dict[tuple[bytes, bytes], tuple[str, tuple[int, ...], int] | None] = {}  # see `_size`
        self.decoder = json.JSONDecoder(object_pairs_hook=self._object, parse_constant=self._constant)

    def fail(self, what: str) -> NoReturn:
        tensor = f", tensor {shorten(self.where)}" if self.where else ""
        raise CorruptFile(f"{self.file.path}{tensor}: {what}. {AGAIN}")

    def parse(self) -> tuple[list[TensorInfo], dict[str, str]]:
        metadata: dict[str, str] | None = None
        found: dict[str, TensorInfo] = {}
        if self.raw[:1] != b"{":
            self.fail(f"the header starts with {self.raw[:8]!r} instead of an opening brace")
        empty = self._take(_OPEN, "the start of an object").group(1) is not None
        while not empty and not self._usual_members(found):
            name = self.where = self._name()
            if name == "__metadata__":
                if metadata is not None:
                    self.fail("__metadata__ appears twice")
                metadata = self._metadata()
            elif name in found:
                self.fail("the name appears twice in the header")
            else:
                found[name] = self._any(name)
            self.where = ""
            if self._ends():
                break
        rest = _BLANK.match(self.raw, self.position)
        if rest is None or rest.end() != len(self.raw):
            self.fail(f"the header goes on after its closing brace, at byte {self.position}")
        tensors = sorted(found.values(), key=lambda info: (info.offset, info.nbytes))
        return tensors, metadata or {}

    def _take(self, pattern: re.Pattern[bytes], wanted: str) -> re.Match[bytes]:
        match = pattern.match(self.raw, self.position)
        if match is None:
            self.fail(
                f"byte {self.position} of the header is not {wanted}: {self.raw[self.position : self.position + 24]!r}"
            )
        self.position = match.end()
        return match

    def _members(self) -> Iterator[str]:
        """Names of an object's members; the caller consumes each value before asking for the next name."""
        if self._take(_OPEN, "the start of an object").group(1):
            return
        while True:
            yield self._name()
            if self._ends():
                return

    def _name(self) -> str:
        return self._text(self._take(_KEY, "a name and a colon").group(1))

    def _ends(self) -> bool:
        return self._take(_COMMA_OR_END, "a comma or the end of an object").group(1) == b"}"

    def _usual_members(self, found: dict[str, TensorInfo]) -> bool:
        """All members from here on that have the usual form and no mistake; whether the closing brace was met.

        Nothing is consumed of the first that has another form.
        """
        raw, sizes, start, path = self.raw, self.sizes, 8 + len(self.raw), self.path
        while True:
            match = _MEMBER.match(raw, self.position)
            if match is None:
                return False
            quoted, code, sides, begin, end, after = match.groups()
            known = sizes[code, sides] if (code, sides) in sizes else self._size(code, sides)
            try:
                name = quoted.decode()
            except ValueError:
                return False
            offset = int(begin)
            if known is None or int(end) - offset != known[2] or name in found or name == "__metadata__":
                return False
            found[name] = TensorInfo(name, known[0], known[1], known[2], path, start + offset)
            self.position = match.end()
            if after == b"}":
                return True

    def _text(self, quoted: bytes) -> str:
        try:
            text: str = quoted[1:-1].decode() if b"\\" not in quoted else json.loads(quoted)
            text.encode()  # an escape may spell half a surrogate pair, which no file or terminal could take
        except ValueError as error:
            self.fail(f"{shorten(quoted)} is not valid text ({error})")
        return text

    def _metadata(self) -> dict[str, str]:
        if self.raw.startswith(b"null", self.position):
            self.position += 4
            return {}
        metadata: dict[str, str] = {}
        for name in self._members():
            if name in metadata:
                self.fail(f"the key {shorten(name)} appears twice")
            metadata[name] = self._text(self._take(_STRING, f"text (the value of {shorten(name)})").group())
        return metadata

    # --- one tensor ----------------------------------------------------------------------------------------------------

    def _size(self, code: bytes, sides: bytes) -> tuple[str, tuple[int, ...], int] | None:
        """(torch dtype, shape in units of it, bytes) of a dtype and a shape, as they are written; None if they are wrong."""
        kind, shape = BY_CODE.get(code.decode()), tuple(map(int, sides.split(b","))) if sides else ()
        count, found = elements(shape), None
        if kind is not None and not kind.pair and count is not None and count * kind.bits <= 8 * LARGEST:
            size, rest = divmod(count * kind.bits, 8)
            found = None if rest else (kind.torch, shape, size)
        self.sizes[code, sides] = found
        return found

    def _any(self, name: str) -> TensorInfo:
        entry = self._entry()
        for key in ("dtype", "shape", "data_offsets"):
            if key not in entry:
                self.fail(f"its entry has no {key!r}")
        code = entry["dtype"]
        if not isinstance(code, str) or code not in BY_CODE:
            close = did_you_mean(code, BY_CODE) if isinstance(code, str) else ""
            self.fail(f"unknown dtype {shorten(code)}{close}; known are {', '.join(BY_CODE)}")
        shape, kind = self._naturals("shape", entry["shape"]), BY_CODE[code]
        if len(shape) > MAX_DIMENSIONS:
            self.fail(f"the shape has {len(shape)} dimensions, the limit is {MAX_DIMENSIONS}")
        count = elements(shape)
        if count is None or count * kind.bits > 8 * LARGEST:
            self.fail(f"the shape {list(shape)} has more elements than 64 bits can count")
        if count * kind.bits % 8 or (kind.pair and (not shape or shape[-1] % 2)):
            self.fail(f"{list(shape)} elements of {kind.bits} bits do not fill whole bytes")
        offsets = self._naturals("data_offsets", entry["data_offsets"])
        if len(offsets) != 2 or offsets[1] < offsets[0]:
            self.fail(f"data_offsets {shorten(list(offsets))} are not a begin and an end")
        size = count * kind.bits // 8
        if offsets[1] - offsets[0] != size:
            self.fail(f"{code} {list(shape)} takes {size} bytes, but data_offsets give it {offsets[1] - offsets[0]}")
        if kind.pair:
            shape = (*shape[:-1], shape[-1] // 2)
        return TensorInfo(name, kind.torch, shape, size, str(self.file.path), 8 + len(self.raw) + offsets[0])

    def _entry(self) -> dict[str, Any]:
        text = self._take(_FLAT_OBJECT, "a flat object of at most 4096 bytes").group()
        try:
            entry: dict[str, Any] = self.decoder.decode(text.decode())
        except (ValueError, RecursionError) as error:
            self.fail(f"its entry is not valid JSON ({error or type(error).__name__})")
        return entry

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entry = dict(pairs)
        if len(entry) < len(pairs):
            self.fail("a key appears twice in its entry")
        return entry

    def _constant(self, text: str) -> NoReturn:
        self.fail(f"{text} in its entry is no JSON number")

    def _naturals(self, key: str, value: Any) -> tuple[int, ...]:
        if not isinstance(value, list) or not all(type(item) is int and 0 <= item <= LARGEST for item in value):
            self.fail(f"{key} {shorten(value)} is not a list of whole numbers from 0 to 2^63 - 1")
        return tuple(value)


def _check_coverage(file: RawFile, tensors: list[TensorInfo], start: int) -> None:
    """The data of all tensors is the rest of the file: no overlap, no gap, nothing behind it."""
    end = max((info.offset + info.nbytes for info in tensors), default=start)
    if end > file.size:
        last = max(tensors, key=lambda info: info.offset + info.nbytes)
        raise CorruptFile(
            f"{file.path} is truncated: tensor {shorten(last.name)} ends at byte {end}, the file has {file.size}. {AGAIN}"
        )
    position = start
    for number, info in enumerate(tensors):
        if info.offset != position:
            before = f"tensor {shorten(tensors[number - 1].name)}" if number else "the header"
            word = "overlaps" if info.offset < position else f"leaves {info.offset - position} unused bytes after"
            raise CorruptFile(
                f"{file.path}: the data of tensor {shorten(info.name)} {word} {before} "
                f"(it begins at byte {info.offset}, not {position}). {AGAIN}"
            )
        position = info.offset + info.nbytes
    if position < file.size:
        raise CorruptFile(f"{file.path}: {file.size - position} bytes after the last tensor belong to nothing. {AGAIN}")
