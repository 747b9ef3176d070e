"""`torch`, imported when it is first used.

Selecting a backend (`from_config`, config classes, registries) must not load torch: 50 ms against two seconds. Files that
are read on that path (`quantizers/`, `methods/`, `weight/`) write `from anybit._lazy import torch` and touch it inside
functions only. Files that cannot do anything without torch (`kernels/`, `modules/`, `engine/`) import it plainly.

The weight tree alone costs half of those 50 ms, so a method file defers it as well, with everything else that only tensors
need (tests/test_import_cost.py measures it):

    if TYPE_CHECKING:
        from anybit.methods import _gptq_layout as layouts
    else:
        layouts = LazyModule("anybit.methods._gptq_layout")
"""

from __future__ import annotations

import importlib
import types
from typing import TYPE_CHECKING, Any


class LazyModule(types.ModuleType):
    """A stand-in that becomes the real module at the first attribute access."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # introspection (copy, inspect, doctest) must not trigger the import
            raise AttributeError(name)
        module = importlib.import_module(self.__name__)
        value = getattr(module, name)
        self.__dict__[name] = value
        return value


if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")

__all__ = ["LazyModule", "torch"]
