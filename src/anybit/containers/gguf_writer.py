"""GGUF files, version 3, written piece by piece: the headers first, then tensors in any order. One file, or several parts."""

from __future__ import annotations

import math
import os
import struct
from array import array
from collections.abc import Iterable, Mapping
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anybit._lazy import torch
from anybit.containers.atomic import write_failed
from anybit.containers.gguf import MAGIC, MAX_NAME_BYTES
from anybit.containers.info import shorten
from anybit.containers.shards import parse_size
from anybit.containers.writer import tensor_bytes
from anybit.errors import MissingTensor, NotRepresentable, ShapeMismatch, UnexpectedTensor
from anybit.weight.block_types import BY_NAME, TYPES, BlockType

if TYPE_CHECKING:
    from torch import Tensor

    from anybit.quantizers.bundle import Bundled, Placed

ALIGNMENT = 32
VERSION = 3
_NUMBER_OF = {kind.name: number for number, kind in TYPES.items()}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_ITEMS = {"B": 0, "b": 1, "H": 2, "h": 3, "I": 4, "i": 5, "f": 6, "Q": 10, "q": 11, "d": 12}


class GgufWriter:
    """Writes the tensors of a `Bundled` under the names of a checkpoint. A context manager; complete when it ends.

    `max_shard_size` ("2GB"): several files `NAME-00001-of-00003.gguf` of at most so many bytes of tensors, as llama.cpp's tool
    cuts them. `written`: names that a broken run has written to the same folder; then files may exist, and stay after an error.
    Otherwise leaving the block with an error removes the files; leaving it with a tensor missing is one.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        bundled: Bundled,
        *,
        max_shard_size: int | str | None = None,
        written: Iterable[str] | None = None,
    ):
        self.bundled, self.lasting = bundled, written is not None
        limit = None if max_shard_size is None else parse_size(max_shard_size)
        parts: list[dict[str, int]] = [{}]
        for name, (kind, shape) in bundled.tensors.items():
            size = _bytes_of(name, BY_NAME[kind], shape)
            if limit is not None and parts[-1] and sum(parts[-1].values()) + size > limit:
                parts.append({})
            parts[-1][name] = size
        self.files = [_File(Path(folder) / file, bundled, sizes, values) for file, sizes, values in self._split(parts)]
        self._file_of = {name: file for file in self.files for name in file.place}
        self._missing = {name: max(len(sources), 1) for name, sources in bundled.sources().items()}
        self._written: set[str] = set(written or ())
        for name in self._written:
            for place in bundled.places.get(name, ()):
                self._missing[place.target] -= 1

    def _split(self, parts: list[dict[str, int]]) -> Iterable[tuple[str, dict[str, int], Mapping[str, Any]]]:
        """Name, sizes of tensors and metadata of every file: all of the metadata is in the first one."""
        values = self.bundled.values
        if len(parts) == 1:
            yield self.bundled.file, parts[0], values
            return
        stem = self.bundled.file.removesuffix(".gguf")
        for number, sizes in enumerate(parts):
            keys = {
                "split.no": Typed("H", number),
                "split.count": Typed("H", len(parts)),
                "split.tensors.count": Typed("i", len(self.bundled.tensors)),
            }
            name = f"{stem}-{number + 1:05d}-of-{len(parts):05d}.gguf"
            yield name, sizes, {**values, **keys} if not number else keys

    def __enter__(self) -> GgufWriter:
        try:
            for file in self.files:
                file.create(self.lasting)
        except BaseException:
            self._leave(discard=True)
            raise
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        except BaseException:
            kind = True
            raise
        finally:
            self._leave(discard=kind is not None)

    def _leave(self, discard: bool) -> None:
        for file in self.files:
            file.leave(discard and not self.lasting)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put one tensor of the checkpoint where it belongs; each comes once."""
        places = self.bundled.places.get(name)
        if places is None or name in self._written:
            what = "was written before" if name in self._written else "was not announced"
            raise UnexpectedTensor(f"tensor {shorten(name)} {what}, so {self.files[0].path} has no place for it")
        self._written.add(name)
        for place in places:
            self._put(name, place, place.make(tensor) if place.make is not None else tensor)

    def _put(self, name: str, place: Placed, tensor: Tensor) -> None:
        parts = 1 if place.part is None else place.parts or self.bundled.tensors[place.target][1][0]
        self._file_of[place.target].put(place.target, tensor, place.part, parts, name)
        self._missing[place.target] -= 1

    def sync(self) -> None:
        """What was written so far is on the disk."""
        for file in self.files:
            file.sync()

    def _finish(self) -> None:
        for name, tensor in self.bundled.constants.items():
            self._file_of[name].put(name, tensor, None, 1, name)
            self._missing[name] -= 1
        missing = [name for name, count in self._missing.items() if count > 0]
        if missing:
            raise MissingTensor(
                f"{len(missing)} of {len(self._missing)} tensors were announced for {self.files[0].path}, but never (or not "
                f"wholly) written, such as {shorten(missing[0])}"
            )
        self.sync()


def _bytes_of(name: str, block: BlockType, shape: tuple[int, ...]) -> int:
    if shape and shape[-1] % block.elements:
        raise ShapeMismatch(
            f"tensor {shorten(name)} has rows of {shape[-1]} weights, which are not whole blocks of {block.elements} "
            f"({block.name})"
        )
    return math.prod(shape) // block.elements * block.bytes


class _File:
    """One file: its header, and where each tensor's bytes go. `sizes`: of its tensors, in order; `values`: its metadata."""

    def __init__(self, path: Path, bundled: Bundled, sizes: Mapping[str, int], values: Mapping[str, Any]):
        self.path, self.bundled, self.values = path, bundled, values
        self.end = ">" if bundled.big_endian else "<"
        self.place: dict[str, tuple[int, int]] = {}  # start in the data, bytes
        self.size, self.start = 0, 0
        for name, count in sizes.items():
            self.place[name] = self.size, count
            self.size += count + -count % ALIGNMENT
        self.handle: FileIO | None = None

    def create(self, lasting: bool) -> None:
        """Make the file with its header and the space of its data; `lasting`: it may be there already."""
        header = self._header()
        self.start = len(header)
        try:
            self.handle = FileIO(self.path, "r+" if lasting and self.path.exists() else "x+")
            self.handle.write(header)
            self.handle.truncate(self.start + self.size)
        except OSError as error:
            raise write_failed(error, str(self.path)) from error

    def put(self, target: str, tensor: Tensor, part: int | None, parts: int, name: str) -> None:
        """A tensor, or its entry `part` of `parts`. `name`: in the checkpoint."""
        start, size = self.place[target]
        size //= parts
        start += (part or 0) * size
        data = tensor_bytes(tensor if not self.bundled.big_endian else self._swapped(target, tensor))
        if len(data) != size:
            raise ShapeMismatch(
                f"tensor {shorten(name)} has {len(data)} bytes, but {size} were announced for {target!r}"
            )
        assert self.handle is not None
        done = 0
        try:
            self.handle.seek(self.start + start)
            while done < size:
                done += self.handle.write(data[done : done + (1 << 30)])
        except OSError as error:
            raise write_failed(error, f"{self.path}, tensor {shorten(name)}") from error

    def _swapped(self, target: str, tensor: Tensor) -> Tensor:
        """Words of the blocks turned around."""
        block = BY_NAME[self.bundled.tensors[target][0]]
        order = torch.tensor(block.byte_order)
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return raw.reshape(-1, block.bytes)[:, order]

    def sync(self) -> None:
        if self.handle is not None:
            try:
                os.fsync(self.handle.fileno())
            except OSError as error:
                raise write_failed(error, str(self.path)) from error

    def leave(self, discard: bool) -> None:
        made = self.handle is not None
        if self.handle is not None:
            self.handle.close()
            self.handle = None
        if discard and made:
            self.path.unlink(missing_ok=True)

    def _header(self) -> bytes:
        tensors = {name: self.bundled.tensors[name] for name in self.place}
        parts = [MAGIC, struct.pack(f"{self.end}IQQ", VERSION, len(tensors), len(self.values))]
        for key, value in self.values.items():
            kind, content = _typed(key, value, self.end)
            parts += [_text(key, self.end), struct.pack(f"{self.end}I", kind), content]
        for name, (type_name, shape) in tensors.items():
            if len(name.encode()) > MAX_NAME_BYTES:
                raise NotRepresentable(f"tensor {shorten(name)} has a name longer than {MAX_NAME_BYTES} bytes")
            sides = struct.pack(f"{self.end}I{len(shape)}Q", len(shape), *reversed(shape))
            offset = struct.pack(f"{self.end}IQ", _NUMBER_OF[type_name], self.place[name][0])
            parts += [_text(name, self.end), sides, offset]
        header = b"".join(parts)
        return header + b"\0" * (-len(header) % ALIGNMENT)


class Typed:
    """A number that is stored with struct's `letter` whatever its size."""

    def __init__(self, letter: str, number: int):
        self.letter, self.number = letter, number


def _text(value: str, end: str) -> bytes:
    raw = value.encode(errors="surrogateescape")
    return struct.pack(f"{end}Q", len(raw)) + raw


def _typed(key: str, value: Any, end: str) -> tuple[int, bytes]:
    """Type and bytes of a metadata value: whole numbers as uint32 where they fit, the rest as llama.cpp's converter does."""
    if isinstance(value, Typed):
        return _ITEMS[value.letter], struct.pack(end + value.letter, value.number)
    if isinstance(value, bool):
        return _BOOL, bytes([value])
    if isinstance(value, int):
        for letter in "Iiq":
            try:
                return _ITEMS[letter], struct.pack(end + letter, value)
            except struct.error:
                continue
    if isinstance(value, float):
        return 6, struct.pack(f"{end}f", value)
    if isinstance(value, str):
        return _STRING, _text(value, end)
    if isinstance(value, array) and value.typecode in _ITEMS:
        items = value
        if end == ">":
            items = array(value.typecode, value)
            items.byteswap()
        return _ARRAY, struct.pack(f"{end}IQ", _ITEMS[value.typecode], len(value)) + items.tobytes()
    if isinstance(value, list) and all(isinstance(item, bool) for item in value):
        return _ARRAY, struct.pack(f"{end}IQ", _BOOL, len(value)) + bytes(value)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return _ARRAY, struct.pack(f"{end}IQ", _STRING, len(value)) + b"".join(_text(item, end) for item in value)
    raise NotRepresentable(f"the metadata value {key!r} is {shorten(value)}, which has no type in GGUF")
