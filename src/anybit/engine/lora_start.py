"""Bases that leave to a LoRA adapter what it can make up for (LoftQ, arXiv 2310.08659).

    Q_1 = quantize(W);  B_t A_t = best product of rank r for W - Q_t;  Q_t+1 = quantize(W - B_t A_t)

The base of the turn whose Q_t + B_t A_t is nearest to W is kept. A base that is rounded with calibration data is taken as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anybit import algorithms
from anybit.algorithms._low_rank import factors
from anybit.engine.load import Prepared
from anybit.engine.materialize import dense_part, make_weight
from anybit.engine.names import WHOLE
from anybit.engine.plan import Entry, PlannedPart
from anybit.errors import AnybitError, ConfigError, InvalidOption, did_you_mean, located
from anybit.weight import Weight

RANK, ITERATIONS = 16, 5
KINDS = ("loftq",)


@dataclass(frozen=True)
class Start:
    """What `quantize` is asked to leave to an adapter of this `rank`, in so many turns."""

    rank: int
    iterations: int

    @classmethod
    def of(cls, kind: str, rank: int, iterations: int, algorithm: str | None) -> Start:
        """Checked options; InvalidOption for unknown ones, ConfigError for algorithms that change the weights first."""
        if kind not in KINDS:
            raise InvalidOption(f"lora_init is {kind!r}{did_you_mean(kind, KINDS) or '.'} Known: {', '.join(KINDS)}")
        if iterations < 1:
            raise InvalidOption(f"lora_iterations is {iterations}; it must be at least 1")
        if algorithm is not None and algorithms.steps(algorithm).foldings:
            raise ConfigError(
                f"algorithm {algorithm!r} moves scales from weights into norms, so that the base is no rounding of the source's "
                "weights and an adapter cannot make up for the difference. Use lora_init with a rounding alone, e.g. gptq"
            )
        return cls(rank, iterations)

    def check(self, entries: Iterable[Entry]) -> None:
        """Before anything is made: some layer gets an adapter, and each can have this rank."""
        found = [entry for entry in entries if adapts(entry)]
        if not found:
            raise ConfigError("lora_init has no layer to adapt: nothing linear, stored as one unit, is quantized")
        for entry in found:
            check_rank(entry, self.rank)

    def base(self, ready: Prepared, entry: Entry, part: PlannedPart, device: torch.device) -> Weight:
        """The weight of one unit that is stored; of layers without an adapter as always."""
        layout = part.layout
        assert layout is not None
        if not adapts(entry) or layout.algorithm is None or self.iterations == 1:
            return make_weight(ready.model, entry, part, ready.checkpoint, device)
        run, options = algorithms.get(layout.algorithm), layout.algorithm_options()
        dense = dense_part(ready.model, entry, part, ready.checkpoint).to(device)
        try:
            return alternating(dense, self.rank, self.iterations, lambda left: run(left, layout.scheme(), **options))
        except AnybitError as error:
            raise located(error, part.prefix) from error.__cause__


def alternating(dense: Tensor, rank: int, iterations: int, quantize: Callable[[Tensor], Weight]) -> Weight:
    """The base of one matrix [out, in]: of all turns the one whose sum with its adapter is nearest to it."""
    wanted = dense.to(torch.float32)
    kept: Weight | None = None
    left, least = wanted, float("inf")
    for _ in range(iterations):
        made = quantize(left)
        lost = wanted - made.to_dense(torch.float32)
        up, down = factors(lost, rank)
        error = float((lost - up @ down).norm())
        if error < least or kept is None:
            kept, least = made, error
        left = wanted - up @ down
    assert kept is not None
    return kept


def check_rank(entry: Entry, rank: int) -> None:
    """InvalidOption for a rank that the matrix cannot have."""
    most = min(entry.slot.shape[-2:])
    if not 1 <= rank <= most:
        raise InvalidOption(
            f"rank is {rank}; {entry.slot.module} is {entry.slot.shape}, so it must be from 1 to {most}"
        )


def adapts(entry: Entry, targets: Sequence[str] | None = None) -> bool:
    """Whether the layer gets an adapter: a quantized linear one, stored as one unit, that is called like one of `targets`."""
    name = entry.slot.module
    named = targets is None or any(name == target or name.endswith(f".{target}") for target in targets)
    whole = len(entry.parts) == 1 and entry.parts[0].index == WHOLE and entry.parts[0].conversion is None
    return named and whole and entry.action != "dense" and entry.slot.kind in ("linear", "conv1d")
