"""How much memory making a checkpoint takes, before it begins; and how a cap is kept.

Memory here is what is needed beyond the interpreter, torch, transformers and the model class, which take about 450 MB themselves.
What is counted: the weights of one decoder block as they are stored and as they are computed with, the largest matrix in float32
with what an algorithm makes of it, second moments, and the activations of one batch. Hidden states lie on disk. The factors
were fitted to the peaks that the operating system counted; a test holds a run to its cap.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anybit import algorithms
from anybit.engine.calibration import find_blocks
from anybit.engine.load import Prepared
from anybit.engine.plan import Entry
from anybit.errors import InvalidOption

BATCH = 4  # samples that run together if memory allows
FIXED_BYTES = 16 << 20  # buffers of libraries, the allocator's free pages
MATRIX_COPIES = 5  # float32 copies of the largest matrix: dense, reordered, rounded, codes, decoded
MOMENT_COPIES = 5  # a second moment, its damped and reordered copies, its factors
ACTIVATION_COPIES = 6  # of the widest activation of one batch, float32


@dataclass(frozen=True)
class Budget:
    """What a run takes. `batch`: samples that run together."""

    needed: int
    batch: int


def budget(
    ready: Prepared,
    tokens: Tensor | None,
    max_memory: int | None,
    algorithm: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Budget:
    """The memory of a run, with the largest batch that the cap allows. InvalidOption names the smallest cap that works."""
    wanted = [entry for entry in ready.plan.entries if entry.action == "quantize"]
    choices = []
    if tokens is not None:
        held = functools.partial(_held, algorithms.modules(algorithm), tuple(tokens.shape), options or {})
        choices = [_calibrated(ready, wanted, tokens, batch, held) for batch in (BATCH, 2, 1)]
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


def _held(modules: list[Any], shape: tuple[int, ...], options: Mapping[str, Any], entries: list[Entry]) -> int:
    """What the algorithms hold of a whole block, in bytes: the most of them."""
    weights = sum(torch.Size(entry.slot.shape).numel() for entry in entries)
    widths = sum(sum(entry.slot.shape[-2:]) for entry in entries)
    own = [module.memory for module in modules if hasattr(module, "memory")]
    return max([memory(weights, widths, *shape, **algorithms.accepted(memory, options)) for memory in own], default=0)


def _calibrated(
    ready: Prepared, wanted: list[Entry], tokens: Tensor, batch: int, held: Callable[[list[Entry]], int]
) -> Budget:
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
        needs.append(2 * weights + moment + _largest(own) + activations + held(own))
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
