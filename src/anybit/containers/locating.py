"""Which files of a folder hold the weights, and which files a checkpoint may name.

The file or folder a user names is trusted as it is, links included. A file that a *folder's content* names (a shard in an
index, `model.safetensors` in a downloaded folder) must lie, with every link followed, inside that folder. One exception: a
snapshot of the Hugging Face cache (.../REPOSITORY/snapshots/REVISION) links to .../REPOSITORY/blobs, which is allowed.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

from anybit.containers.info import shorten
from anybit.errors import CheckpointError, CorruptFile, MissingTensor, UnsafeFile
from anybit.quantizers.checkpoint_config import read_json

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
# torch.save files that training leaves beside the weights
NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state.*)\.(bin|pt|pth)$")
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.[a-z]+$")
_USUAL = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?$")
# formats without an index, whose parts find each other by their names: any of them means all of them
SPLIT_BY_NAME = (".gguf",)
MAX_PARTS = 4096


@dataclass(frozen=True)
class Located:
    """Files to read, and, where an index says so, the file each tensor lies in."""

    files: list[Path]
    index: Path | None = None
    file_of: dict[str, Path] = field(default_factory=dict)


def locate(path: Path, allow_pickle: bool) -> Located:
    """The weight files of a folder, an index or a single file."""
    if not os.path.exists(path):  # Path.exists would raise for a folder that may not be entered
        if os.path.islink(path):
            raise CheckpointError(f"{path} is a link to {os.readlink(path)}, which does not exist; download it again")
        raise CheckpointError(f"no such file or folder: {path} (the current folder is {Path.cwd()})")
    if os.path.isdir(path):
        return _in_folder(path, allow_pickle)
    if path.name.endswith(".index.json"):
        return read_index(path)
    return Located(_parts(path) if path.suffix.lower() in SPLIT_BY_NAME else [path])


def _parts(file: Path) -> list[Path]:
    """All parts of the model that `file` is a part of, by their names; just the file if it is whole."""
    named = SHARD.match(file.name)
    if named is None:
        return [file]
    total, digits = int(named["total"]), slice(named.start("number"), named.end("number"))
    if not 0 < int(named["number"]) <= total <= MAX_PARTS:
        raise CorruptFile(f"{file} is named as part {int(named['number'])} of {total}, which cannot be")
    names = [f"{file.name[: digits.start]}{number:05d}{file.name[digits.stop :]}" for number in range(1, total + 1)]
    files = [file if name == file.name else inside(file.parent, name, str(file)) for name in names]
    absent = [part.name for part in files if not os.path.lexists(part)]
    if absent:
        raise MissingTensor(
            f"{file} is one of {total} parts, and {len(absent)} are missing: {', '.join(absent[:10])}. Download them"
        )
    return files


def _in_folder(folder: Path, allow_pickle: bool) -> Located:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror or error}") from error
    safetensors = [name for name in names if name.endswith(".safetensors")]
    if {"pytorch_model.bin", "pytorch_model.bin.index.json"} & set(names) and not any(map(_USUAL.match, names)):
        safetensors = []  # an adapter, say: the weights are in the file with the usual name
    found = _choose(folder, safetensors, "model", ".safetensors", names)
    if found is not None:
        return found
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES) and not NOT_WEIGHTS.match(name)]
    if pickles and not allow_pickle:
        raise unsafe_pickle(folder / pickles[0])
    found = _choose(folder, pickles, "pytorch_model", ".bin", names)
    for suffix in SPLIT_BY_NAME:
        found = found or _choose(folder, [name for name in names if name.endswith(suffix)], "model", suffix, names)
    if found is not None:
        return found
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "") if names else "nothing"
    raise CheckpointError(f"{folder} holds no weights: expected model.safetensors or its index, found {shown}")


def _choose(folder: Path, files: list[str], usual: str, suffix: str, names: list[str]) -> Located | None:
    """The usual file, else the usual index, else the only index, complete set of shards or file. None if there is none."""
    indexes = [name for name in names if name.endswith(f"{suffix}.index.json")]
    if f"{usual}{suffix}" in files:
        return Located([inside(folder, f"{usual}{suffix}", "the folder")])
    if indexes:
        name = f"{usual}{suffix}.index.json"
        if name not in indexes and len(indexes) > 1:
            raise CheckpointError(f"{folder} has several indexes ({', '.join(indexes)}); name the one to open")
        return read_index(inside(folder, name if name in indexes else indexes[0], "the folder"))
    sets: dict[str, list[str]] = {}
    for name in files:
        shard = SHARD.match(name)
        sets.setdefault(f"{shard['stem']}-*-of-{shard['total']}" if shard else name, []).append(name)
    if not sets:
        return None
    preferred = [key for key in sets if key.startswith(f"{usual}-")]
    chosen = preferred if len(preferred) == 1 else list(sets)
    if len(chosen) > 1:
        raise CheckpointError(
            f"{folder} has several weight files and no index to say how they belong together: "
            f"{', '.join(files[:10])}{', ...' if len(files) > 10 else ''}. Name the file to open"
        )
    members = sets[chosen[0]]
    shard = SHARD.match(members[0])
    if shard and len(members) != int(shard["total"]):
        have = {int(match["number"]) for match in map(SHARD.match, members) if match}
        absent = [str(number) for number in range(1, min(int(shard["total"]), 1000) + 1) if number not in have]
        raise MissingTensor(
            f"{folder} has {len(members)} of the {int(shard['total'])} shards of {shard['stem']}; missing: "
            f"{', '.join(absent[:10])}. Download them"
        )
    return Located([inside(folder, name, "the folder") for name in members])


def unsafe_pickle(file: Path) -> UnsafeFile:
    """Why a pickle is not read unasked, and how to ask."""
    return UnsafeFile(
        f"{file} is a pickle, a format that can run code. It is read only on request, by a reader that runs nothing: "
        f"Checkpoint.open(path, allow_pickle=True). Or convert it to safetensors"
    )


def read_index(index: Path) -> Located:
    """The shards an index (*.index.json) names, each checked to exist inside the index's folder."""
    if not os.path.isfile(index):
        raise CheckpointError(f"{index} is not a regular file")
    content = read_json(index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptFile(f"{index} has no weight_map of tensor names to files. Download it again")
    files: dict[str, Path] = {}
    file_of: dict[str, Path] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise CorruptFile(
                f"{index}: the file of tensor {shorten(tensor)} is {shorten(name)}, which is no file name"
            )
        if name not in files:
            files[name] = inside(index.parent, name, f"{index} (tensor {shorten(tensor)})")
            if not os.path.lexists(files[name]):
                count = sum(other == name for other in weight_map.values())
                raise MissingTensor(
                    f"{files[name]} is missing; {index.name} places {count} tensors in it, such as {shorten(tensor)}. Download it"
                )
        file_of[tensor] = files[name]
    return Located([files[name] for name in sorted(files)], index, file_of)


def inside(folder: Path, name: str, said_by: str) -> Path:
    """`folder / name`, for a name that content gave. UnsafeFile if it leads out of the folder (see the top of this file)."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if not name or posix.is_absolute() or windows.drive or "\\" in name or "\0" in name or ".." in posix.parts:
        raise UnsafeFile(f"{said_by} names the file {shorten(name)}; only names inside {folder} are read")
    file = folder / name
    home, real = Path(os.path.realpath(folder)), Path(os.path.realpath(file))
    allowed = [home, *(parent.parent / "blobs" for parent in (home, *home.parents) if parent.name == "snapshots")]
    if not any(real.is_relative_to(place) and not place.is_symlink() for place in allowed):
        raise UnsafeFile(
            f"{file} is a link to {real}, outside of {home}. Open the folder it points to, or replace the link by the file"
        )
    return file
