"""Extremes of what flows through a decoder block, for the static scales that a method stores.

One pass of all samples over the dense block, whose inputs are what the quantized blocks before it give.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from anybit.engine.calibration import listening
from anybit.engine.plan import Entry, PlannedPart, is_static
from anybit.engine.write import Spec
from anybit.errors import CalibrationNeeded
from anybit.quantizers.measurement import Measurement
from anybit.weight import Weight
from anybit.weight.layout import join_name


class Extremes:
    """The smallest and the largest number that each input [in] was, float32."""

    def __init__(self, averaging: float = 0.0):
        self.averaging = averaging
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Numbers [.., in]; with `averaging`, each row of a batch [rows, length, in] moves the average."""
        for batch in x if self.averaging and x.dim() == 3 else (x,):
            rows = batch.reshape(-1, batch.shape[-1])
            if len(rows):
                self._take(rows.amin(0).float(), rows.amax(0).float())

    def _take(self, low: Tensor, high: Tensor) -> None:
        if self.low is None or self.high is None:
            self.low, self.high = low, high
        elif self.averaging:
            self.low, self.high = self.low.lerp(low, self.averaging), self.high.lerp(high, self.averaging)
        else:
            self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)


class Ranges:
    """What the layers of one block saw whose layouts have static scales, and what else is measured in it."""

    def __init__(self, entries: Iterable[Entry], measurements: Mapping[str, Measurement]):
        self.entries = [entry for entry in entries if is_static(entry)]
        self.measurements = measurements
        self._seen: dict[tuple[str, int | None], Extremes] = {}

    def __bool__(self) -> bool:
        return bool(self.entries or self.measurements)

    @contextlib.contextmanager
    def listening(self, model: nn.Module) -> Iterator[None]:
        """While the block runs."""
        handles = [own.listen(model.get_submodule(path)) for path, own in self.measurements.items()]
        try:
            with listening(model, self.entries, self._add):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, entry: Entry, x: Tensor, expert: int | None) -> None:
        key = (entry.slot.parameter, expert)
        if key not in self._seen:
            assert entry.parts[0].layout is not None
            self._seen[key] = Extremes(entry.parts[0].layout.averaging)
        self._seen[key].add(x)

    def specs(self, entries: Sequence[Entry]) -> dict[str, Spec]:
        """Stored name -> (dtype, shape) of what else is measured; `entries`: all weights of the block."""
        return {
            join_name(stored_name(path, entries), name): spec
            for path, own in self.measurements.items()
            for name, spec in own.specs.items()
        }

    def tensors(self, entries: Sequence[Entry]) -> dict[str, Tensor]:
        """The same, measured."""
        return {
            join_name(stored_name(path, entries), name): tensor.cpu()
            for path, own in self.measurements.items()
            for name, tensor in own.tensors().items()
        }

    def measured(self, entry: Entry, part: PlannedPart, weight: Weight) -> Weight:
        """A quantized unit with the static scales of its input."""
        layout = part.layout
        assert layout is not None
        if not layout.static_inputs():
            return weight
        low, high = self._of(entry, part)
        return replace(weight, activation=layout.measured_inputs(low, high))

    def _of(self, entry: Entry, part: PlannedPart) -> tuple[Tensor, Tensor]:
        """Extremes [in], or [experts, in] where one unit has all experts; of an expert that no token met, those of all."""
        own = {expert: seen for (name, expert), seen in self._seen.items() if name == entry.slot.parameter}
        if not own:
            raise CalibrationNeeded(
                f"{part.prefix}: no token of the calibration data came by, so the scale of its input is unknown. Give more data"
            )
        low = torch.stack([seen.low for seen in own.values()]).amin(0)  # type: ignore[misc]
        high = torch.stack([seen.high for seen in own.values()]).amax(0)  # type: ignore[misc]
        experts: Sequence[int | None] = [part.index[0]]
        if entry.slot.kind == "experts" and part.index[0] is None:
            experts = range(entry.slot.shape[0])
        lows = [own[expert].low if expert in own else low for expert in experts]
        highs = [own[expert].high if expert in own else high for expert in experts]
        if (len(experts) == 1 and entry.slot.kind != "experts") or part.index[0] is not None:
            return lows[0], highs[0]  # type: ignore[return-value]
        return torch.stack(lows), torch.stack(highs)  # type: ignore[arg-type]


def stored_name(path: str, entries: Iterable[Entry]) -> str:
    """What the checkpoint calls a module of the model, told from the weights inside it."""
    for entry in entries:
        inside = entry.slot.module.removeprefix(path)
        prefix = entry.parts[0].prefix
        if inside != entry.slot.module and prefix.endswith(inside):
            return prefix[: len(prefix) - len(inside)]
    return path
