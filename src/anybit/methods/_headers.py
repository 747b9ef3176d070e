"""Dtypes and shapes of the tensors in a folder, from the headers of its .safetensors files: for folders that lost their
configuration. Selecting a backend reads it, so it needs neither torch nor the containers.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

from anybit.errors import CheckpointError
from anybit.quantizers.checkpoint_config import read_json

LIMIT_HEADER = 100_000_000  # of the safetensors format
Headers = Mapping[str, tuple[str, list[int]]]  # name -> (the format's name of a dtype, shape)


def headers_of(folder: Path, suffix: str) -> Headers:
    """Every tensor of a folder that has names ending in `suffix`; empty when none does, or when files cannot be right.

    Whoever loads the folder says what is wrong with it.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    files = [single] if single.is_file() else []
    if index.is_file():
        try:
            placed = read_json(index).get("weight_map")
        except CheckpointError:
            return {}
        if not isinstance(placed, dict) or not any(str(name).endswith(suffix) for name in placed):
            return {}
        files = sorted({folder / str(file) for file in placed.values() if Path(str(file)).name == str(file)})
    found: dict[str, tuple[str, list[int]]] = {}
    for file in files:
        found.update(_header(file))
    return found if any(name.endswith(suffix) for name in found) else {}


def _header(file: Path) -> dict[str, tuple[str, list[int]]]:
    """Name -> (the format's name of its dtype, shape); empty for a file that cannot be right."""
    try:
        with file.open("rb") as opened:
            (size,) = struct.unpack("<Q", opened.read(8))
            if size > min(LIMIT_HEADER, file.stat().st_size):
                return {}
            header = json.loads(opened.read(size))
        return {
            str(name): (str(info["dtype"]), [int(side) for side in info["shape"]])
            for name, info in header.items()
            if name != "__metadata__"
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, struct.error):
        return {}
