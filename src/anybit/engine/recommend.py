"""Which method? Every named scheme planned for one model from its headers, judged by the rules in `advice_rules`, and ranked."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from anybit.engine.advice_conversions import conversions
from anybit.engine.advice_judge import Candidate, Judge, beside_weights, placed
from anybit.engine.advice_plans import Known, Unknown
from anybit.engine.advice_wishes import Wishes, wishes_of
from anybit.engine.load import Prepared, prepare
from anybit.engine.memory import shape_of
from anybit.quantizers.summary import methods as method_infos


@dataclass(frozen=True)
class Recommendation:
    """Candidates in order: those to choose from first. `assumptions`: what was taken for granted, in words.

    Of a checkpoint that is quantized already there are no candidates: `present` is its method, `present_needs` bytes of memory,
    `present_targets` the programs that read it, `conversions` (scheme, "exact" or "rescaled"). `others`: schemes and methods that
    are no candidates, and why.
    """

    path: str
    device: str
    memory: int | None
    batch: int
    context: int
    candidates: tuple[Candidate, ...]
    assumptions: tuple[str, ...]
    others: tuple[tuple[str, str], ...] = ()
    present: str | None = None
    present_needs: int | None = None
    present_targets: tuple[str, ...] = ()
    present_trains: bool | None = None
    conversions: tuple[tuple[str, str], ...] = ()
    seconds: float = 0.0

    @property
    def choices(self) -> tuple[Candidate, ...]:
        """Candidates without an obstacle, best first."""
        return tuple(candidate for candidate in self.candidates if not candidate.obstacle)

    @property
    def smallest(self) -> Candidate | None:
        """What needs the least memory among those that only memory excludes, or nothing does."""
        able = [one for one in self.candidates if one.wished]
        return min(able, key=lambda one: one.bytes_needed, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        smallest = self.smallest
        return {
            **asdict(self),
            "choices": [one.scheme for one in self.choices],
            "smallest": None
            if smallest is None
            else {"scheme": smallest.scheme, "bytes_needed": smallest.bytes_needed},
        }


def recommend(
    path: str | os.PathLike[str],
    *,
    memory: str | int | float | None = None,
    device: str = "auto",
    train: bool = False,
    calibration: bool = True,
    batch: int = 1,
    context: int | None = None,
    target: str | None = None,
    hub_options: Mapping[str, Any] | None = None,
) -> Recommendation:
    """Rank all named schemes for a model from its headers; no weights are read.

    `memory`: the budget, e.g. "8GB" (default: what is free). `train`: for LoRA on packed weights. `calibration` False: there is
    no text, so commands name none. `target`: the program that is to serve it. For a checkpoint that is quantized already, says
    what it needs, and what the target reads of what it converts to without new codes; for that, one small weight of each kind is
    read. Raises InvalidOption for wishes that cannot be meant, CheckpointError for a path without a checkpoint.
    """
    begin = time.perf_counter()
    wishes = wishes_of(path, memory, device, train, calibration, batch, context, target)
    try:
        ready: Prepared | None = prepare(path, hub_options=hub_options)
    except ValueError as error:  # transformers' own word for a model it does not know
        ready, source = None, Unknown(path, error, wishes.notes, hub_options)
    if ready is not None:
        limit = shape_of(ready.model.config).longest
        if context is None and limit is not None and limit < wishes.context:
            wishes = replace(wishes, context=limit)
            wishes.notes.append(f"the model takes {limit} positions")
        if ready.quantizer is not None:
            return _of_quantized(ready, wishes, begin)
    judge = Judge(wishes, Known(ready) if ready is not None else source)
    found = list(judge.candidates())
    others = tuple((name, why) for why, names in judge.left_out.items() for name in names)
    others += _made_elsewhere({one.method for one in found})
    if ready is not None:
        ready.checkpoint.release()
    return _ranked(wishes, found, others, begin)


def _ranked(
    wishes: Wishes, found: list[Candidate], others: tuple[tuple[str, str], ...], begin: float
) -> Recommendation:
    able = sorted((one for one in found if not one.obstacle), key=lambda one: one.order)
    rest = sorted((one for one in found if one.obstacle), key=lambda one: (not one.wished, one.bytes_needed))
    return Recommendation(
        wishes.path, wishes.place, wishes.memory, wishes.batch, wishes.context, tuple(placed([*able, *rest])),
        tuple(wishes.notes), others, seconds=time.perf_counter() - begin,
    )  # fmt: skip


def _made_elsewhere(planned: set[str]) -> tuple[tuple[str, str], ...]:
    """Methods without a scheme here, and why."""
    found = []
    for info in method_infos():
        if info.name in planned:
            continue
        if info.creates:
            found.append((info.name, f"has no named scheme yet; --method {info.name} --set NAME=VALUE makes it"))
            continue
        why = "made by its own tools" + (", on calibration data" if info.calibration else "")
        found.append((info.name, f"{why}; checkpoints load here" if info.loads else f"{why}; not read yet"))
    return tuple(found)


def _of_quantized(ready: Prepared, wishes: Wishes, begin: float) -> Recommendation:
    assert ready.quantizer is not None
    plan, shape = ready.plan, shape_of(ready.model.config)
    needed = wishes.runtime_bytes + max(
        plan.peak_bytes, plan.bytes_in_memory + sum(beside_weights(shape, plan, wishes))
    )
    found = conversions(ready, wishes.target)
    ready.checkpoint.release()
    config = ready.quantizer.quantization_config
    trains = {info.name: info.trains for info in method_infos()}.get(config.dispatch_key())
    return Recommendation(
        wishes.path, wishes.place, wishes.memory, wishes.batch, wishes.context, (), (*wishes.notes, *shape.notes),
        present=ready.quantizer.method_name, present_needs=needed,
        present_targets=config.served_by(), present_trains=trains, conversions=found, seconds=time.perf_counter() - begin,
    )  # fmt: skip
