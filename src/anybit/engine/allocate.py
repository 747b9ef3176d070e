"""Mixed precision: a scheme for each module so that the predicted loss is least and the size is kept, exactly.

Each module in each scheme has a cost (see `sensitivity`) and a size. Costs are taken to add up, which holds while they are small.
Modules that serving programs fuse (query, key and value; gate and up) get one scheme together. The choice is an integer program,
solved to the optimum by HiGHS through SciPy. Then both it and the best single scheme of at most the same size are made, rounded
to nearest or by a calibrated algorithm, and read text that no cost was measured on; the one with the lower perplexity is taken.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anybit.engine.calibration import calibration_tokens
from anybit.engine.evaluate import evaluate
from anybit.engine.load import load
from anybit.engine.memory import parse_size
from anybit.engine.outlining import size
from anybit.engine.quantize import quantize
from anybit.engine.recipe import DENSE, Calibration, Recipe, Setting
from anybit.engine.sensitivity import LENGTH, SAMPLES, SEED, Progress, Sensitivity, sees_inputs, sensitivity
from anybit.errors import ConfigError, InvalidOption, MissingDependency, did_you_mean
from anybit.quantizers.config import QuantizationConfigMixin
from anybit.quantizers.named import from_scheme, schemes

# last parts of module names that run as one matrix in serving programs
FUSED: tuple[tuple[str, ...], ...] = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
METRICS = ("kl", "output")
DEFAULT_METHOD = "auto-round"
CHECKED_CONTEXT = 256
CHECKED_ROWS = 32  # of text that no cost was measured on, if there is so much


@dataclass(frozen=True)
class Allocation:
    """What was chosen. `mixed` False: the best single scheme read the text at least as well, and is the recipe.

    Bytes are those of all tensors in the files. `bits`: of the quantizable weights, stored bits each.
    """

    path: str
    budget: int
    bytes: int
    bits: float
    predicted: float
    uniform: str | None
    uniform_bytes: int
    uniform_bits: float
    uniform_predicted: float
    perplexity: float | None
    uniform_perplexity: float | None
    mixed: bool
    recipe: Recipe
    counts: Mapping[str, int]
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        own = {name: value for name, value in self.__dict__.items() if name != "recipe"}
        return {**own, "recipe": self.recipe.to_dict()}


@dataclass(frozen=True)
class _Unit:
    """Modules that are chosen for together: (scheme, bytes, loss) of each choice."""

    modules: tuple[str, ...]
    choices: tuple[tuple[str, int, float], ...]


def allocate(
    path: str | os.PathLike[str],
    calibration: Any,
    *,
    memory: str | int | float | None = None,
    bits: float | None = None,
    method: str | None = None,
    schemes: Sequence[str] = (),
    metric: str = "kl",
    dense: bool = False,
    check: bool = True,
    algorithm: str | None = None,
    samples: int = SAMPLES,
    sequence_length: int = LENGTH,
    seed: int = SEED,
    cache: str | os.PathLike[str] | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Allocation:
    """The best mix of `schemes` (default: all of `method`'s) for `memory` (bytes of all tensors) or `bits` per quantized weight.

    `calibration`: as for `quantize`; costs are measured on the rows that `sensitivity` draws, and up to 32 others check the
    result (of a text too short for that, a third of its rows does). `algorithm`: a calibrated one, e.g. "gptq", that makes the
    two that are compared and stands in the recipe; costs are its own where it rounds by inputs as gptq does, else those of the
    schemes' own rounding. `metric`: what a cost is: "kl", or "output" (faster to measure: squared output error). `dense`:
    modules may also stay as they are. `check` False leaves out the comparison with the best single scheme. Raises
    InvalidOption for a budget that nothing fits, naming the smallest that does.
    """
    if (memory is None) == (bits is None):
        raise InvalidOption("allocate needs one of memory (e.g. '4GB') and bits (e.g. 4.25)")
    if metric not in METRICS:
        raise InvalidOption(f"metric is {metric!r}; it must be one of {', '.join(METRICS)}")
    milp_or_raise()
    names = _candidates(method, schemes)
    from anybit.engine.source import locate

    location = locate(path)
    folder = location if location.is_dir() else location.parent
    seen, fresh = _split(calibration, folder, samples, sequence_length, seed)
    measured = sensitivity(
        path, seen, names, kl=metric == "kl", algorithm=algorithm if algorithm and sees_inputs(algorithm) else None,
        cache=cache, device=device, progress=progress,
    )  # fmt: skip
    units = _units(measured, metric, dense)
    weights = sum(measured.weights.values())
    budget = parse_size(memory) - measured.other_bytes if memory is not None else int(bits * weights / 8)  # type: ignore[operator]
    smallest = sum(min(size for _, size, _ in unit.choices) for unit in units)
    if smallest > budget:
        raise InvalidOption(
            f"nothing of {', '.join(names)} fits: the smallest mix has {size(smallest + measured.other_bytes)} of tensors "
            f"({8 * smallest / weights:.2f} bits per quantized weight), {size(smallest - budget)} more than asked for. Allow "
            "that much, or name smaller schemes"
        )
    chosen = solve(units, budget)
    uniform, uniform_bytes, uniform_loss = _uniform(measured, metric, names, budget)
    bytes_chosen = sum(_choice(unit, name)[1] for unit, name in zip(units, chosen))
    predicted = sum(_choice(unit, name)[2] for unit, name in zip(units, chosen))
    settings = {module: name for unit, name in zip(units, chosen) for module in unit.modules}
    mixed = _recipe(measured, settings)
    perplexity = uniform_perplexity = None
    same = uniform is not None and set(settings.values()) == {uniform}
    if uniform is None:
        better, verdict = True, "no single scheme fits, so there is nothing to compare with"
    elif same:
        better, verdict = False, f"the best mix is {uniform} everywhere"
    elif not check:
        better, verdict = True, "not compared with the best single scheme"
    else:
        text = (seen if algorithm else None, fresh)
        perplexity = _perplexity(path, replace(mixed, algorithm=algorithm), measured, *text, device)
        uniform_perplexity = _perplexity(
            path, Recipe(Setting(scheme=uniform), algorithm=algorithm), measured, *text, device
        )
        better = perplexity < uniform_perplexity
        verdict = (
            f"the mix reads held-out text better than {uniform} everywhere"
            if better
            else f"the mix does not read held-out text better than {uniform} everywhere, so that is the recipe"
        )
    if not better:
        settings = dict.fromkeys(settings, str(uniform))
    about = {
        "made_by": "anybit allocate", "metric": metric, "calibration_tokens": measured.tokens, "verdict": verdict,
        "bits_per_weight": round(8 * (bytes_chosen if better else uniform_bytes) / weights, 4),
        **({"perplexity": perplexity, "uniform_perplexity": uniform_perplexity, "uniform": uniform} if perplexity else {}),
    }  # fmt: skip
    recipe = replace(
        _recipe(measured, settings, about), algorithm=algorithm, calibration=_named(calibration, algorithm)
    )
    final = {name: list(settings.values()).count(name) for name in dict.fromkeys(settings.values())}
    return Allocation(
        str(path), budget + measured.other_bytes, bytes_chosen + measured.other_bytes, 8 * bytes_chosen / weights, predicted,
        uniform, uniform_bytes + measured.other_bytes, 8 * uniform_bytes / weights, uniform_loss, perplexity,
        uniform_perplexity, better, recipe, final, verdict,
    )  # fmt: skip


def _split(calibration: Any, folder: Path, samples: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to measure on, those that `sensitivity` draws; and others, to check on."""
    seen = calibration_tokens(calibration, folder, samples=samples, length=length, seed=seed)
    every = calibration_tokens(calibration, folder, samples=samples + CHECKED_ROWS, length=length, seed=seed)
    fresh = every[[not bool((seen == row).all(1).any()) for row in every]]
    if len(fresh) >= max(len(seen) // 2, 1):
        return seen, fresh
    if len(every) < 2:
        raise InvalidOption(
            f"the calibration text fills {len(every)} row of {length} tokens; allocate needs two, one to measure and one to "
            "check. Give more text, or a smaller sequence_length"
        )
    held = max(len(every) // 3, 1)
    return every[:-held], every[-held:]


def _named(calibration: Any, algorithm: str | None) -> Calibration | None:
    """What a recipe says of calibration: the file, where one was given and is needed."""
    if algorithm is None or not isinstance(calibration, (str, os.PathLike)) or not os.path.isfile(calibration):
        return None
    return Calibration(str(Path(calibration).resolve()))


def milp_or_raise() -> Any:
    """SciPy's solver; MissingDependency says how to get it."""
    try:
        from scipy import optimize
    except ImportError as error:
        raise MissingDependency(
            "allocating bits (an exact integer program)", package="scipy", extra="allocate"
        ) from error
    return optimize


def _candidates(method: str | None, given: Sequence[str]) -> list[str]:
    known = schemes()
    if given:
        configs = [from_scheme(name) for name in given]
        kinds = dict.fromkeys(type(config) for config in configs)
        if len(kinds) > 1:
            raise ConfigError(
                f"{', '.join(given)} are of {' and '.join(kind.__name__ for kind in kinds)}; one checkpoint is of one method"
            )
        names = list(dict.fromkeys(given))
    else:
        wanted = method or DEFAULT_METHOD
        names = [name for name, (cls, _) in known.items() if cls.method == wanted]
        if not names:
            able = sorted({cls.method for cls, _ in known.values()})
            raise InvalidOption(
                f"{wanted!r} has no named schemes{did_you_mean(wanted, able) or '.'} Methods that have: {', '.join(able)}"
            )
    base = from_scheme(names[0])
    if type(base).per_module is QuantizationConfigMixin.per_module:
        base.per_module({})  # says which methods can
    return names


def _units(measured: Sensitivity, metric: str, dense: bool) -> list[_Unit]:
    """Modules that are fused in serving programs together; each choice holds for all of them."""
    costs: dict[str, dict[str, tuple[int, float]]] = {}
    for cost in measured.costs:
        loss = (
            cost.kl if metric == "kl" else (cost.weight_error if cost.output_error is None else cost.output_error) ** 2
        )
        costs.setdefault(cost.module, {})[cost.scheme] = (cost.bytes, float(loss or 0.0))
    if dense:
        for module, size in measured.dense_bytes.items():
            costs[module][DENSE] = (size, 0.0)
    groups: dict[tuple[str, Any], list[str]] = {}
    for module in costs:
        parent, _, own = module.rpartition(".")
        fused = next((names for names in FUSED if own in names), own)
        groups.setdefault((parent, fused), []).append(module)
    found = []
    for modules in groups.values():
        common = [name for name in costs[modules[0]] if all(name in costs[module] for module in modules)]
        if not common:
            raise ConfigError(
                f"no scheme quantizes all of {', '.join(modules)}, which serving programs run as one matrix"
            )
        choices = tuple(
            (name, sum(costs[module][name][0] for module in modules), sum(costs[module][name][1] for module in modules))
            for name in common
        )
        found.append(_Unit(tuple(modules), choices))
    return found


def solve(units: Sequence[_Unit], budget: int) -> list[str]:
    """One choice for each unit, of the least sum of losses whose sum of bytes is at most `budget`: the optimum."""
    import numpy

    optimize = milp_or_raise()
    losses = numpy.array([loss for unit in units for _, _, loss in unit.choices])
    sizes = numpy.array([size for unit in units for _, size, _ in unit.choices], dtype=float)
    one_each = numpy.zeros((len(units), len(losses)))
    place = 0
    for row, unit in enumerate(units):
        one_each[row, place : place + len(unit.choices)] = 1
        place += len(unit.choices)
    scale = max(float(sizes.max()), 1.0)
    found = optimize.milp(
        losses / max(float(losses.max()), 1e-30),
        constraints=[
            optimize.LinearConstraint(one_each, 1, 1),
            optimize.LinearConstraint(sizes[None] / scale, -numpy.inf, budget / scale),
        ],
        integrality=numpy.ones(len(losses)),
        bounds=optimize.Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if not found.success:
        raise ConfigError(f"the solver found no allocation: {found.message}")
    chosen, place = [], 0
    for unit in units:
        picked = found.x[place : place + len(unit.choices)]
        chosen.append(unit.choices[int(picked.argmax())][0])
        place += len(unit.choices)
    return chosen


def _choice(unit: _Unit, name: str) -> tuple[str, int, float]:
    return next(choice for choice in unit.choices if choice[0] == name)


def _uniform(measured: Sensitivity, metric: str, names: Sequence[str], budget: int) -> tuple[str | None, int, float]:
    """The single scheme of least predicted loss that fits: what one would take without all this."""
    best: tuple[str | None, int, float] = (None, 0, float("inf"))
    for name in names:
        own = [cost for cost in measured.costs if cost.scheme == name]
        total = sum(cost.bytes for cost in own)
        loss = sum(
            (cost.kl or 0.0) if metric == "kl" else (cost.output_error or cost.weight_error) ** 2 for cost in own
        )
        if len(own) == len(measured.weights) and total <= budget and loss < best[2]:
            best = (name, total, loss)
    return best


def _recipe(measured: Sensitivity, settings: Mapping[str, str], about: Mapping[str, Any] | None = None) -> Recipe:
    """The commonest scheme for all, and what differs from it."""
    names = [name for name in settings.values() if name != DENSE]
    if not names:
        raise InvalidOption("the budget leaves every module dense; there is nothing to quantize")
    usual = max(dict.fromkeys(names), key=names.count)
    modules = {
        stored: None if name == DENSE else Setting(scheme=name)
        for module, name in settings.items()
        if name != usual
        for stored in measured.names[module]
    }
    return Recipe(Setting(scheme=usual), modules, about=dict(about or {}))


def _perplexity(
    path: Any, recipe: Recipe, measured: Sensitivity, calibration: Tensor | None, rows: Tensor, device: Any
) -> float:
    """Of the model that a recipe makes, on rows of text; `calibration`: rows for its algorithm."""
    config = recipe.config([name for own in measured.names.values() for name in own])
    with tempfile.TemporaryDirectory(prefix="anybit-allocate-") as folder:
        if calibration is None:
            model = load(path, config, device_map=device)
        else:
            made = Path(folder) / "made"
            quantize(path, made, config, calibration=calibration, algorithm=recipe.algorithm, device=device)
            model = load(made, device_map=device)
        context = min(CHECKED_CONTEXT, rows.shape[1] + 1)
        return evaluate(model, rows.flatten(), context=context, tokenizer=None).perplexity
