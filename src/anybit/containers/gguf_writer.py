"""A GGUF file, version 3, little-endian, written piece by piece: the header first, then tensors in any order."""

from __future__ import annotations

import math
import os
import struct
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anybit.containers.atomic import write_failed
from anybit.containers.gguf import MAGIC, MAX_NAME_BYTES
from anybit.containers.info import shorten
from anybit.containers.writer import tensor_bytes
from anybit.errors import MissingTensor, NotRepresentable, ShapeMismatch, UnexpectedTensor
from anybit.weight.block_types import BY_NAME, TYPES

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

    Leaving the block with an error removes the file; leaving it with a tensor missing is one.
    """

    def __init__(self, folder: str | os.PathLike[str], bundled: Bundled):
        self.path, self.bundled = Path(folder) / bundled.file, bundled
        self._place: dict[str, tuple[int, int]] = {}  # start in the data, bytes
        size = 0
        for name, (kind, shape) in bundled.tensors.items():
            block = BY_NAME[kind]
            if shape and shape[-1] % block.elements:
                raise ShapeMismatch(
                    f"tensor {shorten(name)} has rows of {shape[-1]} weights, which are not whole blocks of {block.elements} "
                    f"({kind})"
                )
            count = math.prod(shape) // block.elements * block.bytes
            self._place[name] = size, count
            size += count + -count % ALIGNMENT
        self._size = size
        self._missing = {name: max(len(sources), 1) for name, sources in bundled.sources().items()}
        self._written: set[str] = set()

    def __enter__(self) -> GgufWriter:
        header = self._header()
        self._start = len(header)
        try:
            self._handle = open(self.path, "xb")
            self._handle.write(header)
            self._handle.truncate(self._start + self._size)
        except OSError as error:
            raise write_failed(error, str(self.path)) from error
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        except BaseException:
            kind = True
            raise
        finally:
            self._handle.close()
            if kind is not None:
                self.path.unlink(missing_ok=True)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put one tensor of the checkpoint where it belongs; each comes once."""
        places = self.bundled.places.get(name)
        if places is None or name in self._written:
            what = "was written before" if name in self._written else "was not announced"
            raise UnexpectedTensor(f"tensor {shorten(name)} {what}, so {self.path} has no place for it")
        self._written.add(name)
        for place in places:
            self._put(name, place, place.make(tensor) if place.make is not None else tensor)

    def _put(self, name: str, place: Placed, tensor: Tensor) -> None:
        start, size = self._place[place.target]
        shape = self.bundled.tensors[place.target][1]
        if place.part is not None:
            size //= shape[0]
            start += place.part * size
        data = tensor_bytes(tensor)
        if len(data) != size:
            raise ShapeMismatch(
                f"tensor {shorten(name)} has {len(data)} bytes, but {size} were announced for {place.target!r}"
            )
        try:
            self._handle.seek(self._start + start)
            self._handle.write(data)
        except OSError as error:
            raise write_failed(error, f"{self.path}, tensor {shorten(name)}") from error
        self._missing[place.target] -= 1

    def _finish(self) -> None:
        for name, tensor in self.bundled.constants.items():
            self._handle.seek(self._start + self._place[name][0])
            self._handle.write(tensor_bytes(tensor))
            self._missing[name] -= 1
        missing = [name for name, count in self._missing.items() if count > 0]
        if missing:
            raise MissingTensor(
                f"{len(missing)} of {len(self._missing)} tensors were announced for {self.path}, but never (or not wholly) "
                f"written, such as {shorten(missing[0])}"
            )
        try:
            self._handle.flush()
            os.fsync(self._handle.fileno())
        except OSError as error:
            raise write_failed(error, str(self.path)) from error

    # --- header ----------------------------------------------------------------------------------------------------------

    def _header(self) -> bytes:
        tensors = self.bundled.tensors
        parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(self.bundled.values))]
        for key, value in self.bundled.values.items():
            kind, content = _typed(key, value)
            parts += [_text(key), struct.pack("<I", kind), content]
        for name, (type_name, shape) in tensors.items():
            if len(name.encode()) > MAX_NAME_BYTES:
                raise NotRepresentable(f"tensor {shorten(name)} has a name longer than {MAX_NAME_BYTES} bytes")
            sides = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
            parts += [_text(name), sides, struct.pack("<IQ", _NUMBER_OF[type_name], self._place[name][0])]
        header = b"".join(parts)
        return header + b"\0" * (-len(header) % ALIGNMENT)


def _text(value: str) -> bytes:
    raw = value.encode(errors="surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def _typed(key: str, value: Any) -> tuple[int, bytes]:
    """Type and bytes of a metadata value: whole numbers as uint32 where they fit, the rest as llama.cpp's converter does."""
    if isinstance(value, bool):
        return _BOOL, bytes([value])
    if isinstance(value, int):
        for number, form in ((4, "<I"), (5, "<i"), (11, "<q"), (10, "<Q")):
            try:
                return number, struct.pack(form, value)
            except struct.error:
                continue
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    if isinstance(value, str):
        return _STRING, _text(value)
    if isinstance(value, array) and value.typecode in _ITEMS:
        return _ARRAY, struct.pack("<IQ", _ITEMS[value.typecode], len(value)) + value.tobytes()
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return _ARRAY, struct.pack("<IQ", _STRING, len(value)) + b"".join(map(_text, value))
    raise NotRepresentable(f"the metadata value {key!r} is {shorten(value)}, which has no type in GGUF")
