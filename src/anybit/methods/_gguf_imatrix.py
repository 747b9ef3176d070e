"""llama.cpp's importance matrices: mean squares of every tensor's inputs, as its tool `imatrix` writes them.

Newer files are GGUF: NAME.in_sum2 [experts, in] and NAME.counts [experts, 1]. Older ones (.dat) are a list, little-endian:

    entries i32, then for each   length i32, name, calls i32, numbers i32, float32 numbers (sums over calls)
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from anybit._lazy import torch
from anybit.errors import CorruptFile, InvalidOption
from anybit.quantizers.bundle import Bundled, Placed

if TYPE_CHECKING:
    from torch import Tensor

LIMIT = 1 << 30  # bytes; the largest models' matrices have some hundred million
SUMS, COUNTS = ".in_sum2", ".counts"


def read(path: str, another: Any) -> dict[str, Tensor]:
    """Tensor name -> float32 [experts, in] (an older file: [1, experts * in]). `another`: opens a GGUF file by its path."""
    if not os.path.isfile(path):
        raise InvalidOption(f"the importance matrix {path} does not exist")
    with open(path, "rb") as file:
        magic = file.read(4)
    found = _of_gguf(path, another) if magic == b"GGUF" else _of_list(path)
    for name, values in found.items():
        if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
            raise CorruptFile(
                f"{path}: {name[:100]!r} holds numbers that are no mean squares. Compute the matrix again"
            )
    return found


def bundled(
    name: str, found: Mapping[str, tuple[Tensor, Tensor]], chunks: int, length: int
) -> tuple[Bundled, dict[str, Tensor]]:
    """The file of this name in the form of llama.cpp's tool, and its tensors. `found`: tensor name -> sums of squares
    [experts, in], tokens [experts]; of `chunks` texts of `length` tokens."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    numbers: dict[str, Tensor] = {}
    for own, (sums, counts) in sorted(found.items()):
        numbers |= {own + SUMS: sums.to(torch.float32), own + COUNTS: counts.to(torch.float32).reshape(-1, 1)}
    for own, tensor in numbers.items():
        tensors[own] = "F32", tuple(tensor.shape)
    values = {
        "general.type": "imatrix", "imatrix.datasets": ["calibration"], "imatrix.chunk_count": chunks,
        "imatrix.chunk_size": length,
    }  # fmt: skip
    return Bundled(name, values, tensors, {own: (Placed(own),) for own in tensors}), numbers


def _of_gguf(path: str, another: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    with another(path) as file:
        for name in file.tensors:
            if not name.endswith(SUMS):
                continue
            own = name.removesuffix(SUMS)
            if own + COUNTS not in file.tensors:
                raise CorruptFile(f"{path}: there is no {own + COUNTS!r} beside {name!r}. Compute the matrix again")
            sums = file.read(name).to(torch.float32)
            counts = file.read(own + COUNTS).to(torch.float32).reshape(-1, 1)
            sums = sums.reshape(-1, sums.shape[-1])
            if counts.shape[0] not in (1, sums.shape[0]):
                raise CorruptFile(f"{path}: {own[:100]!r} has {sums.shape[0]} rows, but {counts.shape[0]} counts")
            found[own] = torch.where(counts > 0, sums / counts, 1.0)  # an expert that saw nothing
    if not found:
        raise CorruptFile(f"{path} holds no tensor *{SUMS}, so it is no importance matrix")
    return found


def _of_list(path: str) -> dict[str, Tensor]:
    size = os.path.getsize(path)
    if size > LIMIT:
        raise CorruptFile(f"{path} has {size} bytes, more than any importance matrix; the limit is {LIMIT}")
    with open(path, "rb") as file:
        raw = file.read()
    position = 0

    def number(what: str, limit: int) -> int:
        nonlocal position
        if position + 4 > len(raw):
            raise CorruptFile(f"{path} ends before {what}, at byte {len(raw)}. Compute the matrix again")
        found = int(struct.unpack_from("<i", raw, position)[0])
        position += 4
        if not 0 < found <= limit:
            raise CorruptFile(f"{path}: {what} is {found}; it lies between 1 and {limit}. It is no importance matrix")
        return found

    found: dict[str, Tensor] = {}
    for _ in range(number("the number of entries", 1 << 20)):
        length = number("the length of a name", 1 << 12)
        name = raw[position : position + length].decode(errors="replace")
        position += length
        calls = number(f"the number of calls of {name[:60]!r}", (1 << 31) - 1)
        count = number(f"the number of values of {name[:60]!r}", (len(raw) - position) // 4)
        values = torch.frombuffer(bytearray(raw[position : position + 4 * count]), dtype=torch.float32)
        position += 4 * count
        found[name] = (values / calls)[None]
    return found
