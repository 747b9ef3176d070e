"""One decoder block after the other, calibrated: the jobs that make the tensors, and the rounding that sees a layer's inputs.

dense block -> foldings (folding.py) -> rounding, here or trained -> refinement (tuning.py) -> stored tensors (block_weights.py)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from anybit import algorithms
from anybit.engine.block_weights import BlockWeights, stacked, target_of
from anybit.engine.budget import BATCH
from anybit.engine.calibration import Calibrator, Observed, rounding_options
from anybit.engine.folding import Folding
from anybit.engine.hidden_states import Work
from anybit.engine.load import Prepared
from anybit.engine.materialize import assembled, oriented
from anybit.engine.measuring import Ranges
from anybit.engine.plan import Entry, PlannedPart, is_static, refuse_unmeasured
from anybit.engine.quantize import copy_job
from anybit.engine.tuning import refined, tuned
from anybit.engine.write import Job, Spec
from anybit.errors import AnybitError, ConfigError, InvalidOption, NotRepresentable, located
from anybit.weight import Layout, Weight
from anybit.weight.layout import join_name


def calibrated_jobs(
    ready: Prepared,
    tokens: Tensor,
    algorithm: str | None,
    device: torch.device,
    dtype: torch.dtype | None = None,
    algorithm_options: Mapping[str, Any] | None = None,
    work: Work | None = None,
    batch: int = BATCH,
) -> tuple[list[Job], set[str]]:
    """One job for each decoder block, and the weights they make; others are quantized without calibration.

    `dtype`: of what stays dense, None as stored.
    """
    assert ready.quantizer is not None
    name = algorithm or ready.quantizer.calibrated_algorithm
    measurements = ready.quantizer.measurements(ready.model)
    static = bool(measurements) or any(map(is_static, ready.plan.entries))
    if name is None and not static:
        raise ConfigError(
            f"{ready.quantizer.method_name} has no calibrated algorithm of its own; name one, e.g. algorithm='gptq', or leave "
            "out calibration"
        )
    steps = algorithms.steps(name) if name is not None else algorithms.Steps((), None)
    options, refining = steps.split(rounding_options(ready.quantizer, name, algorithm_options))
    calibrator = Calibrator(ready, tokens, device, batch, work or Work())
    jobs: list[Job] = []
    covered: set[str] = set()
    for number in range(len(calibrator.blocks)):
        entries = [entry for entry in calibrator.entries(number) if entry.action == "quantize"]
        if options.get("order") == "columns" and not options.get("static_groups"):
            for entry in entries:
                entry.parts = [replace(part, layout=_ordered(part.layout)) for part in entry.parts]
        start = calibrator.names(number) + "."
        inside = {path: found for path, found in measurements.items() if path.startswith(start)}
        ranges = Ranges(entries, inside)
        block = _Block(ready, calibrator, number, ranges, steps=steps, options=options, refining=refining, dtype=dtype)
        specs: dict[str, Spec] = {}
        for entry in entries:
            for part in entry.parts:
                assert part.layout is not None
                specs |= {join_name(part.prefix, own): spec for own, spec in part.layout.specs().items()}
        if steps.foldings:
            specs |= {name: spec for job in block.plain_jobs() for name, spec in job.specs.items()}
        specs |= block.ranges.specs(calibrator.entries(number))
        covered |= {entry.slot.parameter for entry in entries}
        jobs.append(Job(calibrator.names(number), specs, block.make, remark=block.remark))
    blocks = tuple(calibrator.names(number) + "." for number in range(len(calibrator.blocks)))
    refuse_unmeasured(
        [entry for entry in ready.plan.entries if entry.slot.parameter not in covered],
        {path: found for path, found in measurements.items() if not path.startswith(blocks)},
    )
    return jobs, covered


def _ordered(layout: Layout | None) -> Layout:
    found = layout.ordered() if layout is not None else None
    if found is None:
        raise ConfigError(f"{type(layout).__name__} cannot store columns in another order; leave out desc_act")
    return found


@dataclass(kw_only=True)
class _Block(BlockWeights):
    """Everything that is done to one block. `error`: of its output, when it is made."""

    steps: algorithms.Steps
    options: dict[str, Any]
    refining: dict[str, Any]
    dtype: torch.dtype | None
    error: float | None = None

    def remark(self) -> str:
        """What progress says of the block: how far its output went from the dense block's, as a share of what the block adds."""
        return "" if self.error is None else f", error {self.error:.1e}"

    def make(self) -> dict[str, Tensor]:
        training = hasattr(self._rounding, "tune")
        self.rounded = {} if self.steps.refinement is not None else None
        self.error = self.calibrator.run(
            self.number,
            self._round,
            fold=self._before if self.steps.foldings or self.ranges else None,
            train=self._tune if training else None,
            refine=self._refine if self.steps.refinement is not None else None,
            observe=not training and self.steps.rounding is not None,
        )
        if self.steps.foldings:
            for job in self.plain_jobs():
                self.made.update(job.make())
        self.made.update(self.ranges.tensors(self.calibrator.entries(self.number)))
        self.ready.checkpoint.release()
        made, self.rounded = dict(self.made), None
        for kept in (self.made, self.dense, self.plain):
            kept.clear()
        return made

    @property
    def _rounding(self) -> Any:
        return None if self.steps.rounding is None else algorithms.module(self.steps.rounding)

    def plain_jobs(self) -> list[Job]:
        """Copies of the block's norms and biases, as they are when the jobs run."""
        start = self.calibrator.names(self.number) + "."
        jobs = []
        for key, infos in self.ready.plan.plain.items():
            if key.startswith(start) and len(infos) == 1 and key not in self.ready.plan.conversions:

                def changed(tensor: Tensor, key: str = key) -> Tensor:
                    return self.plain.get(key, tensor).to("cpu")

                known = key in self.plain
                jobs.append(copy_job(self.ready.checkpoint, infos[0], self.dtype, changed if known else None))
        return jobs

    # --- rounding ---------------------------------------------------------------------------------------------------------

    def _round(self, entry: Entry, observed: Mapping[int | None, Observed] | None) -> Tensor:
        """Quantize one weight; the dense weight that takes its place, in the model's orientation."""
        made: list[tuple[PlannedPart, Tensor]] = []
        few = total = 0
        for part, dense in self.parts(entry):
            if observed is None:
                weight = self.nearest(part, dense)
            elif dense.dim() == 3 and part.index[0] is None:  # one unit has all experts
                weight, cold = self._stack(part, dense, observed)
                few, total = few + cold, total + len(dense)
            else:
                weight, cold = self._unit(part, dense, observed[part.index[0]])
                few, total = few + cold, total + 1
            made.append((part, self.store(entry, part, weight)))
        self.explain(entry, observed, few, total)
        return oriented(entry, assembled(made))

    def _unit(self, part: PlannedPart, dense: Tensor, seen: Observed) -> tuple[Weight, bool]:
        """One matrix, and whether too few tokens came by."""
        layout = part.layout
        assert layout is not None
        if seen.tokens < self.enough and layout.algorithm is not None:
            return self.nearest(part, dense), True
        return self._observed(part, dense, target_of(layout), seen), False

    def _observed(self, part: PlannedPart, dense: Tensor, target: Weight, seen: Observed) -> Weight:
        assert part.layout is not None
        run = self._rounding.quantize
        known = algorithms.accepted(run, {**part.layout.algorithm_options(), "hessian": seen.hessian})
        try:
            made: Weight = run(dense, target, **{**known, **self.options})
        except AnybitError as error:
            raise located(error, part.prefix) from error.__cause__
        except TypeError as error:
            if "unexpected keyword argument" not in str(error):
                raise
            raise InvalidOption(f"{self.steps.rounding}: {error}") from error
        return made

    def _stack(self, part: PlannedPart, dense: Tensor, observed: Mapping[int | None, Observed]) -> tuple[Weight, int]:
        """Every expert by what it saw, together one stack; and how many saw too little."""
        assert part.layout is not None
        target = target_of(part.layout)
        if part.layout.algorithm is None:
            raise NotRepresentable(
                f"{part.prefix}: experts of {type(part.layout).__name__} cannot be calibrated one by one"
            )
        nearest = self.nearest(part, dense)
        made, cold = [], 0
        for number, matrix in enumerate(dense):
            if observed[number].tokens < self.enough:
                made.append(nearest.select(number))
                cold += 1
            else:
                made.append(self._observed(part, matrix, target.select(number), observed[number]))
        return replace(nearest, tree=stacked(made).tree), cold

    def _before(self, wanted: Mapping[str, Entry]) -> None:
        """Foldings, then a pass that measures what static scales depend on."""
        if self.steps.foldings:
            if self.steps.rounding is None:
                self.count(wanted)
            Folding(self, self.steps.foldings, clips=self.steps.rounding is None).run(wanted)
        if self.ranges:
            with self.ranges.listening(self.ready.model):
                for _ in self.calibrator.forward(self.number):
                    pass
            for entry in self.ranges.entries:
                self.note(entry, f"its input measured on {self.calibrator.tokens.numel()} tokens")

    def _tune(self, wanted: Mapping[str, Entry], reference: Sequence[Tensor]) -> None:
        self.count(wanted)
        tuned(self, self._rounding, self.options, wanted, reference)

    def _refine(self, wanted: Mapping[str, Entry], reference: Sequence[Tensor]) -> None:
        algorithm = algorithms.module(str(self.steps.refinement))
        rounded, self.rounded = self.rounded or {}, None
        refined(self, algorithm, self.refining, wanted, rounded, reference)
