"""Who runs the loops over all numbers of a weight: native code where there is some, the torch code beside the callers otherwise.

    @encoder("row_ranges")
    def row_ranges(matrix, across, casts): ...          torch: slow, obvious, on every device; what is meant

A twin of the same name takes the same arguments and gives the same bits, or NotImplemented for what is not its business (another
device, an unusual dtype). Twins are found as kernels are: by scanning, in whatever names `ENCODERS` (name -> function).
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from anybit._lazy import torch

PROVIDERS = "anybit.kernels"
Loop = TypeVar("Loop", bound=Callable[..., Any])
_off: list[None] = []  # one entry for each `torch_only` that is open


@functools.lru_cache(maxsize=1)
def _twins() -> dict[str, tuple[Callable[..., Any], ...]]:
    package = importlib.import_module(PROVIDERS)
    found: dict[str, tuple[Callable[..., Any], ...]] = {}
    for module in pkgutil.iter_modules(package.__path__):
        if module.name.startswith("_") or not module.ispkg:
            continue
        offered = getattr(importlib.import_module(f"{PROVIDERS}.{module.name}"), "ENCODERS", {})
        for name, twin in offered.items():
            found[name] = (*found.get(name, ()), twin)
    return found


def encoder(name: str) -> Callable[[Loop], Loop]:
    """The decorated torch code, or a twin called `name` that accepts the arguments."""

    def decorate(loop: Loop) -> Loop:
        @functools.wraps(loop)
        def run(*args: Any, **options: Any) -> Any:
            if not torch.compiler.is_compiling() and not _off:
                for twin in _twins().get(name, ()):
                    found = twin(*args, **options)
                    if found is not NotImplemented:
                        return found
            return loop(*args, **options)

        return run  # type: ignore[return-value]

    return decorate


@contextmanager
def torch_only() -> Iterator[None]:
    """No twins inside: what the torch code itself gives."""
    _off.append(None)
    try:
        yield
    finally:
        _off.pop()
