"""Golden folders, and the stored weights inside them."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file

from anybit.weight import Layout

if TYPE_CHECKING:
    from torch import Tensor

    from anybit.engine.load import Prepared
    from anybit.engine.plan import Entry


@dataclass(frozen=True)
class Golden:
    """One checkpoint with what its vendor's software makes of it."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def checkpoint(self) -> Path:
        """What a user would load: the folder, or the one .gguf file in it."""
        files = list(self.path.glob("*.gguf"))
        return files[0] if len(files) == 1 else self.path

    @property
    def fixture(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.path / "fixture.json").read_text())
        return found

    @property
    def reference(self) -> dict[str, Tensor]:
        return load_file(self.path / "reference.safetensors")


@dataclass(frozen=True)
class Unit:
    """One stored unit of a quantized weight: its layout and its tensors by relative name."""

    name: str
    layout: Layout
    tensors: Mapping[str, Tensor]
    kind: str

    def __repr__(self) -> str:
        return f"{self.name} ({type(self.layout).__name__})"


def find_goldens(method: str, folder: Path | None, test_file: Path, variants: tuple[str, ...] | None) -> list[Golden]:
    """Variant folders of a method. A missing folder is an error: a suite without examples would pass in silence."""
    places = [folder] if folder is not None else [
        parent / inner / method for parent in test_file.resolve().parents for inner in ("golden", "tests/golden")
    ]  # fmt: skip
    for place in places:
        if place.is_dir():
            found = [Golden(path.parent) for path in sorted(place.glob("*/reference.safetensors"))]
            found = [golden for golden in found if variants is None or golden.name in variants]
            if found:
                return found
    raise FileNotFoundError(
        f"no goldens of {method!r}: looked for <variant>/reference.safetensors in {places[0]} and above"
    )


@functools.lru_cache(maxsize=4)
def prepared(golden: Golden) -> Prepared:
    """The golden as `load` sees it before it reads data. Shared by tests: its model stays on the meta device."""
    from anybit.engine.load import prepare

    return prepare(golden.checkpoint, allow_pickle=True)


@functools.lru_cache(maxsize=2)
def units(golden: Golden) -> list[Unit]:
    """Every stored quantized unit of the golden, tensors read."""
    ready = prepared(golden)
    found = []
    for entry in ready.plan.entries:
        for part in entry.parts:
            if part.layout is not None:
                tensors = {name: ready.checkpoint.read(info.name).clone() for name, info in part.stored.items()}
                found.append(
                    Unit(part.prefix, part.layout, tensors, entry.slot.kind if len(entry.parts) == 1 else "linear")
                )
    return found


def samples(golden: Golden) -> list[Unit]:
    """One unit for each different layout and kind: enough where a law does not depend on the numbers."""
    chosen: dict[tuple[Any, ...], Unit] = {}
    for unit in units(golden):
        chosen.setdefault((unit.layout, unit.kind), unit)
    return list(chosen.values())


def entry_of(ready: Prepared, module: str) -> Entry | None:
    """The plan's entry for a module name of the reference: a layer, a 3-D parameter, or one stored part of it."""
    for entry in ready.plan.entries:
        names = {entry.slot.module, entry.slot.parameter, entry.slot.parameter.removesuffix(".weight")}
        if module in names or any(part.prefix == module for part in entry.parts):
            return entry
    return None
