"""One decoder block after the other, calibrated: what algorithms need of the engine, and the jobs that make the tensors.

    dense block -> foldings: scales move from a layer's columns into what makes its input -> rounding -> stored tensors

What makes an input is found by running the block, not by names: a norm whose output is that input, or an earlier linear whose
rows are its columns. A candidate is tried with scales that are powers of two and taken if the block's output stays the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from anybit import algorithms
from anybit.engine.budget import BATCH
from anybit.engine.calibration import Calibrator, Observed, listening
from anybit.engine.hidden_states import Work
from anybit.engine.load import Prepared
from anybit.engine.materialize import covering, dense_part, set_tensor
from anybit.engine.measuring import Ranges
from anybit.engine.plan import Entry, PlannedPart, is_static, refuse_unmeasured
from anybit.engine.quantize import copy_job
from anybit.engine.write import Job, Spec
from anybit.errors import AnybitError, CalibrationNeeded, ConfigError, InvalidOption, NotRepresentable, located
from anybit.weight import Codebook, Grid, Layout, Node, Weight
from anybit.weight.layout import join_name
from anybit.weight.nodes import children, map_tensors, tensors_of

SEARCH_TOKENS = 8192  # what scales are judged on
UNCHANGED = 0.05  # relative change of a block's output that rounding to 16 bits explains; a wrong fold makes it 1


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
    options = ready.quantizer.calibration_options() if steps.rounding == ready.quantizer.calibrated_algorithm else {}
    options = {**options, **(algorithm_options or {})}
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
        block = _Block(ready, calibrator, number, steps, options, dtype, Ranges(entries, inside))
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


def _target(layout: Layout) -> Weight:
    """What an algorithm is to fill: static scales of inputs are measured, not chosen."""
    scheme = layout.scheme()
    return replace(scheme, activation=None) if layout.static_inputs() else scheme


def _ordered(layout: Layout | None) -> Layout:
    found = layout.ordered() if layout is not None else None
    if found is None:
        raise ConfigError(f"{type(layout).__name__} cannot store columns in another order; leave out desc_act")
    return found


@dataclass
class _Block:
    """Everything that is done to one block. `dense`: weights that foldings changed, [out, in] float32."""

    ready: Prepared
    calibrator: Calibrator
    number: int
    steps: algorithms.Steps
    options: dict[str, Any]
    dtype: torch.dtype | None
    ranges: Ranges
    dense: dict[str, Tensor] = field(default_factory=dict)
    plain: dict[str, Tensor] = field(default_factory=dict)  # norms and biases that foldings changed, by parameter
    made: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)

    error: float | None = None

    def remark(self) -> str:
        """What progress says of the block: how far its output went from the dense block's, as a share of what the block adds."""
        return "" if self.error is None else f", error {self.error:.1e}"

    def make(self) -> dict[str, Tensor]:
        training = hasattr(self._rounding, "tune")
        self.error = self.calibrator.run(
            self.number,
            self._round,
            fold=self._before if self.steps.foldings or self.ranges else None,
            train=self._train if training else None,
            observe=not training and self.steps.rounding is not None,
        )
        if self.steps.foldings:
            for job in self.plain_jobs():
                self.made.update(job.make())
        self.made.update(self.ranges.tensors(self.calibrator.entries(self.number)))
        self.ready.checkpoint.release()
        made = dict(self.made)
        for kept in (self.made, self.dense, self.plain):
            kept.clear()
        return made

    @property
    def _rounding(self) -> Any:
        return None if self.steps.rounding is None else algorithms.module(self.steps.rounding)

    @property
    def _enough(self) -> int:
        """Fewer tokens say too little, as in gptqmodel: half a percent."""
        return max(1, self.calibrator.tokens.numel() // 200)

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

    # --- weights ---------------------------------------------------------------------------------------------------------

    def _parts(self, entry: Entry) -> Iterator[tuple[PlannedPart, Tensor]]:
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

    def _whole(self, entry: Entry) -> Tensor:
        parts = [dense for _, dense in self._parts(entry)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _place(self, entry: Entry, dense: Tensor) -> None:
        """Put a logical dense weight into the model."""
        oriented = dense.transpose(-1, -2).contiguous() if entry.slot.transposed else dense
        set_tensor(self.ready.model, entry.slot.parameter, oriented.to(self.ready.plan.dtype), self.calibrator.device)

    def _store(self, entry: Entry, part: PlannedPart, weight: Weight) -> Tensor:
        """Keep a unit's stored tensors; the dense weight that they stand for."""
        assert part.layout is not None
        stored = part.layout.encode(self.ranges.measured(entry, part, weight))
        self.made.update({join_name(part.prefix, name): tensor.cpu() for name, tensor in stored.items()})
        return part.layout.decode(stored).to_dense(torch.float32)

    def _nearest(self, part: PlannedPart, dense: Tensor) -> Weight:
        """As the layout rounds without calibration."""
        layout = part.layout
        assert layout is not None
        if layout.algorithm is None:
            raise CalibrationNeeded(
                f"{part.prefix}: {type(layout).__name__} has no rounding of its own; name one, e.g. algorithm='gptq'"
            )
        try:
            options = covering(layout, part.prefix, self.ready.checkpoint, self.dense).algorithm_options()
            return algorithms.get(layout.algorithm)(dense, _target(layout), **options)
        except AnybitError as error:
            raise located(error, part.prefix) from error.__cause__

    def _note(self, entry: Entry, text: str) -> None:
        self.notes.setdefault(entry.slot.parameter, []).append(text)

    # --- rounding ---------------------------------------------------------------------------------------------------------

    def _round(self, entry: Entry, observed: Mapping[int | None, Observed] | None) -> Tensor:
        """Quantize one weight; the dense weight that takes its place, in the model's orientation."""
        rows: dict[int | None, list[Tensor]] = {}
        few = total = 0
        for part, dense in self._parts(entry):
            if observed is None:
                weight = self._nearest(part, dense)
            elif dense.dim() == 3 and part.index[0] is None:  # one unit has all experts
                weight, cold = self._stack(part, dense, observed)
                few, total = few + cold, total + len(dense)
            else:
                weight, cold = self._unit(part, dense, observed[part.index[0]])
                few, total = few + cold, total + 1
            rows.setdefault(part.index[0], []).append(self._store(entry, part, weight))
        self._explain(entry, observed, few, total)
        experts = [torch.cat(own) if len(own) > 1 else own[0] for own in rows.values()]
        made = experts[0] if None in rows else torch.stack(experts)
        return made.transpose(-1, -2).contiguous() if entry.slot.transposed else made

    def _unit(self, part: PlannedPart, dense: Tensor, seen: Observed) -> tuple[Weight, bool]:
        """One matrix, and whether too few tokens came by."""
        layout = part.layout
        assert layout is not None
        if seen.tokens < self._enough and layout.algorithm is not None:
            return self._nearest(part, dense), True
        return self._observed(part, dense, _target(layout), seen), False

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
        target = _target(part.layout)
        if part.layout.algorithm is None:
            raise NotRepresentable(
                f"{part.prefix}: experts of {type(part.layout).__name__} cannot be calibrated one by one"
            )
        nearest = self._nearest(part, dense)
        made, cold = [], 0
        for number, matrix in enumerate(dense):
            if observed[number].tokens < self._enough:
                made.append(nearest.select(number))
                cold += 1
            else:
                made.append(self._observed(part, matrix, target.select(number), observed[number]))
        stacked = iter([torch.stack(own) for own in zip(*(tensors_of(own.tree) for own in made), strict=True)])
        return replace(nearest, tree=map_tensors(nearest.tree, lambda _: next(stacked))), cold

    def _explain(self, entry: Entry, observed: Mapping[int | None, Observed] | None, few: int, total: int) -> None:
        text = []
        if observed is not None:
            counts = [seen.tokens for seen in observed.values()]
            each = f"{counts[0]} tokens" if len(counts) == 1 else f"{min(counts)} to {max(counts)} tokens per expert"
            text.append(f"calibrated with {each}")
            if few:
                text.append(f"{few} of {total} units saw fewer than {self._enough} and were rounded to nearest")
        entry.reason = "; ".join([*text, *self.notes.pop(entry.slot.parameter, [])])

    # --- training ---------------------------------------------------------------------------------------------------------

    def _train(self, wanted: Mapping[str, Entry], reference: Sequence[Tensor]) -> None:
        """Train the rounding of all weights of the block against its dense outputs, then store it."""
        algorithm, block = self._rounding, self.calibrator.blocks[self.number]
        dtypes = {name: tensor.dtype for name, tensor in _tensors(block)}
        block.float()
        trained: dict[str, list[tuple[PlannedPart, list[Any]]]] = {}
        for key, entry in wanted.items():
            trained[key] = []
            for part, dense in self._parts(entry):
                assert part.layout is not None
                known = {**part.layout.algorithm_options(), "symmetric": getattr(part.layout, "symmetric", False)}
                known = {name: value for name, value in known.items() if name in ("ranges", "symmetric")}
                target = _target(part.layout)
                matrices = (
                    [(dense, target)] if dense.dim() == 2 else [(own, target.select(n)) for n, own in enumerate(dense)]
                )
                try:
                    trained[key].append((part, [algorithm.Rounding(own, scheme, **known) for own, scheme in matrices]))
                except AnybitError as error:
                    raise located(error, part.prefix) from error.__cause__
        start = self.calibrator.names(self.number) + "."

        def values() -> dict[str, Tensor]:
            return {
                key.removeprefix(start): _assembled(
                    wanted[key], [(part, _joined([own.value() for own in roundings])) for part, roundings in parts]
                )
                for key, parts in trained.items()
            }

        inputs = _rows(self.calibrator.hidden)
        outputs = _rows(reference)
        sizes = [len(batch) for batch in self.calibrator.hidden]
        arguments = [(number, row) for number, size in enumerate(sizes) for row in range(size)]

        def loss(rows: Tensor) -> Tensor:
            overrides, total = values(), torch.zeros((), device=self.calibrator.device)
            chosen: dict[int, list[int]] = {}
            for row in rows.tolist():
                chosen.setdefault(arguments[row][0], []).append(row)
            for number, own in chosen.items():
                places = [arguments[row][1] for row in own]
                args, kwargs = _float(_picked(self.calibrator.arguments[number], sizes[number], places))
                hidden = torch.stack([inputs[row] for row in own]).float()
                out = torch.func.functional_call(block, overrides, (hidden, *args), kwargs)
                out = out[0] if isinstance(out, tuple) else out
                wanted_out = torch.stack([outputs[row] for row in own]).float()
                total = total + (out - wanted_out).pow(2).sum()
            return total / (len(rows) * outputs[0].numel())

        roundings = [rounding for parts in trained.values() for _, own in parts for rounding in own]
        history = list(algorithm.tune(roundings, loss, len(inputs), **self.options))
        for key, parts in trained.items():
            finished = []
            for part, own in parts:
                weights = [rounding.weight() for rounding in own]
                made = weights[0] if len(part.layout.shape) == 2 else _stacked(weights)  # type: ignore[union-attr]
                finished.append((part, self._store(wanted[key], part, made)))
            entry = wanted[key]
            set_tensor(self.ready.model, key, _assembled(entry, finished), self.calibrator.device)
            self._note(
                entry, f"trained for {len(history)} steps: error of the block {history[0]:.3g} -> {min(history):.3g}"
            )
            self._explain(entry, None, 0, 0)
        for name, tensor in list(_tensors(block)):
            set_tensor(block, name, tensor.detach().to(dtypes[name]), self.calibrator.device)

    # --- folding ----------------------------------------------------------------------------------------------------------

    def _before(self, wanted: Mapping[str, Entry]) -> None:
        """Foldings, then a pass that measures what static scales depend on."""
        if self.steps.foldings:
            self._fold(wanted)
        if self.ranges:
            with self.ranges.listening(self.ready.model):
                for _ in self.calibrator.forward(self.number):
                    pass
            for entry in self.ranges.entries:
                self._note(entry, f"its input measured on {self.calibrator.tokens.numel()} tokens")

    def _fold(self, wanted: Mapping[str, Entry]) -> None:
        """Run every folding over the block, and clip where an algorithm does."""
        linears = {key: entry for key, entry in wanted.items() if entry.slot.kind != "experts"}
        for key, entry in linears.items():
            self.dense[key] = self._whole(entry)
        for name in self.steps.foldings:
            algorithm = algorithms.module(name)
            trace = self._trace(linears)
            for group in trace.groups:
                source = self._source(trace, group, norms_only=getattr(algorithm, "NORMS_ONLY", False))
                if source is None:
                    for entry in group:
                        self._note(entry, f"{name}: not scaled, nothing in front of it takes the inverse scales")
                    continue
                self._scale(name, algorithm, group, source)
                for entry in group:
                    self._note(entry, f"{name}: inverse scales in {source.name}")
            for key, entry in wanted.items():
                if key not in linears:
                    self._note(entry, f"{name}: not scaled, a stack of experts has no input of its own")
            if hasattr(algorithm, "clipped") and self.steps.rounding is None:
                for group in trace.groups:
                    self._clip(algorithm, group)

    def _trace(self, linears: Mapping[str, Entry]) -> _Trace:
        """What feeds what, seen in one pass of the first samples."""
        block = self.calibrator.blocks[self.number]
        alive: list[Any] = []
        inputs: dict[str, tuple[int, ...]] = {}
        order: list[Entry] = []
        norms: dict[tuple[int, ...], str] = {}
        start = self.calibrator.names(self.number) + "."
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
            if weight is not None and weight.dim() == 1 and plain in self.ready.plan.plain:
                handles.append(module.register_forward_hook(leaves(start + name)))

        def note(entry: Entry, x: Tensor, expert: int | None) -> None:
            if entry.slot.parameter not in inputs:
                alive.append(x)
                inputs[entry.slot.parameter] = _place(x)
                order.append(entry)

        try:
            with listening(self.ready.model, linears.values(), note):
                next(self.calibrator.forward(self.number))
        finally:
            for handle in handles:
                handle.remove()
        groups: dict[tuple[int, ...], list[Entry]] = {}
        for entry in order:
            groups.setdefault(inputs[entry.slot.parameter], []).append(entry)
        return _Trace(list(groups.values()), inputs, order, norms)

    def _source(self, trace: _Trace, group: list[Entry], *, norms_only: bool) -> _Source | None:
        """What the inverse scales of the group can go into: tried on the block, not guessed."""
        width = group[0].slot.shape[-1]
        found: list[_Source] = []
        norm = trace.norms.get(trace.inputs[group[0].slot.parameter])
        if norm is not None and self.ready.model.get_submodule(norm).weight.numel() == width:
            found += [_Source(norm, None, around_one) for around_one in (False, True)]
        before = trace.order[: min(trace.order.index(entry) for entry in group)]
        if not norms_only:
            found += [_Source(entry.slot.module, entry) for entry in reversed(before) if entry.slot.shape[0] == width]
        scales = 2.0 ** torch.randint(-1, 2, (width,), generator=torch.Generator().manual_seed(0))
        scales = scales.to(self.calibrator.device)
        hidden = self.calibrator.hidden[0].float()
        dense = next(self.calibrator.forward(self.number)).float()
        for source in found:
            keys = [entry.slot.parameter for entry in group]
            model, device = self.ready.model, self.calibrator.device
            names = [
                *keys,
                *(f"{source.name}.{own}" for own in ("weight", "bias") if _has(model, f"{source.name}.{own}")),
            ]
            saved = {key: model.get_parameter(key).detach() for key in names}
            for entry in group:
                self._place(entry, self.dense[entry.slot.parameter] * scales)
            for own in names[len(keys) :]:
                set_tensor(model, own, self._divided(source, own, scales).to(self.ready.plan.dtype), device)
            changed = next(self.calibrator.forward(self.number)).float()
            for key, tensor in saved.items():
                set_tensor(model, key, tensor, device)
            if bool((changed - dense).norm() <= UNCHANGED * (dense - hidden).norm()):
                return source
        return None

    def _divided(self, source: _Source, key: str, scales: Tensor) -> Tensor:
        """A weight or bias of the source, its outputs divided by the scales; in the model's orientation."""
        tensor = self.ready.model.get_parameter(key).detach().float()
        if source.entry is None or key.endswith(".bias"):
            around_one = source.around_one and key.endswith(".weight")
            return (tensor + 1) / scales - 1 if around_one else tensor / scales
        dense = self.dense[source.entry.slot.parameter] / scales[:, None]
        return dense.T if source.entry.slot.transposed else dense

    def _scale(self, name: str, algorithm: Any, group: list[Entry], source: _Source) -> None:
        """Choose the group's scales and apply them to it and to its source."""
        x = self._inputs(group[0])
        weights = [self.dense[entry.slot.parameter] for entry in group]
        layout = group[0].parts[0].layout
        assert layout is not None
        candidates = algorithm.candidates(
            weights, x.abs().mean(0), x.abs().amax(0), _group_size(layout.scheme().tree, x.shape[1])
        )
        scales = candidates[0]
        if len(candidates) > 1:
            scales = self._judged(group, candidates)
        model, device, dtype = self.ready.model, self.calibrator.device, self.ready.plan.dtype
        for own in ("weight", "bias"):
            key = f"{source.name}.{own}"
            if not _has(model, key):
                continue
            divided = self._divided(source, key, scales)
            if source.entry is not None and own == "weight":
                self.dense[key] = divided.T if source.entry.slot.transposed else divided
            else:
                self.plain[key] = divided
            set_tensor(model, key, divided.to(dtype), device)
        for entry in group:
            self.dense[entry.slot.parameter] = self.dense[entry.slot.parameter] * scales
            self._place(entry, self.dense[entry.slot.parameter])

    def _judged(self, group: list[Entry], candidates: Sequence[Tensor]) -> Tensor:
        """The scales whose rounded weights change the output of what the group belongs to least."""
        owner = self.ready.model.get_submodule(_common([entry.slot.module for entry in group]))
        calls: list[tuple[Any, Any]] = []
        handle = owner.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
        )
        seen = 0
        try:
            for out in self.calibrator.forward(self.number):
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
                self._place(entry, self._rounded(entry, self.dense[entry.slot.parameter] * scales) / scales)
            error = sum(float((out - wanted).pow(2).sum()) for out, wanted in zip(outputs(), dense, strict=True))
            if error < least:
                best, least = scales, error
        for entry in group:
            self._place(entry, self.dense[entry.slot.parameter])
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
            self.dense[key] = algorithm.clipped(
                self.dense[key], x, size, lambda dense, entry=entry: self._rounded(entry, dense)
            )
            self._place(entry, self.dense[key])

    def _rounded(self, entry: Entry, dense: Tensor) -> Tensor:
        """What the layout's own rounding makes of a whole weight."""
        row, made = 0, []
        for part in entry.parts:
            assert part.layout is not None
            rows = part.layout.shape[-2]
            made.append(self._nearest(part, dense[row : row + rows]).to_dense(torch.float32))
            row += rows
        return torch.cat(made) if len(made) > 1 else made[0]

    def _inputs(self, entry: Entry) -> Tensor:
        """Inputs of a layer, [tokens, in] float32, of the first samples."""
        found: list[Tensor] = []

        def keep(entry: Entry, x: Tensor, expert: int | None) -> None:
            found.append(x.reshape(-1, x.shape[-1]).float())

        with listening(self.ready.model, [entry], keep):
            for _ in self.calibrator.forward(self.number):
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


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _joined(values: list[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(values)


def _assembled(entry: Entry, parts: Sequence[tuple[PlannedPart, Tensor]]) -> Tensor:
    """Units, put together in the model's orientation."""
    rows: dict[int | None, list[Tensor]] = {}
    for part, value in parts:
        rows.setdefault(part.index[0], []).append(value)
    experts = [torch.cat(own) if len(own) > 1 else own[0] for own in rows.values()]
    whole = experts[0] if None in rows else torch.stack(experts)
    return whole.transpose(-1, -2).contiguous() if entry.slot.transposed else whole


def _stacked(weights: list[Weight]) -> Weight:
    stacked = iter([torch.stack(own) for own in zip(*(tensors_of(own.tree) for own in weights), strict=True)])
    return replace(weights[0], tree=map_tensors(weights[0].tree, lambda _: next(stacked)))


def _rows(batches: Sequence[Tensor]) -> list[Tensor]:
    return [row for batch in batches for row in batch]


def _picked(value: Any, size: int, rows: list[int]) -> Any:
    """Arguments of a batch, cut down to some of its rows; what all rows share stays."""
    if isinstance(value, Tensor):
        return value[rows] if value.dim() > 1 and value.shape[0] == size > 1 else value
    if isinstance(value, (tuple, list)):
        return type(value)(_picked(item, size, rows) for item in value)
    if isinstance(value, dict):
        return {name: _picked(item, size, rows) for name, item in value.items()}
    return value


def _float(value: Any) -> Any:
    """Floating-point tensors in float32, however deep."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(_float(item) for item in value)
    if isinstance(value, dict):
        return {name: _float(item) for name, item in value.items()}
    return value
