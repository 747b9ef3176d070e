"""How codes are chosen for a dense weight. One file per algorithm, found by its name: `algorithms/rtn.py` is "rtn".

An algorithm file has one public function:

    quantize(dense, target, **options) -> Weight

`dense`: float tensor [out, in] or [experts, out, in], never written to. `target`: the weight's scheme, a `Weight` on the meta
device, whose tree says what must be filled in. The result has the target's structure and lies on dense.device.
Options are keyword-only with defaults; an unknown one is a TypeError at the call. A tree the algorithm cannot fill raises
NotRepresentable, naming the node.

With calibration data there are two more kinds. A rounding that is trained has `Rounding` and `tune` (autoround.py). A folding
has `candidates(weights, inputs, largest, group)`: scales [in] for matrices that share an input, whose inverse goes into what
makes that input; it comes before a rounding: "awq" (then the layout's own rounding), "awq+gptq", "smoothquant+gptq". A
refinement has `refine` and comes last (finetune.py): "aqlm+finetune".
A calibrated one may say ahead of a run what it computes for a matrix, `cost(rows, columns, samples, length, **options) -> Cost`,
and what it holds at once beside one matrix, `memory(weights, widths, samples, length, **options) -> bytes`: of a block with so
many weights, whose matrices' inputs and outputs are together so wide.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

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
    quantize: Callable[..., Weight] | None = getattr(importlib.import_module(f"{__name__}.{name}"), "quantize", None)
    if quantize is None:
        raise InvalidOption(f"{name!r} needs calibration data; pass calibration=")
    return quantize


@dataclass(frozen=True)
class Cost:
    """What calibrating one matrix takes beside passes over its block. `products`: operations of matrix products; `numbers`:
    how many numbers element-wise passes go over; `steps`: small operations, one after the other; `roundings`: how often the
    matrix is rounded to nearest."""

    products: float = 0.0
    numbers: float = 0.0
    steps: float = 0.0
    roundings: float = 0.0


@dataclass(frozen=True)
class Steps:
    """What is done to a block: weights are rescaled by `foldings`, then rounded, then refined together.

    `rounding` None: as their layout does. `refinement` None: not refined.
    """

    foldings: tuple[str, ...]
    rounding: str | None
    refinement: str | None = None

    def split(self, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Options of the rounding, and of the refinement."""
        known = inspect.signature(module(self.refinement).refine).parameters if self.refinement is not None else {}
        ours = {name: value for name, value in options.items() if name not in known}
        return ours, {name: value for name, value in options.items() if name in known}


def steps(name: str) -> Steps:
    """The steps that "a+b+c" names; InvalidOption for an unknown one or a wrong order."""
    found = name.split("+")
    for step in found:
        if step not in names():
            raise InvalidOption(
                f"no algorithm is called {step!r}{did_you_mean(step, names()) or '.'} Known: {', '.join(names())}"
            )
    foldings = [step for step in found if hasattr(module(step), "candidates")]
    refinements = [step for step in found if hasattr(module(step), "refine")]
    roundings = found[len(foldings) : len(found) - len(refinements)]
    if foldings + roundings + refinements != found or len(roundings) > 1 or len(refinements) > 1:
        raise InvalidOption(
            f"algorithm is {name!r}; it must be foldings ({', '.join(_having('candidates'))}), then at most one rounding, then "
            f"at most one refinement ({', '.join(_having('refine'))}), e.g. awq+gptq or aqlm+finetune"
        )
    return Steps(tuple(foldings), *(own[0] if own else None for own in (roundings, refinements)))


def module(name: str) -> ModuleType:
    """The file of one algorithm."""
    return importlib.import_module(f"{__name__}.{name}")


def modules(name: str | None) -> list[ModuleType]:
    """The files of all steps of "a+b+c"."""
    found = Steps((), None) if name is None else steps(name)
    return [module(own) for own in (*found.foldings, found.rounding, found.refinement) if own is not None]


def _having(function: str) -> list[str]:
    return [name for name in names() if hasattr(module(name), function)]
