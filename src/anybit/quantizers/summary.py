"""What every registered method can do, as the conformance suite measured it (`make capabilities`); no torch."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from anybit.quantizers import registry

MEASURED = Path(__file__).parent.parent / "methods" / "_measured.json"
CAPABILITIES = {
    "reads": "its checkpoints load, and their numbers are the vendor's",
    "runs": "packed weights multiply, and logits are the vendor's",
    "saves": "what was loaded is saved byte for byte",
    "creates": "dense weights are rounded to it; only static scales may need data",
    "trains": "gradients reach the inputs of packed layers, so LoRA trains",
}


@dataclass(frozen=True)
class MethodInfo:
    """One registered method. A capability is True when the conformance suite saw it on every checkpoint it holds.

    `loads`: this version reads the method's tensors. `calibration`: it cannot be made from weights alone. `checkpoints`: how
    many of the vendor's own the suite holds; 0 for a method that was not measured (a plugin's, say).
    """

    name: str
    config: str
    quantizer: str
    summary: str
    loads: bool
    calibration: bool
    reads: bool
    runs: bool
    saves: bool
    creates: bool
    trains: bool
    checkpoints: int

    def says(self, capability: str) -> str:
        """A cell of the tables: "yes", "-", or "with data" for what is made by fitting to calibration data."""
        if capability == "creates" and self.calibration:
            return "with data"
        return "yes" if getattr(self, capability) else "-"

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def methods() -> list[MethodInfo]:
    """Every registered method, by name. Needs no torch."""
    measured: dict[str, dict[str, Any]] = json.loads(MEASURED.read_text()) if MEASURED.is_file() else {}
    found = []
    for name in registry.method_names():
        quantizer, config = registry.quantizer_class(name), registry.config_class(name)
        own = measured.get(config.method if config else name, {})
        own = own if measured.get(name) is None else measured[name]
        summary = (sys.modules[quantizer.__module__].__doc__ or "").strip().split("\n")[0]
        found.append(
            MethodInfo(
                name, config.__name__ if config else "", quantizer.__name__, summary, quantizer.layouts_available,
                quantizer.requires_calibration, checkpoints=int(own.get("checkpoints", 0)),
                **{capability: bool(own.get(capability)) for capability in CAPABILITIES},
            )
        )  # fmt: skip
    return found


def markdown_table() -> str:
    """The table of the README: one row per method."""
    lines = [
        f"| method | {' | '.join(CAPABILITIES)} | vendor's checkpoints | |",
        f"|---|{'---|' * len(CAPABILITIES)}---|---|",
    ]
    for info in methods():
        cells = " | ".join(info.says(capability) for capability in CAPABILITIES)
        lines.append(f"| `{info.name}` | {cells} | {info.checkpoints or '-'} | {info.summary} |")
    return "\n".join(lines) + "\n"
