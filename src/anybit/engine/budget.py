"""How much memory making a checkpoint takes, before it begins; and how a cap is kept.

Memory here is what is needed beyond the interpreter, torch, transformers and the model class, which take about 450 MB themselves.
What is counted: the weights of one decoder block as they are stored and as they are computed with, the largest matrix in float32
with what an algorithm makes of it, second moments, and the activations of one batch. Hidden states lie on disk. The factors
were fitted to the peaks that the operating system counted; a test holds a run to its cap.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anybit.engine.calibration import find_blocks
from anybit.engine.load import Prepared
from anybit.engine.materialize import make_weight
from anybit.engine.plan import Entry
from anybit.errors import InvalidOption

BATCH = 4  # samples that run together if memory allows
FIXED_BYTES = 16 << 20  # buffers of libraries, the allocator's free pages
MATRIX_COPIES = 5  # float32 copies of the largest matrix: dense, reordered, rounded, codes, decoded
MOMENT_COPIES = 5  # a second moment, its damped and reordered copies, its factors
ACTIVATION_COPIES = 6  # of the widest activation of one batch, float32
PASSES = 6  # forward passes over a block: one for each of four inputs, one that finds them, one to go on
STEPS_OF_A_COLUMN = 6  # small operations for each column that is rounded


@dataclass(frozen=True)
class Budget:
    """What a run takes. `batch`: samples that run together."""

    needed: int
    batch: int


def budget(ready: Prepared, tokens: Tensor | None, max_memory: int | None) -> Budget:
    """The memory of a run, with the largest batch that the cap allows. InvalidOption names the smallest cap that works."""
    wanted = [entry for entry in ready.plan.entries if entry.action == "quantize"]
    choices = [_calibrated(ready, wanted, tokens, batch) for batch in (BATCH, 2, 1)] if tokens is not None else []
    choices = choices or [Budget(_each(ready, wanted), BATCH)]
    if max_memory is None:
        return choices[0]
    for choice in choices:
        if choice.needed <= max_memory:
            return choice
    least = min(choice.needed for choice in choices)
    what = "one decoder block with the activations of one sample" if tokens is not None else "its largest weight"
    raise InvalidOption(
        f"max_memory is {_mib(max_memory)}, but {what} takes {_mib(least)} beside the libraries. Allow at least "
        f"{-(-least // (1 << 20))}MiB (--max-memory)" + (", or use shorter samples" if tokens is not None else "")
    )


def _each(ready: Prepared, wanted: Iterable[Entry]) -> int:
    """One weight after the other; tensors that are copied are read whole."""
    stored = [info.nbytes for infos in ready.plan.plain.values() for info in infos]
    matrices = [_largest([entry]) for entry in wanted]
    return FIXED_BYTES + max([*stored, *(entry.bytes_stored for entry in ready.plan.entries), 0]) + max([*matrices, 0])


def _calibrated(ready: Prepared, wanted: list[Entry], tokens: Tensor, batch: int) -> Budget:
    prefix, blocks = find_blocks(ready.model)
    itemsize = ready.plan.dtype.itemsize
    needs = []
    for number, block in enumerate(blocks):
        start = f"{prefix}.{number}."
        own = [entry for entry in wanted if entry.slot.parameter.startswith(start)]
        weights = sum(parameter.numel() for parameter in block.parameters()) * itemsize
        moments = [_experts(entry) * entry.slot.shape[-1] ** 2 * 4 for entry in own]
        single = max([entry.slot.shape[-1] ** 2 * 4 for entry in own], default=0)
        moment = max([*moments, 0]) + (MOMENT_COPIES - 1) * single
        widest = max([max(entry.slot.shape[-2:]) for entry in own], default=0)
        activations = batch * tokens.shape[1] * widest * 4 * ACTIVATION_COPIES
        # stored bytes are read twice: for the forward pass, and matrix by matrix in float32
        needs.append(2 * weights + moment + _largest(own) + activations)
    return Budget(max([FIXED_BYTES + max(needs), _each(ready, wanted)]), batch)


def _largest(entries: Iterable[Entry]) -> int:
    """Bytes of the largest matrix of these while it is worked on."""
    sizes = [
        torch.Size(part.layout.shape).numel() for entry in entries for part in entry.parts if part.layout is not None
    ]
    return 4 * MATRIX_COPIES * max(sizes, default=0)


def _experts(entry: Entry) -> int:
    return int(entry.slot.shape[0]) if entry.slot.kind == "experts" else 1


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.0f} MiB"


def bytes_written(jobs: Iterable[Any]) -> int:
    """Of all tensors that the jobs announce."""
    return sum(
        torch.Size(shape).numel() * getattr(torch, dtype).itemsize
        for job in jobs
        for dtype, shape in job.specs.values()
    )


@dataclass(frozen=True)
class Forecast:
    """What a run will take. `seconds` is rough: from a sample of this machine's speed."""

    seconds: float
    memory_bytes: int
    bytes_read: int
    bytes_written: int
    hidden_bytes: int = 0  # of hidden states on disk at one time, beside the result
    batch: int = BATCH


def forecast(ready: Prepared, tokens: Tensor | None, own: Budget, jobs: Iterable[Any]) -> Forecast:
    """Size and memory from headers; time from one product, or from the smallest weight, on this machine."""
    wanted = [entry for entry in ready.plan.entries if entry.action == "quantize"]
    read = sum(entry.bytes_stored for entry in ready.plan.entries)
    if tokens is None:
        return Forecast(_seconds_each(ready, wanted), own.needed, read, bytes_written(jobs))
    width = max((entry.slot.shape[-1] for entry in wanted), default=0)
    hidden = 2 * tokens.numel() * width * ready.plan.dtype.itemsize
    return Forecast(_seconds_calibrated(wanted, tokens), own.needed, read, bytes_written(jobs), hidden, own.batch)


def _seconds_each(ready: Prepared, wanted: list[Entry]) -> float:
    units = [
        (torch.Size(part.layout.shape).numel(), entry, part) for entry in wanted for part in entry.parts if part.layout
    ]
    if not units:
        return 0.0
    size, entry, part = min(units, key=lambda unit: unit[0])
    if part.layout is None or part.layout.algorithm is None:
        return 0.0
    begin = time.perf_counter()
    part.layout.encode(make_weight(ready.model, entry, part, ready.checkpoint))
    return (time.perf_counter() - begin) / size * sum(unit[0] for unit in units)


def _seconds_calibrated(wanted: list[Entry], tokens: Tensor) -> float:
    """Forward passes (one for each group of layers, one to go on), second moments, and a factorization for each matrix."""
    square = torch.rand(512, 512)
    square @ square
    begin = time.perf_counter()
    for _ in range(4):
        square @ square
    each = (time.perf_counter() - begin) / 4 / (2 * 512**3)  # seconds of one operation
    begin = time.perf_counter()
    for _ in range(256):
        square[0].add(square[1]).mul(square[2])
    step = (time.perf_counter() - begin) / 256
    operations = steps = 0.0
    for entry in wanted:
        rows, columns = entry.slot.shape[-2:]
        experts = _experts(entry)
        operations += 2 * rows * columns * tokens.numel() * PASSES + columns * columns * tokens.numel()
        operations += experts * (2 * rows * columns * columns + 4 * columns**3)
        steps += experts * columns
    return operations * each + steps * step * STEPS_OF_A_COLUMN
