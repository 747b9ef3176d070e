"""How `x @ W.T` is computed from a weight on a device. One file (or folder) per kernel; the registry finds them by scanning.

Called, the package tells which of them run on this machine: `anybit.kernels()`.
"""

from __future__ import annotations

import sys
import types

from anybit.kernels.base import Kernel
from anybit.kernels.registry import Choice, KernelInfo, available, choose, get, infos

__all__ = ["Choice", "Kernel", "KernelInfo", "available", "choose", "get", "infos"]


class _Kernels(types.ModuleType):
    def __call__(self) -> list[KernelInfo]:
        return infos()


sys.modules[__name__].__class__ = _Kernels
