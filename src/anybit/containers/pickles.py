"""torch.save files (.bin, .pt, .pth), both layouts, as names, shapes and places of tensors. Only on explicit request.

    zip:     NAME/data.pkl describes the tensors, NAME/data/KEY holds the bytes of one storage, uncompressed
    legacy:  five pickles in a row (magic, protocol, system, the object, storage keys), then per key: int64 count, bytes

Nothing is unpacked and nothing in the file is run (see `unpickle.py`); tensors are read from where they lie.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from anybit.containers.info import BY_TORCH_NAME, LARGEST, MAX_DIMENSIONS, Contents, TensorInfo, elements, shorten
from anybit.containers.rawfile import RawFile
from anybit.containers.unpickle import Described, Name, Pickled, Storage, Unpickled, unpickle
from anybit.errors import AnybitError, CorruptFile, UnsafeFile

MAX_PICKLE_BYTES = 64 << 20
MAX_DIRECTORY_BYTES = 16 << 20
MAX_NAME = 4096
MAX_NESTING = 16
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
AGAIN = "Download it again or convert it to safetensors"

Places = Mapping[str, tuple[int, int]]  # storage key -> offset in the file, bytes


def read(file: RawFile, packages: tuple[str, ...] = ()) -> Contents:
    """Tensors and plain values of one torch.save file. Nested dictionaries and lists become dotted names.

    `packages`: whose objects are taken down as `Described` values; the tensors in them have dotted names below theirs.
    """
    start = file.bytes(0, min(file.size, 4))
    if start == b"PK\x03\x04":
        found, places = _read_zip(file, packages)
    elif start[:1] == b"\x80":
        found, places = _read_legacy(file, packages)
    else:
        raise CorruptFile(f"{file.path} is no torch.save file: it starts with {start!r}. {AGAIN}")
    if not isinstance(found.value, dict):
        raise CorruptFile(
            f"{file.path} holds a {type(found.value).__name__}; weights are a dictionary of tensors. {AGAIN}"
        )
    tensors: dict[str, TensorInfo] = {}
    values: dict[str, Any] = {}
    for count, (name, leaf) in enumerate(_leaves(found.value, "", 0, str(file.path))):
        if count > found.opcodes:  # every leaf that is spelled out took an opcode; these are repeated references
            raise CorruptFile(f"{file.path} repeats its parts without end; no state dict does. {AGAIN}")
        if name in tensors or name in values:
            raise CorruptFile(f"{file.path} has two entries named {shorten(name)}. {AGAIN}")
        if isinstance(leaf, Pickled):
            tensors[name] = _located(name, leaf, places, file)
        elif isinstance(leaf, (Name, Storage)):
            raise CorruptFile(f"{file.path}: {shorten(name)} is neither a tensor nor a plain value. {AGAIN}")
        else:
            values[name] = leaf
    return Contents(sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes)), {}, values)


def _leaves(value: Any, prefix: str, depth: int, where: str) -> Iterator[tuple[str, Any]]:
    if depth > MAX_NESTING:
        raise CorruptFile(f"{where} nests dictionaries more than {MAX_NESTING} deep; no state dict does. {AGAIN}")
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        name = f"{prefix}{key}"
        if not isinstance(key, (str, int)) or len(name) > MAX_NAME:
            raise CorruptFile(f"{where} has an entry named {shorten(name)}, which is no name of a tensor. {AGAIN}")
        holds_more = isinstance(item, (list, tuple)) and any(isinstance(part, (Pickled, dict)) for part in item)
        if isinstance(item, Described):
            yield name, item
            yield from _tensors_of(item, name, depth, where, set())
        elif (isinstance(item, dict) and item) or holds_more:
            yield from _leaves(item, f"{name}.", depth + 1, where)
        else:
            yield name, item


def _tensors_of(item: Described, prefix: str, depth: int, where: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """The tensors among an object's fields, and among those of the objects in it; an object met again is passed over."""
    seen.add(id(item))
    if depth > MAX_NESTING:
        raise CorruptFile(f"{where} nests objects more than {MAX_NESTING} deep; no state dict does. {AGAIN}")
    for field, part in item.fields.items():
        name = f"{prefix}.{field}"
        if len(name) > MAX_NAME:
            raise CorruptFile(f"{where} has an entry named {shorten(name)}, which is no name of a tensor. {AGAIN}")
        if isinstance(part, Described) and id(part) not in seen:
            yield from _tensors_of(part, name, depth + 1, where, seen)
        elif isinstance(part, Pickled):
            yield name, part


def _located(name: str, tensor: Pickled, places: Places, file: RawFile) -> TensorInfo:
    """Where the tensor lies, once every number it claims agrees with its storage."""
    where, storage = f"{file.path}, tensor {shorten(name)}", tensor.storage
    numbers = (tensor.offset, *tensor.shape, *tensor.stride)
    if not isinstance(storage, Storage) or tensor.dtype not in BY_TORCH_NAME:
        raise CorruptFile(
            f"{where}: not a tensor over a storage, or of the unknown dtype {shorten(tensor.dtype)}. {AGAIN}"
        )
    if (
        not all(type(number) is int and 0 <= number <= LARGEST for number in numbers)
        or len(tensor.shape) > MAX_DIMENSIONS
    ):
        raise CorruptFile(f"{where}: shape {shorten(tensor.shape)}, stride {shorten(tensor.stride)} cannot be. {AGAIN}")
    if len(tensor.shape) != len(tensor.stride) or storage.key not in places:
        raise CorruptFile(f"{where}: its storage {shorten(storage.key)} is not in the file. {AGAIN}")
    begin, available = places[storage.key]
    itemsize = BY_TORCH_NAME[tensor.dtype].itemsize
    count = elements(tensor.shape)
    extent = 1 + sum((side - 1) * step for side, step in zip(tensor.shape, tensor.stride)) if count else 0
    if count is None or (tensor.offset + extent) * itemsize > available or count * itemsize > available:
        raise CorruptFile(
            f"{where}: {tensor.dtype} {shorten(tensor.shape)} from element {tensor.offset} reaches beyond its storage of "
            f"{available} bytes. {AGAIN}"
        )
    contiguous = count == 0 or _is_row_major(tensor)
    return TensorInfo(
        name, tensor.dtype, tensor.shape, count * itemsize, str(file.path), begin + tensor.offset * itemsize,
        None if contiguous else tensor.stride,
    )  # fmt: skip


def _is_row_major(tensor: Pickled) -> bool:
    step = 1
    for side, stride in zip(reversed(tensor.shape), reversed(tensor.stride)):
        if side != 1 and stride != step:
            return False
        step *= side
    return True


# --- zip ----------------------------------------------------------------------------------------------------------------


class _Window(io.RawIOBase):
    """The file as zipfile wants it. No single read may be larger than a directory or a pickle may be."""

    def __init__(self, file: RawFile, offset: int = 0):
        super().__init__()
        self.file, self.offset = file, offset

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.offset

    def seek(self, offset: int, whence: int = 0) -> int:
        target = offset + (0, self.offset, self.file.size)[whence]
        if target < 0:
            raise OSError("seek before the start of the file")
        self.offset = target
        return target

    def read(self, size: int = -1) -> bytes:
        count = max(self.file.size - self.offset, 0)
        count = min(count, size) if size is not None and size >= 0 else count
        if count > MAX_DIRECTORY_BYTES:
            raise CorruptFile(
                f"{self.file.path}: a directory or pickle of {count} bytes, the limit is {MAX_DIRECTORY_BYTES}"
            )
        data = self.file.bytes(self.offset, count)
        self.offset += count
        return data


def _read_zip(file: RawFile, packages: tuple[str, ...]) -> tuple[Unpickled, Places]:
    try:
        with zipfile.ZipFile(_Window(file)) as archive:
            entries = _checked_entries(archive.infolist(), file)
            pickles = [name for name in entries if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise CorruptFile(f"{file.path} is a zip file without one data.pkl, so not from torch.save. {AGAIN}")
            root = pickles[0].removesuffix("data.pkl")
            if entries[pickles[0]].file_size > MAX_PICKLE_BYTES:
                raise CorruptFile(
                    f"{file.path}: its data.pkl has {entries[pickles[0]].file_size} bytes, the limit is {MAX_PICKLE_BYTES}"
                )
            order = entries.get(f"{root}byteorder")
            if order is not None and archive.open(order).read(16) != b"little":
                raise CorruptFile(f"{file.path} was written on a big-endian machine, which is not supported")
            found = unpickle(io.BytesIO(archive.read(pickles[0])), f"{file.path} ({pickles[0]})", packages)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, ValueError, struct.error) as error:
        if isinstance(error, AnybitError):
            raise
        raise CorruptFile(f"{file.path} is a damaged zip file ({shorten(str(error))}). {AGAIN}") from error
    inside = f"{root}data/"
    places = {
        name.removeprefix(inside): _data_of(entry, file) for name, entry in entries.items() if name.startswith(inside)
    }
    end, before = 0, ""
    for key, (offset, size) in sorted(places.items(), key=lambda place: place[1]):
        if offset < end:
            raise CorruptFile(f"{file.path}: storages {shorten(before)} and {shorten(key)} overlap. {AGAIN}")
        end, before = offset + size, key
    return found, places


def _checked_entries(infos: list[zipfile.ZipInfo], file: RawFile) -> dict[str, zipfile.ZipInfo]:
    """Entries by name; none of them compressed, encrypted, larger than the file, or with a path that leads elsewhere."""
    entries: dict[str, zipfile.ZipInfo] = {}
    for entry in infos:
        name = entry.filename
        if name.startswith("/") or "\\" in name or ".." in PurePosixPath(name).parts or ":" in name:
            raise UnsafeFile(
                f"{file.path} has an entry {shorten(name)}, which leads out of the archive; it was not read"
            )
        if name in entries:
            raise CorruptFile(f"{file.path} has two entries named {shorten(name)}. {AGAIN}")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size or entry.flag_bits & 1:
            raise CorruptFile(
                f"{file.path}: entry {shorten(name)} is compressed or encrypted ({entry.compress_size} bytes for "
                f"{entry.file_size}); torch.save never does that. {AGAIN}"
            )
        if entry.header_offset < 0 or entry.header_offset + entry.file_size > file.size:
            raise CorruptFile(
                f"{file.path}: entry {shorten(name)} of {entry.file_size} bytes ends behind the file. {AGAIN}"
            )
        entries[name] = entry
    return entries


def _data_of(entry: zipfile.ZipInfo, file: RawFile) -> tuple[int, int]:
    """Offset and size of an uncompressed entry's bytes: they follow its local header and two fields of variable length."""
    if entry.header_offset + 30 > file.size:
        raise CorruptFile(f"{file.path}: entry {shorten(entry.filename)} begins behind the file. {AGAIN}")
    header = file.bytes(entry.header_offset, 30)
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    offset = entry.header_offset + 30 + name_length + extra_length
    if header[:4] != b"PK\x03\x04" or offset + entry.file_size > file.size:
        raise CorruptFile(f"{file.path}: entry {shorten(entry.filename)} has a damaged header. {AGAIN}")
    return offset, entry.file_size


# --- legacy -------------------------------------------------------------------------------------------------------------


def _read_legacy(file: RawFile, packages: tuple[str, ...]) -> tuple[Unpickled, Places]:
    stream = io.BufferedReader(_Budget(file))
    where = str(file.path)
    if unpickle(stream, where).value != LEGACY_MAGIC:
        raise CorruptFile(f"{where} is a pickle, but not one that torch.save wrote. {AGAIN}")
    protocol, system = unpickle(stream, where).value, unpickle(stream, where).value
    if protocol != LEGACY_PROTOCOL or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise CorruptFile(f"{where}: torch.save layout {shorten(protocol)} on {shorten(system)} is not supported")
    found = unpickle(stream, where, packages)
    keys = unpickle(stream, where).value
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or set(keys) != set(found.storages):
        raise CorruptFile(f"{where}: its list of storages is not the list of those its tensors use. {AGAIN}")
    position = stream.tell()
    places: dict[str, tuple[int, int]] = {}
    for key in keys:
        if position + 8 > file.size:
            raise CorruptFile(f"{where} is truncated: storage {shorten(key)} is missing. {AGAIN}")
        stored, storage = int.from_bytes(file.bytes(position, 8), "little"), found.storages[key]
        size = stored * BY_TORCH_NAME[storage.dtype].itemsize
        if stored != storage.count or position + 8 + size > file.size:
            raise CorruptFile(
                f"{where}: storage {shorten(key)} of {storage.count} elements is stored as {stored}, "
                f"with {file.size - position - 8} bytes left in the file. {AGAIN}"
            )
        places[key] = (position + 8, size)
        position += 8 + size
    if position < file.size:
        raise CorruptFile(f"{where}: {file.size - position} bytes after the last storage belong to nothing. {AGAIN}")
    return found, places


class _Budget(io.RawIOBase):
    """The first bytes of the file as a stream: five pickles, no more."""

    def __init__(self, file: RawFile):
        super().__init__()
        self.file, self.position = file, 0

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), self.file.size - self.position, MAX_PICKLE_BYTES - self.position)
        if count <= 0:
            return 0
        buffer[:count] = self.file.bytes(self.position, count)
        self.position += count
        return count
