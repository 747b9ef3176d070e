"""What every registered method can do, from its classes alone; no torch."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from typing import Any

from anybit.quantizers import registry


@dataclass(frozen=True)
class MethodInfo:
    """One registered method. `loads`: its tensors are read; `calibration`: it cannot be made from weights alone."""

    name: str
    config: str
    quantizer: str
    loads: bool
    calibration: bool
    trains: bool
    summary: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def methods() -> list[MethodInfo]:
    """Every registered method, by name. Needs no torch."""
    found = []
    for name in registry.method_names():
        quantizer = registry.quantizer_class(name)
        config = registry.config_class(name)
        summary = (sys.modules[quantizer.__module__].__doc__ or "").strip().split("\n")[0]
        found.append(
            MethodInfo(
                name, config.__name__ if config else "", quantizer.__name__, quantizer.layouts_available,
                quantizer.requires_calibration, bool(quantizer.layouts_available and quantizer.is_trainable), summary,
            )
        )  # fmt: skip
    return found
