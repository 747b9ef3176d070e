"""One file on disk: checked before it is trusted, opened once, read in place or into memory of its own."""

from __future__ import annotations

import math
import mmap
import os
import stat
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from anybit._lazy import torch
from anybit.containers.info import TensorInfo
from anybit.errors import CheckpointError, CorruptFile

if TYPE_CHECKING:
    from io import FileIO

    from torch import Tensor

# Files that are often saved under the name of a weight file; what they are says more than "bad header".
KNOWN_STARTS = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself. Run `git lfs pull`, or download it again"),
    (b"<!DOCTYPE", "is a web page, most likely an error message of the server. Download it again"),
    (b"<html", "is a web page, most likely an error message of the server. Download it again"),
    (b'{"error', "is an error message of the server. Download it again"),
)


class RawFile:
    """A regular file. Reading fails if it is no longer the file it was when its header was read."""

    def __init__(self, path: Path):
        self.path = path
        self._handle: FileIO | None = None
        self._map: mmap.mmap | None = None
        self._lock = threading.Lock()
        self._identity = self._look()
        self.size: int = self._identity[2]
        if self.size == 0:
            raise CorruptFile(f"{path} is empty; the download or the program that wrote it was interrupted")
        start = self.bytes(0, min(self.size, 64))
        for known, what in KNOWN_STARTS:
            if start.startswith(known):
                raise CorruptFile(f"{path} ({self.size} bytes) {what}")

    def _look(self) -> tuple[int, int, int, int]:
        try:
            found = os.stat(self.path)
        except OSError as error:
            if os.path.islink(self.path):
                raise CheckpointError(
                    f"{self.path} is a link to {os.readlink(self.path)}, which does not exist; download the file again"
                ) from error
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror or error}") from error
        if stat.S_ISDIR(found.st_mode):
            raise CheckpointError(f"{self.path} is a folder where a file was expected")
        if not stat.S_ISREG(found.st_mode):  # a pipe or device could block, or never end
            raise CheckpointError(f"{self.path} is not a regular file; pipes and devices are not read")
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns

    @property
    def is_open(self) -> bool:
        return self._handle is not None

    def close(self) -> None:
        """Close the file and forget its map; tensors that still use the map keep it alive."""
        with self._lock:
            if self._handle is not None:
                self._handle.close()
            # Never map.close(): torch.frombuffer does not lock the buffer, so live tensors would point into nothing.
            self._handle = self._map = None

    def _opened(self) -> FileIO:
        if self._handle is None:
            if self._look() != self._identity:
                raise CorruptFile(f"{self.path} has changed since its header was read; open the checkpoint again")
            try:
                self._handle = open(self.path, "rb", buffering=0)  # noqa: SIM115 (closed in close)
            except OSError as error:
                raise CheckpointError(f"{self.path} cannot be read: {error.strerror or error}") from error
        return self._handle

    def bytes(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset`. The caller has checked them against the file's size and a limit."""
        buffer = bytearray(count)
        self._fill(memoryview(buffer), offset)
        return bytes(buffer)

    def _fill(self, view: memoryview, offset: int) -> None:
        done = 0
        with self._lock:
            try:
                handle = self._opened()
                handle.seek(offset)
                while done < len(view):
                    got = handle.readinto(view[done : done + (1 << 30)])  # one call moves at most 2 GiB on Linux
                    if not got:
                        break
                    done += got
            except OSError as error:
                raise CheckpointError(
                    f"{self.path} cannot be read at byte {offset + done}: {error.strerror}"
                ) from error
        if done < len(view):
            raise CorruptFile(
                f"{self.path} ends at byte {offset + done}, but had {self.size} bytes when its header was read; "
                f"something shortened it meanwhile"
            )

    # --- tensors -------------------------------------------------------------------------------------------------------

    def tensor(self, info: TensorInfo, copy: bool) -> Tensor:
        """The tensor that `info` (checked against this file's size) describes."""
        dtype = getattr(torch, info.dtype, None)
        if dtype is None:
            raise CheckpointError(
                f"tensor {info.name!r} in {info.file} is {info.dtype}, a dtype this torch does not have; a newer one may"
            )
        if math.prod(info.shape) == 0:
            return torch.empty(info.shape, dtype=dtype)
        stride = info.stride or _row_major(info.shape)
        count = 1 + sum((side - 1) * step for side, step in zip(info.shape, stride))
        size = count * dtype.itemsize
        in_place = not copy and info.offset % dtype.itemsize == 0 and not info.byte_order
        flat = self._view(info.offset, count, dtype) if in_place else None
        if flat is None:
            raw = torch.empty(size, dtype=torch.uint8)
            self._fill(raw.numpy().data, info.offset)
            flat = _ordered(raw, info.byte_order).view(dtype)
        if dtype == torch.bool and bool((flat.view(torch.uint8) > 1).any()):
            raise CorruptFile(f"tensor {info.name!r} in {info.file} is bool, but has bytes other than 0 and 1")
        if info.stride is None:
            return flat.view(info.shape)
        strided = flat.as_strided(info.shape, stride)
        return strided.contiguous() if copy else strided

    def _view(self, offset: int, count: int, dtype: torch.dtype) -> Tensor | None:
        """Elements in place, or None where the file cannot be mapped (an address-space limit, some network disks)."""
        with self._lock:
            if self._map is None:
                try:
                    # A private map is writable, so torch has nothing to warn of, and a stray write never reaches the file.
                    self._map = mmap.mmap(self._opened().fileno(), self.size, access=mmap.ACCESS_COPY)
                except (OSError, ValueError, OverflowError):
                    return None
            return torch.frombuffer(self._map, dtype=dtype, count=count, offset=offset)


def _ordered(raw: Tensor, order: tuple[int, ...]) -> Tensor:
    """Bytes of a file of the other byte order, put right run by run; in place, a few megabytes at a time."""
    if not order:
        return raw
    runs, index = raw.view(-1, len(order)), torch.tensor(order)
    for part in runs.split(max((4 << 20) // len(order), 1)):
        part.copy_(part[:, index])
    return raw


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    steps = [1]
    for side in reversed(shape[1:]):
        steps.append(steps[-1] * side)
    return tuple(reversed(steps)) if shape else ()
