"""A checkpoint: named tensors in one or several files, known from headers alone, read one at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from anybit.containers import gguf, pickles, safetensors
from anybit.containers.info import Contents, TensorInfo, shorten
from anybit.containers.locating import PICKLE_SUFFIXES, Located, locate, unsafe_pickle
from anybit.containers.rawfile import RawFile
from anybit.errors import CheckpointError, CorruptFile, MissingTensor, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

    from anybit.quantizers.bundle import Derived

# A format of one file: how its header is read. Data of every format is read by RawFile.
READERS: dict[str, Callable[[RawFile], Contents]] = {
    ".safetensors": safetensors.read,
    ".gguf": gguf.read,
    **dict.fromkeys(PICKLE_SUFFIXES, pickles.read),
}
MAX_OPEN_FILES = 64


class Checkpoint:
    """Tensors by name. `metadata`: of all files, the first file to say something wins; `file_metadata` has each file's own.

    `values`: what is stored beside tensors and is not text (pickles, GGUF), by dotted name. Files are opened when first read
    from and stay open until `release` or the end of a `with` block; after that they are opened again when needed. Reading is
    safe from threads.
    """

    def __init__(self, path: Path, located: Located, contents: Mapping[Path, Contents], files: Mapping[Path, RawFile]):
        self.path = path
        self.file_metadata = {str(file): part.metadata for file, part in contents.items()}
        self.metadata: dict[str, str] = {}
        self.values: dict[str, Any] = {}
        tensors: dict[str, TensorInfo] = {}
        for part in contents.values():
            for info in part.tensors:
                if info.name in tensors:
                    raise CorruptFile(
                        f"tensor {shorten(info.name)} is in {tensors[info.name].file} and in {info.file}; which one counts "
                        f"cannot be told. Remove one of the files"
                    )
                tensors[info.name] = info
            self.metadata = {**part.metadata, **self.metadata}
            self.values = {**part.values, **self.values}
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(tensors)
        self._files = {str(file): raw for file, raw in files.items()}
        _check_index(located, tensors, self.values)

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, allow_pickle: bool = False, packages: tuple[str, ...] = ()
    ) -> Checkpoint:
        """The checkpoint in a folder, a file, or the shards of an index (*.index.json). Reads headers only.

        `allow_pickle`: read torch.save files too, with a reader that runs nothing of what they contain. `packages`: whose
        objects such a file may mention; they become `Described` values, the tensors in them tensors. Raises CheckpointError:
        CorruptFile, MissingTensor (a shard is absent), UnsafeFile (pickles, names leading out of the folder).
        """
        place = Path(path)
        located = locate(place, allow_pickle)
        files: dict[Path, RawFile] = {}
        contents: dict[Path, Contents] = {}
        for file in located.files:
            reader = READERS.get(file.suffix.lower())
            if reader is None:
                raise CheckpointError(
                    f"{file} is of no known kind; a checkpoint is a folder, an index (*.index.json) or a file ending in "
                    f"{', '.join(READERS)}"
                )
            if reader is pickles.read and not allow_pickle:
                raise unsafe_pickle(file)
            files[file] = RawFile(file)
            try:
                contents[file] = pickles.read(files[file], packages) if reader is pickles.read else reader(files[file])
            finally:
                files[file].close()
        return cls(place, located, contents, files)

    @staticmethod
    def another(path: str | os.PathLike[str]) -> Checkpoint:
        """Opens other files with the same care: what lies beside a checkpoint in one of its formats."""
        return Checkpoint.open(path)

    def renamed(self, derived: Mapping[str, Derived]) -> Checkpoint:
        """The same tensors under other names."""
        from anybit.containers.renamed import Renamed

        return Renamed(self, derived)

    def read(self, name: str, *, copy: bool = True) -> Tensor:
        """The tensor, on the CPU.

        `copy` True: it owns its memory; nothing of the file stays in this process's memory once the tensor is dropped, and
        the file may be replaced or deleted meanwhile. `copy` False: it lies in a map of the file where that is possible
        (aligned, mappable): free until touched, and pages once touched count as memory until the last such tensor of the
        file is gone and `release` was called. Do not write into it.
        """
        info = self.tensors.get(name)
        if info is None:
            raise MissingTensor(f"tensor {shorten(name)} is not in {self.path}{did_you_mean(name, self.tensors)}")
        return self.read_at(info, copy=copy)

    def read_at(self, info: TensorInfo, *, copy: bool = True) -> Tensor:
        """As `read`: a stored tensor, or a part of one whose bytes lie together."""
        file = self._files[info.file]
        if not file.is_open:
            self._make_room()
        return file.tensor(info, copy)

    def _make_room(self) -> None:
        opened = [file for file in self._files.values() if file.is_open]
        for file in opened[: max(len(opened) - MAX_OPEN_FILES + 1, 0)]:
            file.close()

    def release(self) -> None:
        """Close files and drop maps. Tensors that were read stay valid; reading again opens the files again."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {len(self.tensors)} tensors in {len(self._files)} files)"


def _check_index(located: Located, tensors: Mapping[str, TensorInfo], values: Mapping[str, Any]) -> None:
    """Every tensor the index names lies in the shard it says. (Shards may hold more: headers are the truth.)"""
    for name, file in located.file_of.items():
        info = tensors.get(name)
        if info is None and name in values:  # a tensor made of others, which have names of their own
            continue
        if info is None:
            raise MissingTensor(
                f"{located.index} places tensor {shorten(name)} in {file.name}, which does not hold it. Download both again"
            )
        if info.file != str(file):
            raise CorruptFile(
                f"{located.index} places tensor {shorten(name)} in {file.name}, but it lies in {info.file}. Download both again"
            )
