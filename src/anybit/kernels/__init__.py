"""How `x @ W.T` is computed from a weight on a device. One file (or folder) per kernel; the registry finds them by scanning."""

from anybit.kernels.base import Kernel
from anybit.kernels.registry import Choice, available, choose, get

__all__ = ["Choice", "Kernel", "available", "choose", "get"]
