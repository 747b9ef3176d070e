"""One file per quantization method: its configuration, its layouts and its quantizer. The folder is the list of methods.

Called, the package tells what each of them can do: `anybit.methods()`.
"""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anybit.quantizers.summary import MethodInfo


class _Methods(types.ModuleType):
    def __call__(self) -> list[MethodInfo]:
        from anybit.quantizers.summary import methods

        return methods()


sys.modules[__name__].__class__ = _Methods
