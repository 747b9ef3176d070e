"""Safetensors files written piece by piece: all headers first, from names, dtypes and shapes; then tensors in any order.

Memory stays at one tensor whatever the size of the checkpoint. The bytes are those of the safetensors package for the same
order of tensors and metadata. Space for all files is reserved at the start, so a disk that is too small is noticed then.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Collection, Mapping
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anybit._lazy import torch
from anybit.containers.atomic import atomic_folder, write_failed
from anybit.containers.info import BY_TORCH_NAME, shorten
from anybit.containers.safetensors import MAX_HEADER_BYTES
from anybit.containers.shards import Spec, aligned_order, bytes_of, dtype_name, split
from anybit.errors import InvalidOption, MissingTensor, NotRepresentable, ShapeMismatch, UnexpectedTensor

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SafetensorsWriter", "aligned_order", "atomic_folder", "split"]

# filesystems that cannot reserve space say so with one of these
_CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)


class SafetensorsWriter:
    """Writes tensors of announced names, dtypes and shapes into `folder`. A context manager; complete when it ends.

    `specs`: name -> (dtype, shape); tensors lie in this order (`aligned_order` is the one the safetensors package uses).
    `files`: name -> file name, to repeat a given division (default: `split` by `max_shard_size`). Several files get an index
    with `index_metadata` beside the total size. `shrinking`: names of small tensors of one dimension whose length is known
    only when they are made, and announced as the longest they can be; they lie behind the others of their file.
    Leaving the block with an error removes the files; leaving it with a tensor missing is one. `written`, when given: the
    files may be there from a broken run and hold these tensors, and an error leaves them for the next one.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        specs: Mapping[str, Spec],
        max_shard_size: int | str = "5GB",
        metadata: Mapping[str, str] | None = None,
        files: Mapping[str, str] | None = None,
        index_metadata: Mapping[str, Any] | None = None,
        shrinking: Collection[str] = (),
        written: Collection[str] | None = None,
    ):
        self.folder = Path(folder)
        order = sorted(specs, key=lambda name: name in shrinking)  # stable
        self.specs = {name: (dtype_name(specs[name][0]), tuple(specs[name][1])) for name in order}
        self._shrinking = frozenset(shrinking)
        sizes = {name: bytes_of(name, spec) for name, spec in self.specs.items()}
        self.file_of = dict(files) if files is not None else split(self.specs, max_shard_size)
        for file in self.file_of.values():
            if Path(file).name != file:
                raise InvalidOption(f"{shorten(file)} is no plain file name; all shards lie in {self.folder}")
        if not all(isinstance(text, str) for item in (metadata or {}).items() for text in item):
            raise InvalidOption(
                f"metadata {shorten(metadata)} has an entry that is not text; safetensors holds text only"
            )
        if set(self.file_of) != set(self.specs):
            odd = sorted(set(self.file_of) ^ set(self.specs))[0]
            raise UnexpectedTensor(f"tensor {shorten(odd)} has a file or a shape, but not both")
        self.index_metadata = {**(index_metadata or {}), "total_size": sum(sizes.values())}
        self._shards: dict[str, _Shard] = {
            file: _Shard(self.folder / file, metadata, written is not None)
            for file in dict.fromkeys(self.file_of.values()) or ("model.safetensors",)
        }
        for name, spec in self.specs.items():
            self._shards[self.file_of[name]].announce(name, spec, sizes[name])
        self._written: set[str] = set(written or ())
        for name in self._written:
            self._shards[self.file_of[name]].missing -= 1

    def __enter__(self) -> SafetensorsWriter:
        try:
            for shard in self._shards.values():
                shard.create()
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        except BaseException:
            self._discard()
            raise
        if kind is not None:
            self._discard()

    def write(self, name: str, tensor: Tensor) -> None:
        """Put one tensor in its place. It must be what was announced, and come once."""
        if name not in self.specs:
            raise UnexpectedTensor(f"tensor {shorten(name)} was not announced, so {self.folder} has no place for it")
        if name in self._written:
            raise UnexpectedTensor(f"tensor {shorten(name)} was written to {self.folder} before")
        found = dtype_name(tensor.dtype), tuple(tensor.shape)
        shrunk = name in self._shrinking and tensor.dim() == 1 and found[1] <= self.specs[name][1]
        if found[0] != self.specs[name][0] or (found[1] != self.specs[name][1] and not shrunk):
            raise ShapeMismatch(
                f"tensor {shorten(name)} is {found[0]} {list(found[1])}, but was announced as "
                f"{self.specs[name][0]} {list(self.specs[name][1])}"
            )
        if tensor.layout is not torch.strided or tensor.is_meta:
            raise NotRepresentable(
                f"tensor {shorten(name)} is {'meta' if tensor.is_meta else tensor.layout}; it has no bytes to write"
            )
        shard = self._shards[self.file_of[name]]
        data = tensor_bytes(tensor)
        if name in self._shrinking:
            shard.late[name] = bytes(data)
            self.index_metadata["total_size"] += len(data) - bytes_of(name, self.specs[name])
        elif data:
            shard.put(name, data)
        self._written.add(name)
        shard.missing -= 1
        if not shard.missing:
            shard.shrink()
            shard.close()

    def sync(self) -> None:
        """What was written so far is on the disk."""
        for shard in self._shards.values():
            shard.sync()

    def _finish(self) -> None:
        missing = [name for name in self.specs if name not in self._written]
        if missing:
            raise MissingTensor(
                f"{len(missing)} of {len(self.specs)} tensors were announced for {self.folder}, but never written, "
                f"such as {shorten(missing[0])}"
            )
        for shard in self._shards.values():
            shard.close()
        if len(self._shards) > 1:
            index = {"metadata": self.index_metadata, "weight_map": self.file_of}
            path = self.folder / "model.safetensors.index.json"
            try:
                path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            except OSError as error:
                raise write_failed(error, str(path)) from error

    def _discard(self) -> None:
        for shard in self._shards.values():
            shard.discard()


class _Shard:
    """One file: its header, and where each tensor's bytes go."""

    def __init__(self, path: Path, metadata: Mapping[str, str] | None, lasting: bool = False):
        self.path = path
        self.lasting = lasting  # it may be there from a broken run, and stays after an error
        self.header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        self.place: dict[str, int] = {}
        self.size = 0
        self.missing = 0
        self.start = 0
        self.created = False
        self.late: dict[str, bytes] = {}  # shrinking tensors, kept until the file is complete
        self.handle: FileIO | None = None

    def announce(self, name: str, spec: tuple[str, tuple[int, ...]], size: int) -> None:
        if name == "__metadata__":
            raise NotRepresentable("no tensor can be named __metadata__ in a safetensors file")
        kind = BY_TORCH_NAME[spec[0]]
        shape = [*spec[1][:-1], 2 * spec[1][-1]] if kind.pair else list(spec[1])
        self.header[name] = {"dtype": kind.code, "shape": shape, "data_offsets": [self.size, self.size + size]}
        self.place[name] = self.size
        self.size += size
        self.missing += 1

    def _encoded(self) -> bytes:
        header = json.dumps(self.header, separators=(",", ":"), ensure_ascii=False).encode()
        return header + b" " * (-len(header) % 8)  # data then begins at a multiple of 8

    def create(self) -> None:
        """Make the file with its header and reserve the space of its data."""
        header = self._encoded()
        if len(header) > MAX_HEADER_BYTES:
            raise NotRepresentable(
                f"{self.path}: a header of {len(header)} bytes, the format's limit is {MAX_HEADER_BYTES}. Write smaller shards"
            )
        self.start = 8 + len(header)
        try:
            mode = "r+" if self.lasting and self.path.exists() else "x"
            with FileIO(self.path, mode) as file:
                self.created = not self.lasting
                self._reserve(file.fileno(), self.start + self.size)
                _write_all(file, memoryview(len(header).to_bytes(8, "little") + header))
        except OSError as error:
            raise self._failed(error) from error

    @staticmethod
    def _reserve(descriptor: int, size: int) -> None:
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(descriptor, 0, size)
                return
            except OSError as error:
                if error.errno not in _CANNOT_RESERVE:
                    raise
        os.ftruncate(descriptor, size)

    def put(self, name: str, data: memoryview) -> None:
        try:
            if self.handle is None:
                self.handle = open(self.path, "r+b", buffering=0)  # noqa: SIM115 (closed in close)
            self.handle.seek(self.start + self.place[name])
            _write_all(self.handle, data)
        except OSError as error:
            raise self._failed(error, name) from error

    def shrink(self) -> None:
        """Put the tensors whose length was not known behind the others, and say in the header where they are."""
        if not self.late:
            return
        self.size = min(self.place[name] for name in self.late)
        for name in [name for name in self.header if name in self.late]:
            data, entry = self.late[name], self.header[name]
            size = entry["data_offsets"][1] - entry["data_offsets"][0]
            entry["shape"] = [len(data) * entry["shape"][0] // size] if size else [0]
            entry["data_offsets"] = [self.size, self.size + len(data)]
            self.place[name] = self.size
            self.size += len(data)
            self.put(name, memoryview(data))
        header = self._encoded().ljust(self.start - 8)
        try:
            assert self.handle is not None
            self.handle.seek(8)
            _write_all(self.handle, memoryview(header))
            self.handle.truncate(self.start + self.size)
        except OSError as error:
            raise self._failed(error) from error
        self.late = {}

    def sync(self) -> None:
        if self.handle is not None:
            try:
                os.fsync(self.handle.fileno())
            except OSError as error:
                raise self._failed(error) from error

    def close(self) -> None:
        if self.handle is not None:
            try:
                os.fsync(self.handle.fileno())  # some network disks report a full disk only here
            except OSError as error:
                raise self._failed(error) from error
            finally:
                self.handle.close()
                self.handle = None

    def discard(self) -> None:
        if self.handle is not None:
            self.handle.close()
            self.handle = None
        if self.created:
            self.path.unlink(missing_ok=True)

    def _failed(self, error: OSError, name: str = "") -> OSError:
        if isinstance(error, FileExistsError):
            return FileExistsError(f"{self.path} exists; the writer makes new files only")
        where = f"{self.path}, tensor {shorten(name)}" if name else f"{self.path} ({self.start + self.size} bytes)"
        return write_failed(error, where, self.lasting)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor; without a copy where it is contiguous on the CPU."""
    if not tensor.numel():
        return memoryview(b"")
    whole = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    # as_strided, for a contiguous tensor of a single element may still have a stride other than 1
    view: memoryview = whole.as_strided((whole.numel(),), (1,)).view(torch.uint8).numpy().data
    return view


def _write_all(file: FileIO, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += file.write(data[done : done + (1 << 30)])  # one call moves at most 2 GiB on Linux
