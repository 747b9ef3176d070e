"""How `x @ W.T` is computed from a weight on a device. One file (or folder) per kernel; the registry finds them by scanning.

Called, the package tells which of them run on this machine: `anybit.kernels()`.
"""

from __future__ import annotations

import sys
import types

from anybit.kernels.base import Kernel
from anybit.kernels.registry import Choice, KernelInfo, available, choose, get, infos

__all__ = ["Choice", "Kernel", "KernelInfo", "available", "choose", "get", "infos", "set_accuracy"]


def set_accuracy(accuracy: str) -> None:
    """What weights loaded from now on are multiplied with on the CPU: "exact" (the default), or "fast".

    Fast rounds the inputs of few tokens to 8 bits, 32 columns sharing a scale; `explain` says where it is done.
    """
    from anybit.kernels import cpu

    cpu.set_accuracy(accuracy)


class _Kernels(types.ModuleType):
    def __call__(self) -> list[KernelInfo]:
        return infos()


sys.modules[__name__].__class__ = _Kernels
