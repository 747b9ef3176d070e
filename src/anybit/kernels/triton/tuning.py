"""Which tile a product takes: data (tuning.json), so that a card is tuned by measuring (benchmarks/gpu) and not by editing code.

The first entry that fits is taken; null fits anything. `form` is what a leaf reads (planes, grid, codebook), `card` a compute
capability ("9.0") or the beginning of an AMD architecture ("gfx94"), `itemsize` that of the inputs in bytes; `bits` lists code
widths, `count` is the largest number of input rows. Parts of the columns (split-K) are chosen so that every processor has `waves`
blocks. `many`: rows of input from which decoding pieces for torch's matmul costs less than decoding in the product.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Tile:
    """One block of a product: rows of x, rows of the weight, runs of codes in a step; parts of the columns."""

    inputs: int
    rows: int
    runs: int
    splits: int
    warps: int
    stages: int


@functools.lru_cache(maxsize=1)
def _table() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(__file__).with_name("tuning.json").read_text())
    return found


def entries() -> list[dict[str, Any]]:
    """The tiles as they stand in the file."""
    found: list[dict[str, Any]] = _table()["tiles"]
    return found


@functools.lru_cache(maxsize=16)
def card(device: torch.device) -> tuple[str | None, int]:
    """(compute capability or architecture, processors)."""
    if device.type != "cuda":
        return None, 1
    found = torch.cuda.get_device_properties(device)
    name = found.gcnArchName.partition(":")[0] if torch.version.hip else f"{found.major}.{found.minor}"
    return name, found.multi_processor_count


def _is_for(entry: dict[str, Any], name: str | None) -> bool:
    return entry["card"] is None or (name or "").startswith(entry["card"])


@functools.lru_cache(maxsize=64)
def many(form: str, device: torch.device) -> int:
    """Rows of input from which a leaf of that form is decoded piece by piece."""
    for entry in _table()["many"]:
        if entry["form"] == form and _is_for(entry, card(device)[0]):
            rows: int = entry["rows"]
            return rows
    raise LookupError(f"tuning.json does not say how many rows are many for {form}")


@functools.lru_cache(maxsize=4096)
def tile_for(
    count: int, rows: int, runs: int, bits: int, form: str, dtype: torch.dtype, device: torch.device
) -> Tile:  # fmt: skip
    """The tile for `count` rows of input and a weight of `rows` rows of `runs` runs of codes."""
    name, processors = card(device)
    for entry in entries():
        if entry["form"] != form or entry["itemsize"] not in (None, dtype.itemsize) or not _is_for(entry, name):
            continue
        if bits in (entry["bits"] or (bits,)) and count <= (entry["count"] or count):
            blocks = -(-rows // entry["rows"]) * -(-count // entry["inputs"])
            most = max(1, runs // (4 * entry["runs"]))  # a part has work for four steps at least
            splits = max(1, min(processors * entry["waves"] // blocks, most, 16))
            return Tile(entry["inputs"], entry["rows"], entry["runs"], splits, entry["warps"], entry["stages"])
    raise LookupError(f"tuning.json has no entry for {bits}-bit codes and {count} rows")
