"""Which tile a product takes: data (tuning.json), so that a card is tuned by measuring (benchmarks/gpu) and not by editing code.

The first entry that fits is taken; null fits anything. `bits` lists code widths, `count` is the largest number of input rows,
`codebook` says whether codes name vectors. Parts of the columns (split-K) are chosen so that every processor has `waves` blocks.
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
def entries() -> list[dict[str, Any]]:
    """The table as it stands in the file."""
    found: list[dict[str, Any]] = json.loads(Path(__file__).with_name("tuning.json").read_text())
    return found


@functools.lru_cache(maxsize=16)
def _card(device: torch.device) -> tuple[str | None, int]:
    """(compute capability, processors)."""
    if device.type != "cuda":
        return None, 1
    found = torch.cuda.get_device_properties(device)
    return f"{found.major}.{found.minor}", found.multi_processor_count


@functools.lru_cache(maxsize=4096)
def tile_for(count: int, rows: int, runs: int, bits: int, codebook: bool, device: torch.device) -> Tile:
    """The tile for `count` rows of input and a weight of `rows` rows of `runs` runs of codes."""
    capability, processors = _card(device)
    for entry in entries():
        wanted = {"compute_capability": capability, "codebook": codebook}
        if any(entry[name] not in (None, value) for name, value in wanted.items()):
            continue
        if bits in (entry["bits"] or (bits,)) and count <= (entry["count"] or count):
            blocks = -(-rows // entry["rows"]) * -(-count // entry["inputs"])
            most = max(1, runs // (4 * entry["runs"]))  # a part has work for four steps at least
            splits = max(1, min(processors * entry["waves"] // blocks, most, 16))
            return Tile(entry["inputs"], entry["rows"], entry["runs"], splits, entry["warps"], entry["stages"])
    raise LookupError(f"tuning.json has no entry for {bits}-bit codes and {count} rows")
