"""How codes are chosen for a dense weight. One file per algorithm, found by its name: `algorithms/rtn.py` is "rtn".

An algorithm file has one public function:

    quantize(dense, target, **options) -> Weight

`dense`: float tensor [out, in] or [experts, out, in], never written to. `target`: the weight's scheme, a `Weight` on the meta
device, whose tree says what must be filled in. The result has the target's structure and lies on dense.device.
Options are keyword-only with defaults; an unknown one is a TypeError at the call. A tree the algorithm cannot fill raises
NotRepresentable, naming the node.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from anybit.errors import InvalidOption, did_you_mean

if TYPE_CHECKING:
    from anybit.weight import Weight


def names() -> list[str]:
    """Every algorithm, by file name."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def accepted(quantize: Callable[..., Weight], options: Mapping[str, object]) -> dict[str, object]:
    """The options that an algorithm takes, of those a layout offers."""
    known = inspect.signature(quantize).parameters
    return {name: value for name, value in options.items() if name in known}


def get(name: str) -> Callable[..., Weight]:
    """The `quantize` function of the algorithm called `name`; InvalidOption names the closest."""
    known = names()
    if name not in known:
        raise InvalidOption(
            f"no algorithm is called {name!r}{did_you_mean(name, known) or '.'} Known: {', '.join(known)}"
        )
    quantize: Callable[..., Weight] = importlib.import_module(f"{__name__}.{name}").quantize
    return quantize
