"""What making a checkpoint will take, said before it begins: size and memory from headers, time from samples of the speed.

Each kind of rounding is timed on one weight that is to be rounded so. A calibrated algorithm says what it computes for
one matrix (`cost` in its file); products, element-wise passes and small operations are timed here. One without `cost` is timed
on rows of the smallest matrix it is to round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from anybit import algorithms
from anybit.engine.block_weights import target_of
from anybit.engine.budget import BATCH, Budget
from anybit.engine.load import Prepared
from anybit.engine.materialize import dense_part, make_weight
from anybit.engine.plan import Entry, PlannedPart
from anybit.weight import Layout

PASSES = 6  # forward passes over a block: one for each of four inputs, one that finds them, one to go on
SECONDS_PER_BYTE = 1e-9  # read or written
ROWS = 128  # of the matrix that an algorithm is timed on
SAMPLE = 1 << 20  # weights that say enough of how fast a kind is rounded
LONG = 0.5  # seconds that say enough when they are measured once


@dataclass(frozen=True)
class Forecast:
    """What a run will take. `seconds` is rough: from a sample of this machine's speed."""

    seconds: float
    memory_bytes: int
    bytes_read: int
    bytes_written: int
    hidden_bytes: int = 0  # of hidden states on disk at one time, beside the result
    batch: int = BATCH


def forecast(
    ready: Prepared,
    tokens: Tensor | None,
    own: Budget,
    jobs: Iterable[Any],
    algorithm: str | None = None,
    options: Mapping[str, Any] | None = None,
    calibrated: Iterable[str] = (),
) -> Forecast:
    """`tokens`: [samples, length] of calibration. `calibrated`: the parameters that `algorithm` rounds, with its `options`."""
    wanted = [entry for entry in ready.plan.entries if entry.action == "quantize"]
    read = sum(entry.bytes_stored for entry in ready.plan.entries)
    seen = set(calibrated)
    written = bytes_written(jobs)
    seconds = SECONDS_PER_BYTE * (read + written)
    seconds += _seconds_each(ready, [entry for entry in wanted if entry.slot.parameter not in seen])
    hidden = 0
    if tokens is not None:
        inside = [entry for entry in wanted if entry.slot.parameter in seen]
        seconds += _seconds_calibrated(ready, inside, tokens, algorithm, options or {})
        width = max((entry.slot.shape[-1] for entry in wanted), default=0)
        hidden = 2 * tokens.numel() * width * ready.plan.dtype.itemsize
    return Forecast(seconds, own.needed, read, written, hidden, own.batch)


def bytes_written(jobs: Iterable[Any]) -> int:
    """Of all tensors that the jobs announce."""
    return sum(
        torch.Size(shape).numel() * getattr(torch, dtype).itemsize
        for job in jobs
        for dtype, shape in job.specs.values()
    )


def _units(entries: Iterable[Entry]) -> Iterator[tuple[Entry, PlannedPart, Layout]]:
    for entry in entries:
        for part in entry.parts:
            if part.layout is not None:
                yield entry, part, part.layout


def _seconds(work: Callable[[], object], times: int = 1) -> float:
    """Of one. A first, short one is left out: it loads libraries and touches memory."""
    begin = time.perf_counter()
    work()
    first = time.perf_counter() - begin
    if first > LONG:
        return first
    begin = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - begin) / times


def _kind(layout: Layout) -> tuple[object, ...]:
    """What is rounded alike: layouts that differ in nothing but their shape."""
    return (type(layout), *(getattr(layout, own.name) for own in fields(layout) if own.name != "shape"))


def _seconds_each(ready: Prepared, wanted: Iterable[Entry]) -> float:
    """Of weights that are rounded without calibration: one of each kind is made, of few weights."""
    kinds: dict[tuple[object, ...], list[tuple[int, Entry, PlannedPart]]] = {}
    for entry, part, layout in _units(wanted):
        if layout.algorithm is not None:
            kinds.setdefault(_kind(layout), []).append((torch.Size(layout.shape).numel(), entry, part))
    total = 0.0
    for units in kinds.values():
        size, entry, part = max((unit for unit in units if unit[0] <= SAMPLE), default=min(units, key=_size), key=_size)

        def work(entry: Entry = entry, part: PlannedPart = part) -> object:
            assert part.layout is not None
            return part.layout.encode(make_weight(ready.model, entry, part, ready.checkpoint))

        total += _seconds(work) / size * sum(unit[0] for unit in units)
    return total


def _size(unit: tuple[int, Entry, PlannedPart]) -> int:
    return unit[0]


@dataclass(frozen=True)
class _Speed:
    """Seconds of one operation of a matrix product, of one number in an element-wise pass, of one small operation."""

    product: float
    number: float
    step: float

    @staticmethod
    def measured() -> _Speed:
        square, many = torch.rand(512, 512), torch.rand(1 << 20)
        return _Speed(
            _seconds(lambda: square @ square, 4) / (2 * 512**3),
            _seconds(lambda: many.add(1), 8) / many.numel(),
            _seconds(lambda: square[0].add(square[1]).mul(square[2]), 256),
        )


def _seconds_calibrated(
    ready: Prepared, wanted: list[Entry], tokens: Tensor, algorithm: str | None, options: Mapping[str, Any]
) -> float:
    """Forward passes and second moments, and what the algorithm says of each matrix."""
    speed = _Speed.measured()
    steps = algorithms.Steps((), None) if algorithm is None else algorithms.steps(algorithm)
    rounding = None if steps.rounding is None else algorithms.module(steps.rounding)
    used = algorithms.modules(algorithm)
    nearest = _seconds_each(ready, wanted) if rounding is None or steps.foldings else 0.0
    count = sum(torch.Size(layout.shape).numel() for _, _, layout in _units(wanted))
    total = nearest if rounding is None else 0.0
    for _, _, layout in _units(wanted):
        rows, columns = layout.shape[-2:]
        stack = torch.Size(layout.shape[:-2]).numel()
        products = stack * 2.0 * rows * columns * tokens.numel() * PASSES
        if rounding is not None and not hasattr(rounding, "tune"):  # second moments of its inputs
            products += columns * columns * tokens.numel()
        total += products * speed.product
        for module in used:
            if not hasattr(module, "cost"):
                continue
            cost = module.cost(rows, columns, *tokens.shape, **algorithms.accepted(module.cost, options))
            once = cost.products * speed.product + cost.numbers * speed.number + cost.steps * speed.step
            total += stack * (once + cost.roundings * nearest * rows * columns / max(count, 1))
    if rounding is not None and not hasattr(rounding, "cost"):
        total += _seconds_rounding(ready, wanted, rounding.quantize, options)
    return total


def _seconds_rounding(
    ready: Prepared, wanted: Iterable[Entry], run: Callable[..., Any], options: Mapping[str, Any]
) -> float:
    """Of an algorithm that does not say what it computes: some and more rows of the smallest matrix are rounded."""
    units = list(_units(wanted))
    if not units:
        return 0.0
    entry, part, layout = min(units, key=lambda unit: torch.Size(unit[2].shape[-2:]).numel())
    columns = layout.shape[-1]
    dense = dense_part(ready.model, entry, part, ready.checkpoint).reshape(-1, columns).float()

    def measured(rows: int) -> float:
        own = replace(layout, shape=(rows, columns))
        known = algorithms.accepted(run, {**own.algorithm_options(), "hessian": torch.eye(columns)})
        return _seconds(lambda: run(dense[:rows], target_of(own), **{**known, **options}))

    # columns take time however few rows they have
    many = min(layout.shape[-2], ROWS)
    few = many // 2
    seconds_few, seconds_many = measured(few), measured(many)
    each = max(seconds_many - seconds_few, 0.0) / (many - few)
    fixed = max(seconds_many - each * many, 0.0)
    shapes = [unit[2].shape for unit in units]
    return sum(torch.Size(shape[:-2]).numel() * (fixed + each * shape[-2]) * shape[-1] / columns for shape in shapes)
