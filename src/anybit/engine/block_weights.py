"""The weights of one decoder block while it is calibrated: dense, as foldings left them, and what is stored of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from anybit import algorithms
from anybit.engine.calibration import Calibrator, Observed, listening
from anybit.engine.load import Prepared
from anybit.engine.materialize import covering, dense_part, oriented, set_tensor
from anybit.engine.measuring import Ranges
from anybit.engine.plan import Entry, PlannedPart
from anybit.errors import AnybitError, CalibrationNeeded, located
from anybit.weight import Layout, Weight
from anybit.weight.layout import join_name
from anybit.weight.nodes import map_tensors, tensors_of


def target_of(layout: Layout) -> Weight:
    """What an algorithm is to fill: static scales of inputs are measured, not chosen."""
    scheme = layout.scheme()
    return replace(scheme, activation=None) if layout.static_inputs() else scheme


def stacked(weights: Sequence[Weight]) -> Weight:
    """Matrices of one form as one stack."""
    tensors = iter([torch.stack(own) for own in zip(*(tensors_of(own.tree) for own in weights), strict=True)])
    return replace(weights[0], tree=map_tensors(weights[0].tree, lambda _: next(tensors)))


@dataclass
class BlockWeights:
    """`dense`: weights that foldings changed, [out, in] float32. `plain`: norms and biases that they changed. By parameter."""

    ready: Prepared
    calibrator: Calibrator
    number: int
    ranges: Ranges
    dense: dict[str, Tensor] = field(default_factory=dict)
    plain: dict[str, Tensor] = field(default_factory=dict)
    made: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    rounded: dict[str, list[tuple[PlannedPart, Weight]]] | None = None  # by parameter, where they are to be refined
    reached: dict[str, list[int]] = field(
        default_factory=dict
    )  # tokens of each expert of a stack, where they were counted

    @property
    def enough(self) -> int:
        """Fewer tokens say too little, as in gptqmodel: half a percent."""
        return max(1, self.calibrator.tokens.numel() // 200)

    def parts(self, entry: Entry) -> Iterator[tuple[PlannedPart, Tensor]]:
        """Every stored unit of a weight, dense float32."""
        row = 0
        for part in entry.parts:
            if entry.slot.parameter in self.dense:
                assert part.layout is not None
                rows = part.layout.shape[-2]
                yield part, self.dense[entry.slot.parameter][row : row + rows]
                row += rows
            else:
                dense = dense_part(self.ready.model, entry, part, self.ready.checkpoint)
                yield part, dense.to(self.calibrator.device, torch.float32)

    def whole(self, entry: Entry) -> Tensor:
        """All units of a weight together, float32."""
        parts = [dense for _, dense in self.parts(entry)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def place(self, entry: Entry, dense: Tensor) -> None:
        """Put a logical dense weight into the model."""
        made = oriented(entry, dense).to(self.ready.plan.dtype)
        set_tensor(self.ready.model, entry.slot.parameter, made, self.calibrator.device)

    def store(self, entry: Entry, part: PlannedPart, weight: Weight) -> Tensor:
        """Keep a unit's stored tensors; the dense weight that they stand for."""
        assert part.layout is not None
        if self.rounded is not None:
            self.rounded.setdefault(entry.slot.parameter, []).append((part, weight))
        stored = part.layout.encode(self.ranges.measured(entry, part, weight))
        self.made.update({join_name(part.prefix, name): tensor.cpu() for name, tensor in stored.items()})
        return part.layout.decode(stored).to_dense(torch.float32)

    def nearest(self, part: PlannedPart, dense: Tensor) -> Weight:
        """As the layout rounds without calibration."""
        layout = part.layout
        assert layout is not None
        if layout.algorithm is None:
            raise CalibrationNeeded(
                f"{part.prefix}: {type(layout).__name__} has no rounding of its own; name one, e.g. algorithm='gptq'"
            )
        try:
            options = covering(layout, part.prefix, self.ready.checkpoint, self.dense).algorithm_options()
            return algorithms.get(layout.algorithm)(dense, target_of(layout), **options)
        except AnybitError as error:
            raise located(error, part.prefix) from error.__cause__

    def count(self, wanted: Mapping[str, Entry]) -> None:
        """How many tokens each expert of the block's stacks gets, for algorithms that do not observe inputs one by one."""
        stacks = {key: entry for key, entry in wanted.items() if entry.slot.kind == "experts"}
        if not stacks:
            return
        self.reached = {key: [0] * entry.slot.shape[0] for key, entry in stacks.items()}

        def add(entry: Entry, x: Tensor, expert: int | None) -> None:
            self.reached[entry.slot.parameter][expert or 0] += len(x)

        with listening(self.ready.model, stacks.values(), add):
            for _ in self.calibrator.forward(self.number):
                pass
        for key, entry in stacks.items():
            counts, few = self.reached[key], sum(own < self.enough for own in self.reached[key])
            text = f"{min(counts)} to {max(counts)} tokens per expert"
            if few:
                text += f"; {few} of {len(counts)} experts saw fewer than {self.enough} and were rounded to nearest"
            self.note(entry, text)

    def is_cold(self, entry: Entry, expert: int | None) -> bool:
        """Whether too few tokens reached an expert of a stack that was counted."""
        counts = self.reached.get(entry.slot.parameter)
        return counts is not None and expert is not None and counts[expert] < self.enough

    def note(self, entry: Entry, text: str) -> None:
        """Keep something that the plan is to say of a weight."""
        self.notes.setdefault(entry.slot.parameter, []).append(text)

    def explain(self, entry: Entry, observed: Mapping[int | None, Observed] | None, few: int, total: int) -> None:
        """Write into the plan what a weight was made from; `few` of `total` units saw too little."""
        text = []
        if observed is not None:
            counts = [seen.tokens for seen in observed.values()]
            each = f"{counts[0]} tokens" if len(counts) == 1 else f"{min(counts)} to {max(counts)} tokens per expert"
            text.append(f"calibrated with {each}")
            if few:
                text.append(f"{few} of {total} units saw fewer than {self.enough} and were rounded to nearest")
        entry.reason = "; ".join([*text, *self.notes.pop(entry.slot.parameter, [])])
