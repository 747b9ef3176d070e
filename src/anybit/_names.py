"""Lazy names of a package (PEP 562): a table of name -> module, resolved at first access."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from anybit.errors import did_you_mean


def is_module(name: str) -> bool:
    """Whether a submodule of that name can be imported."""
    from importlib.util import find_spec

    return not name.rpartition(".")[2].startswith("__") and find_spec(name) is not None


def lazy(
    package: str, table: Mapping[str, str], miss: Callable[[str], Any] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package. `miss(name)` may still find a name that the table lacks, or return None."""

    def resolve(name: str) -> Any:
        if name in table:
            value = getattr(importlib.import_module(table[name]), name)
        else:
            value = miss(name) if miss is not None and not name.startswith("_") else None
            if value is None and is_module(f"{package}.{name}"):
                return importlib.import_module(f"{package}.{name}")
            if value is None:
                raise AttributeError(f"module {package!r} has no attribute {name!r}{did_you_mean(name, table)}")
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        present: Iterable[str] = vars(sys.modules[package])
        return sorted({*present, *table})

    return resolve, names
