"""Which kernel runs a weight, and why the others do not. Kernels are found by scanning this package for `KERNELS`."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from dataclasses import asdict, dataclass
from typing import Any

import torch

from anybit.errors import InvalidOption, NoKernel, did_you_mean
from anybit.kernels.base import Kernel
from anybit.weight import Weight

_NOT_KERNELS = {"base", "registry", "ops"}


@dataclass(frozen=True)
class Choice:
    """The kernel for one weight, and why every better-ranked one for that device refused."""

    kernel: Kernel
    refusals: tuple[tuple[str, str], ...]

    @property
    def reason(self) -> str:
        return "; ".join(f"{name}: {why}" for name, why in self.refusals)


@dataclass(frozen=True)
class KernelInfo:
    """One kernel; `unavailable` says why it does not run on this machine, None if it does."""

    name: str
    description: str
    unavailable: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@functools.lru_cache(maxsize=1)
def _kernels() -> tuple[Kernel, ...]:
    package = importlib.import_module("anybit.kernels")
    found: list[Kernel] = []
    for module in pkgutil.iter_modules(package.__path__):
        if module.name not in _NOT_KERNELS and not module.name.startswith("_"):
            found += importlib.import_module(f"anybit.kernels.{module.name}").KERNELS
    return tuple(sorted(found, key=lambda kernel: -kernel.rank))


def available() -> list[tuple[Kernel, str | None]]:
    """Every kernel, best rank first, with the reason it cannot run on this machine (None: it can)."""
    return [(kernel, kernel.unavailable()) for kernel in _kernels()]


@functools.lru_cache(maxsize=64)
def get(name: str) -> Kernel:
    """The kernel called `name`."""
    for kernel in _kernels():
        if kernel.name == name:
            return kernel
    known = [kernel.name for kernel in _kernels()]
    raise InvalidOption(f"no kernel is called {name!r}{did_you_mean(name, known)}. Known: {', '.join(known)}")


def choose(weight: Weight, device: torch.device | str, only: str | None = None) -> Choice:
    """The best-ranked kernel that accepts `weight` on `device`; `only` names the one kernel allowed.

    Raises NoKernel listing every kernel with its reason.
    """
    device = torch.device(device)
    refusals: list[tuple[str, str]] = []
    for kernel in [get(only)] if only else _kernels():
        why = kernel.unavailable() or kernel.refuses(weight, device)
        if why is None:
            return Choice(kernel, tuple((name, why) for name, why in refusals if get(name).concerns(device)))
        refusals.append((kernel.name, why))
    reasons = "\n".join(f"  {name}: {why}" for name, why in refusals)
    raise NoKernel(f"no kernel multiplies with this weight {tuple(weight.shape)} on {device}:\n{reasons}")


def infos() -> list[KernelInfo]:
    """Every kernel, the preferred ones first."""
    return [KernelInfo(kernel.name, kernel.description, why_not) for kernel, why_not in available()]
