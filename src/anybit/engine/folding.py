"""Scales move from a layer's columns into what makes its input, before the layer is rounded (AWQ, SmoothQuant).

What makes an input is found by running the block, not by names: a norm whose output is that input, or an earlier linear whose
rows are its columns. A candidate is tried with scales that are powers of two and taken if the block's output stays the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anybit import algorithms
from anybit.engine.block_weights import BlockWeights
from anybit.engine.calibration import listening
from anybit.engine.materialize import set_tensor
from anybit.engine.plan import Entry
from anybit.errors import NotRepresentable
from anybit.weight import Codebook, Grid, Node
from anybit.weight.nodes import children

SEARCH_TOKENS = 8192  # what scales are judged on
UNCHANGED = 0.05  # relative change of a block's output that rounding to 16 bits explains; a wrong fold makes it 1


@dataclass(frozen=True)
class Folding:
    """The foldings called `names`, of one block. `clips`: whether an algorithm that clips does so, as nothing rounds after it."""

    block: BlockWeights
    names: tuple[str, ...]
    clips: bool

    def run(self, wanted: Mapping[str, Entry]) -> None:
        """Run every folding over the block, and clip where an algorithm does."""
        linears = {key: entry for key, entry in wanted.items() if entry.slot.kind != "experts"}
        for key, entry in linears.items():
            self.block.dense[key] = self.block.whole(entry)
        for name in self.names:
            algorithm = algorithms.module(name)
            trace = self._trace(linears)
            for group in trace.groups:
                source = self._source(trace, group)
                if source is None:
                    for entry in group:
                        self.block.note(entry, f"{name}: not scaled, nothing in front of it takes the inverse scales")
                    continue
                self._scale(name, algorithm, group, source)
                for entry in group:
                    self.block.note(entry, f"{name}: inverse scales in {source.name}")
            for key, entry in wanted.items():
                if key not in linears:
                    self.block.note(entry, f"{name}: not scaled, a stack of experts has no input of its own")
            if hasattr(algorithm, "clipped") and self.clips:
                for group in trace.groups:
                    self._clip(algorithm, group)

    def _trace(self, linears: Mapping[str, Entry]) -> _Trace:
        """What feeds what, seen in one pass of the first samples."""
        block = self.block.calibrator.blocks[self.block.number]
        alive: list[Any] = []
        inputs: dict[str, tuple[int, ...]] = {}
        order: list[Entry] = []
        norms: dict[tuple[int, ...], str] = {}
        start = self.block.calibrator.names(self.block.number) + "."
        handles = []

        def leaves(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, out: Any) -> None:
                if isinstance(out, Tensor):
                    alive.append(out)
                    norms.setdefault(_place(out), name)

            return hook

        for name, module in block.named_modules():
            weight = module._parameters.get("weight")
            plain = f"{start}{name}.weight"
            if weight is not None and weight.dim() == 1 and plain in self.block.ready.plan.plain:
                handles.append(module.register_forward_hook(leaves(start + name)))

        def note(entry: Entry, x: Tensor, expert: int | None) -> None:
            if entry.slot.parameter not in inputs:
                alive.append(x)
                inputs[entry.slot.parameter] = _place(x)
                order.append(entry)

        try:
            with listening(self.block.ready.model, linears.values(), note):
                next(self.block.calibrator.forward(self.block.number))
        finally:
            for handle in handles:
                handle.remove()
        groups: dict[tuple[int, ...], list[Entry]] = {}
        for entry in order:
            groups.setdefault(inputs[entry.slot.parameter], []).append(entry)
        return _Trace(list(groups.values()), inputs, order, norms)

    def _source(self, trace: _Trace, group: list[Entry]) -> _Source | None:
        """What the inverse scales of the group can go into: tried on the block, not guessed."""
        width = group[0].slot.shape[-1]
        found: list[_Source] = []
        norm = trace.norms.get(trace.inputs[group[0].slot.parameter])
        if norm is not None and self.block.ready.model.get_submodule(norm).weight.numel() == width:
            found += [_Source(norm, None, around_one) for around_one in (False, True)]
        before = trace.order[: min(trace.order.index(entry) for entry in group)]
        found += [_Source(entry.slot.module, entry) for entry in reversed(before) if entry.slot.shape[0] == width]
        scales = 2.0 ** torch.randint(-1, 2, (width,), generator=torch.Generator().manual_seed(0))
        scales = scales.to(self.block.calibrator.device)
        hidden = self.block.calibrator.hidden[0].float()
        dense = next(self.block.calibrator.forward(self.block.number)).float()
        for source in found:
            keys = [entry.slot.parameter for entry in group]
            model, device = self.block.ready.model, self.block.calibrator.device
            names = [
                *keys,
                *(f"{source.name}.{own}" for own in ("weight", "bias") if _has(model, f"{source.name}.{own}")),
            ]
            saved = {key: model.get_parameter(key).detach() for key in names}
            for entry in group:
                self.block.place(entry, self.block.dense[entry.slot.parameter] * scales)
            for own in names[len(keys) :]:
                set_tensor(model, own, self._divided(source, own, scales).to(self.block.ready.plan.dtype), device)
            changed = next(self.block.calibrator.forward(self.block.number)).float()
            for key, tensor in saved.items():
                set_tensor(model, key, tensor, device)
            if bool((changed - dense).norm() <= UNCHANGED * (dense - hidden).norm()):
                return source
        return None

    def _divided(self, source: _Source, key: str, scales: Tensor) -> Tensor:
        """A weight or bias of the source, its outputs divided by the scales; in the model's orientation."""
        tensor = self.block.ready.model.get_parameter(key).detach().float()
        if source.entry is None or key.endswith(".bias"):
            around_one = source.around_one and key.endswith(".weight")
            return (tensor + 1) / scales - 1 if around_one else tensor / scales
        dense = self.block.dense[source.entry.slot.parameter] / scales[:, None]
        return dense.T if source.entry.slot.transposed else dense

    def _scale(self, name: str, algorithm: Any, group: list[Entry], source: _Source) -> None:
        """Choose the group's scales and apply them to it and to its source."""
        x = self._inputs(group[0])
        weights = [self.block.dense[entry.slot.parameter] for entry in group]
        layout = group[0].parts[0].layout
        assert layout is not None
        candidates = algorithm.candidates(
            weights, x.abs().mean(0), x.abs().amax(0), _group_size(layout.scheme().tree, x.shape[1])
        )
        scales = candidates[0]
        if len(candidates) > 1:
            scales = self._judged(group, candidates)
        model, device, dtype = self.block.ready.model, self.block.calibrator.device, self.block.ready.plan.dtype
        for own in ("weight", "bias"):
            key = f"{source.name}.{own}"
            if not _has(model, key):
                continue
            divided = self._divided(source, key, scales)
            if source.entry is not None and own == "weight":
                self.block.dense[key] = divided.T if source.entry.slot.transposed else divided
            else:
                self.block.plain[key] = divided
            set_tensor(model, key, divided.to(dtype), device)
        for entry in group:
            self.block.dense[entry.slot.parameter] = self.block.dense[entry.slot.parameter] * scales
            self.block.place(entry, self.block.dense[entry.slot.parameter])

    def _judged(self, group: list[Entry], candidates: Sequence[Tensor]) -> Tensor:
        """The scales whose rounded weights change the output of what the group belongs to least."""
        owner = self.block.ready.model.get_submodule(_common([entry.slot.module for entry in group]))
        calls: list[tuple[Any, Any]] = []
        handle = owner.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
        )
        seen = 0
        try:
            for out in self.block.calibrator.forward(self.block.number):
                seen += out.shape[0] * out.shape[1]
                if seen >= SEARCH_TOKENS:
                    break
        finally:
            handle.remove()

        def outputs() -> Iterator[Tensor]:
            for args, kwargs in calls:
                with torch.no_grad():
                    out = owner(*args, **kwargs)
                yield (out[0] if isinstance(out, tuple) else out).float()

        dense = list(outputs())
        best, least = torch.ones_like(candidates[0]), float("inf")
        for scales in candidates:
            for entry in group:
                self.block.place(entry, self._rounded(entry, self.block.dense[entry.slot.parameter] * scales) / scales)
            error = sum(float((out - wanted).pow(2).sum()) for out, wanted in zip(outputs(), dense, strict=True))
            if error < least:
                best, least = scales, error
        for entry in group:
            self.block.place(entry, self.block.dense[entry.slot.parameter])
        if least == float("inf"):
            raise NotRepresentable(f"{group[0].slot.module}: no scales give finite outputs; calibrate in a wider dtype")
        return best

    def _clip(self, algorithm: Any, group: list[Entry]) -> None:
        x = self._inputs(group[0])
        for entry in group:
            if not algorithm.clips(entry.slot.module):
                continue
            key, layout = entry.slot.parameter, entry.parts[0].layout
            assert layout is not None
            size = _group_size(layout.scheme().tree, x.shape[1])
            self.block.dense[key] = algorithm.clipped(
                self.block.dense[key], x, size, lambda dense, entry=entry: self._rounded(entry, dense)
            )
            self.block.place(entry, self.block.dense[key])

    def _rounded(self, entry: Entry, dense: Tensor) -> Tensor:
        """What the layout's own rounding makes of a whole weight."""
        row, made = 0, []
        for part in entry.parts:
            assert part.layout is not None
            rows = part.layout.shape[-2]
            made.append(self.block.nearest(part, dense[row : row + rows]).to_dense(torch.float32))
            row += rows
        return torch.cat(made) if len(made) > 1 else made[0]

    def _inputs(self, entry: Entry) -> Tensor:
        """Inputs of a layer, [tokens, in] float32, of the first samples."""
        found: list[Tensor] = []

        def keep(entry: Entry, x: Tensor, expert: int | None) -> None:
            found.append(x.reshape(-1, x.shape[-1]).float())

        with listening(self.block.ready.model, [entry], keep):
            for _ in self.block.calibrator.forward(self.block.number):
                if sum(len(x) for x in found) >= SEARCH_TOKENS:
                    break
        return torch.cat(found)


@dataclass(frozen=True)
class _Trace:
    """Layers by common input, in the order in which they run; norms by where their output lies."""

    groups: list[list[Entry]]
    inputs: dict[str, tuple[int, ...]]
    order: list[Entry]
    norms: dict[tuple[int, ...], str]


@dataclass(frozen=True)
class _Source:
    """What makes an input: a norm, whose weight may be stored `around_one` (Gemma's 1 + w), or the linear `entry`."""

    name: str
    entry: Entry | None
    around_one: bool = False


def _place(tensor: Tensor) -> tuple[int, ...]:
    return (tensor.data_ptr(), tensor.shape[-1])


def _has(model: nn.Module, key: str) -> bool:
    owner, _, own = key.rpartition(".")
    return model.get_submodule(owner)._parameters.get(own) is not None


def _common(paths: Sequence[str]) -> str:
    """The innermost module that holds all of these."""
    parts = [path.split(".") for path in paths]
    if len(parts) == 1:
        return paths[0]
    shared = []
    for step in zip(*parts, strict=False):
        if len(set(step)) > 1:
            break
        shared.append(step[0])
    return ".".join(shared)


def _group_size(node: Node, columns: int) -> int:
    """How many columns share a scale in this tree."""
    if isinstance(node, (Grid, Codebook)):
        scale = node.scale
        return node.block[1] if scale is not None and scale.shape[-1] > 1 and node.block[1] > 1 else columns
    found = [_group_size(child, columns) for name, child in children(node) if name not in ("scale", "zero", "offset")]
    return min(found, default=columns)
