"""Which method? Every named scheme planned for one model from its headers, judged by the rules in `advice_rules`, and ranked."""

from __future__ import annotations

import functools
import json
import math
import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anybit.containers import Checkpoint
from anybit.engine import advice_rules as rules
from anybit.engine import devices
from anybit.engine.load import Prepared, prepare
from anybit.engine.materialize import make_weight
from anybit.engine.memory import (
    RUNTIME_BYTES,
    activation_bytes,
    available_memory,
    cache_bytes,
    parse_size,
    shape_of,
    training_bytes,
)
from anybit.engine.plan import Entry, Plan, build_plan, module_info
from anybit.errors import AnybitError, CalibrationNeeded, InvalidOption, NoKernel, NotRepresentable, did_you_mean
from anybit.kernels import get
from anybit.quantizers import registry
from anybit.quantizers.auto import AutoHfQuantizer
from anybit.quantizers.config import QuantizationConfigMixin
from anybit.quantizers.named import schemes
from anybit.quantizers.summary import MethodInfo
from anybit.quantizers.summary import methods as method_infos
from anybit.weight.rewriting import rewrite

MEASURED = Path(__file__).with_name("_scheme_quality.json")
DENSE = "dense"


@dataclass(frozen=True)
class Candidate:
    """One scheme for one model. `obstacle`: why it is no choice here ("" if it is one); `why`: what put it into its place;
    `wished`: whether nothing but memory can be against it.

    `bytes_written`: of all tensors in its files, exact. `bytes_needed`: largest memory in use, run time included.
    `tokens_per_second`: upper bound for one sequence, from memory bandwidth.
    """

    scheme: str
    method: str
    bytes_written: int
    bits_per_weight: float
    coverage: float
    weights_bytes: int
    cache_bytes: int
    activation_bytes: int
    bytes_needed: int
    quality: str
    quality_basis: str
    speed: str
    tokens_per_second: float
    kernels: Mapping[str, int]
    trainable: bool
    calibration: str
    targets: tuple[str, ...]
    command: str
    obstacle: str = ""
    wished: bool = True
    fits: bool = True
    why: str = ""

    @property
    def order(self) -> tuple[Any, ...]:
        """What ranks: quality class, speed class, memory in steps, programs that read it, memory."""
        step = int(math.log(max(self.bytes_needed, 1)) / math.log(rules.MEMORY_STEP))
        return (
            rules.QUALITY_RANK[self.quality], rules.SPEED_RANK[self.speed], step, -len(self.targets), self.bytes_needed,
            self.scheme,
        )  # fmt: skip


@dataclass(frozen=True)
class Recommendation:
    """Candidates in order: those to choose from first. `assumptions`: what was taken for granted, in words."""

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


@dataclass(frozen=True)
class _Wishes:
    memory: int | None
    device: torch.device
    train: bool
    calibration: bool
    batch: int
    context: int
    target: str | None
    bandwidth: float
    here: bool
    path: str
    notes: list[str] = field(default_factory=list)


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

    `memory`: the budget, e.g. "8GB" (default: what is free). `train`: for LoRA on packed weights. `calibration` False: only what
    needs no data. `target`: the program that is to serve it. For a checkpoint that is quantized already, says what it needs and
    what it converts to exactly; for that, one small weight of each kind is read.
    """
    begin = time.perf_counter()
    wishes = _wishes(path, memory, device, train, calibration, batch, context, target)
    try:
        ready: Prepared | None = prepare(path, hub_options=hub_options)
    except ValueError as error:  # transformers' own word for a model it does not know
        ready, source = None, _Unknown(path, error, wishes.notes, hub_options)
    if ready is not None:
        limit = shape_of(ready.model.config).longest
        if context is None and limit is not None and limit < wishes.context:
            wishes = replace(wishes, context=limit)
            wishes.notes.append(f"the model takes {limit} positions")
        if ready.quantizer is not None:
            return _of_quantized(ready, wishes, begin)
    found = list(_Judge(wishes, _Known(ready) if ready is not None else source).candidates())
    others = _made_elsewhere({one.method for one in found})
    if ready is not None:
        ready.checkpoint.release()
    return _ranked(wishes, found, others, begin)


def _wishes(
    path: Any,
    memory: Any,
    device: str,
    train: bool,
    calibration: bool,
    batch: int,
    context: int | None,
    target: str | None,
) -> _Wishes:
    if target is not None and target not in rules.TARGETS:
        raise InvalidOption(
            f"no target {target!r}{did_you_mean(target, rules.TARGETS) or '.'} Targets: {', '.join(rules.TARGETS)}"
        )
    if batch < 1 or (context is not None and context < 1):
        raise InvalidOption(f"batch ({batch}) and context ({context}) must be at least 1")
    usual = rules.DEFAULT_TRAINING_CONTEXT if train else rules.DEFAULT_CONTEXT
    notes = [] if context is not None else [f"context: {usual} positions (--context)"]
    place = devices.main_device(device)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    here = place.type == "cpu" or (accelerator is not None and accelerator.type == place.type)
    if memory is not None:
        budget: int | None = parse_size(memory)
    else:
        budget = available_memory(place) if here else None
        notes.append(
            f"memory: the {budget / 1e9:.1f} GB that are free on {place} now (--memory)"
            if budget is not None
            else f"memory: how much {place} has is not known here, so everything fits (--memory)"
        )
    if here:
        speed = measured_bandwidth(str(place))
        notes.append(f"bandwidth of {place}: {speed / 1e9:.0f} GB/s, measured now")
    else:
        speed = rules.ASSUMED_BANDWIDTH.get(place.type, rules.UNKNOWN_BANDWIDTH)
        known = "a mid-range device" if place.type in rules.ASSUMED_BANDWIDTH else "an unknown kind of device"
        notes.append(
            f"{place} is not in this machine: {speed / 1e9:.0f} GB/s assumed, as of {known}; kernels by what they accept"
        )
    return _Wishes(budget, place, train, calibration, batch, context or usual, target, speed, here, str(path), notes)


@functools.lru_cache(maxsize=8)
def measured_bandwidth(device: str) -> float:
    """Bytes per second that a copy of 64 MiB reads and writes: the best of five, about a tenth of a second."""
    place = torch.device(device)
    source = torch.ones(16 << 20, dtype=torch.float32, device=place)
    target = torch.empty_like(source)
    best = math.inf
    for _ in range(5):
        begin = time.perf_counter()
        target.copy_(source)
        if place.type != "cpu":
            torch.accelerator.synchronize(place)
        best = min(best, time.perf_counter() - begin)
    return 2 * source.numel() * 4 / best


# --- what is planned --------------------------------------------------------------------------------------------------------


class _Known:
    """Plans of a dense checkpoint whose model class is known. The model and its names are made once."""

    def __init__(self, ready: Prepared):
        self.ready = ready
        self.shape = shape_of(ready.model.config)
        self.dense = ready.plan

    def plan(self, config: QuantizationConfigMixin, device: torch.device) -> Plan:
        ready = self.ready
        quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
        quantizer.validate_environment(device_map=None, weights_only=True)
        if quantizer.update_dtype(ready.plan.dtype) != ready.plan.dtype:
            return prepare(ready.checkpoint.path, config).plan
        quantizer.begin(ready.model, list(ready.names.slots.values()))
        return build_plan(
            ready.checkpoint, ready.model, ready.names.slots, ready.names, quantizer, ready.plan.dtype, device, True
        )


class _Unknown:
    """Plans of a checkpoint without a known model class: each matrix but embeddings and output counts as a linear layer."""

    def __init__(self, path: Any, error: ValueError, notes: list[str], hub_options: Mapping[str, Any] | None):
        from transformers import PretrainedConfig

        from anybit.engine.names import WHOLE
        from anybit.engine.plan import PlannedPart
        from anybit.engine.skeleton import Slot
        from anybit.engine.source import locate, read_quantizer
        from anybit.quantizers.checkpoint_config import model_config_of

        location = locate(path, **(hub_options or {}))
        if read_quantizer(location) is not None:
            raise error
        with Checkpoint.open(location) as checkpoint:
            tensors = dict(checkpoint.tensors)
        floats = {name: info for name, info in tensors.items() if info.dtype in ("float16", "bfloat16", "float32")}
        weights = {
            name: info
            for name, info in floats.items()
            if name.endswith(".weight")
            and len(info.shape) == 2
            and not any(word in name for word in ("embed", "head", "wte", "wpe"))
        }
        if not weights:
            raise error
        self.config = PretrainedConfig.from_dict({**model_config_of(location)})
        self.shape = shape_of(self.config)
        dtype = getattr(torch, next(iter(weights.values())).dtype)
        entries = [
            Entry(
                Slot(name, name.removesuffix(".weight"), "linear", tuple(info.shape), "Linear", False),
                [PlannedPart(name.removesuffix(".weight"), WHOLE, {"weight": info}, None)], DENSE, bytes_memory=info.nbytes,
            )
            for name, info in weights.items()
        ]  # fmt: skip
        plain = {name: [info] for name, info in tensors.items() if name not in weights}
        sizes = {name: infos[0].nbytes for name, infos in plain.items()}
        self.dense = Plan(str(location), None, entries, plain, {}, {}, dtype, plain_bytes=sizes)
        notes.append(
            f"the architecture is unknown here ({str(error).splitlines()[0]}): each of {len(weights)} matrices but embeddings "
            "and output counts as a linear layer"
        )

    def plan(self, config: QuantizationConfigMixin, device: torch.device) -> Plan:
        quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
        quantizer.validate_environment(device_map=None, weights_only=True)
        model = nn.Module()
        model.config = self.config
        try:
            quantizer.begin(model, [entry.slot for entry in self.dense.entries])
        except AttributeError as error:
            raise NotRepresentable(f"it asks the model's class, which is unknown ({error})") from error
        entries = []
        for entry in self.dense.entries:
            made = replace(entry)
            info = module_info(entry.slot, entry.parts[0], entry.parts, self.dense.dtype)
            layout = quantizer.layout_for(info)
            if layout is not None:
                made.parts, made.action = [replace(entry.parts[0], layout=layout)], "quantize"
                made.bytes_memory, made.kernel = layout_bytes(layout), "unknown"
            entries.append(made)
        return replace(self.dense, method=quantizer.method_name, entries=entries)


def bytes_written(plan: Plan) -> int:
    """Of all tensors in the files that `quantize` makes by this plan."""
    packed = sum(layout_bytes(part.layout) for entry in plan.entries for part in entry.parts if part.layout is not None)
    dense = {
        info.name: info.nbytes
        for entry in plan.entries
        for part in entry.parts
        if part.layout is None
        for info in part.stored.values()
    }
    dense.update({info.name: info.nbytes for infos in plan.plain.values() for info in infos})
    return packed + sum(dense.values())


@functools.lru_cache(maxsize=4096)
def layout_bytes(layout: Any) -> int:
    """Of the stored tensors of a layout."""
    return sum(math.prod(shape) * getattr(torch, dtype).itemsize for dtype, shape in layout.specs().values())


# --- how it is judged -------------------------------------------------------------------------------------------------------


class _Judge:
    def __init__(self, wishes: _Wishes, source: _Known | _Unknown):
        self.wishes, self.source = wishes, source
        self.quality: dict[str, dict[str, float]] = json.loads(MEASURED.read_text())
        self.infos = {info.name: info for info in method_infos()}
        wishes.notes.extend(source.shape.notes)
        self.dense_seconds = self.seconds(source.dense)

    def candidates(self) -> Iterator[Candidate]:
        yield self.candidate(DENSE, None, self.source.dense)
        for name, (cls, options) in schemes().items():
            try:
                config = cls(**options)
                plan = self.source.plan(config, self.wishes.device if self.wishes.here else torch.device("cpu"))
            except (CalibrationNeeded, NotRepresentable, NoKernel) as error:
                self.wishes.notes.append(f"{name} is left out: {str(error).splitlines()[0]}")
                continue
            yield self.candidate(name, config, plan)

    def candidate(self, name: str, config: QuantizationConfigMixin | None, plan: Plan) -> Candidate:
        wishes, shape = self.wishes, self.source.shape
        if wishes.train:
            cache, activations = 0, training_bytes(shape, plan, wishes.batch, wishes.context)
        else:
            cache = cache_bytes(shape, wishes.batch, wishes.context, plan.dtype.itemsize)
            activations = activation_bytes(shape, plan, wishes.batch, wishes.context)
        runtime = RUNTIME_BYTES if wishes.device.type == "cpu" else rules.DEVICE_RUNTIME_BYTES
        needed = runtime + max(plan.peak_bytes, plan.bytes_in_memory + cache + activations)
        written = bytes_written(plan)
        packed = [entry for entry in plan.entries if entry.action != DENSE]
        count = max(sum(entry.weights for entry in packed), 1)
        bits = 8 * sum(layout_bytes(part.layout) for entry in packed for part in entry.parts) / count if packed else 0.0
        quality, basis = self.quality_of(name, bits)
        kernels: dict[str, int] = {}
        for entry in packed:
            kernels[entry.kernel] = kernels.get(entry.kernel, 0) + 1
        seconds = self.seconds(plan)
        info = self.info_of(config)
        quantizer = registry.quantizer_class(config.dispatch_key()) if config is not None else None
        calibrated = quantizer is not None and quantizer.calibrated_algorithm is not None
        targets = config.served_by() if config is not None else ("transformers", "vllm")
        made = Candidate(
            name, config.dispatch_key() if config is not None else DENSE, written, bits if packed else 8.0 * plan.dtype.itemsize,
            plan.coverage, plan.bytes_in_memory, cache, activations, needed, quality, basis,
            rules.speed_class(self.dense_seconds / seconds), 1 / seconds, kernels, info is None or info.trains,
            "helps" if calibrated else "not needed", targets, _command(wishes, name, calibrated and wishes.calibration),
            fits=wishes.memory is None or needed <= wishes.memory,
        )  # fmt: skip
        against = self.against(made, plan, config is None)
        return replace(made, wished=not against, obstacle=against or self.too_large(made))

    def quality_of(self, name: str, bits: float) -> tuple[str, str]:
        if name in self.quality:
            kl = self.quality[name]["kl"]
            return rules.quality_by_kl(kl), f"KL {kl:.2g}, measured on the bundled model without calibration"
        return rules.quality_by_bits(bits), f"from {bits:.2f} bits per weight; not measured"

    def info_of(self, config: QuantizationConfigMixin | None) -> MethodInfo | None:
        return self.infos.get(config.dispatch_key()) if config is not None else None

    def seconds(self, plan: Plan) -> float:
        """Of one token of one sequence, bound by memory."""
        read = 0.0
        for entry in plan.entries:
            if entry.slot.kind == "embedding":
                continue
            read += entry.bytes_memory
            if entry.action != DENSE and entry.kernel not in ("", "unknown") and not self.native(entry):
                read += rules.REFERENCE_BYTES_PER_WEIGHT * entry.weights
        return max(read, 1.0) / self.wishes.bandwidth

    def native(self, entry: Entry) -> bool:
        """Whether a kernel of its own runs the weight on the wished device, be it here or not."""
        if self.wishes.here:
            return get(entry.kernel).rank > 0
        layout = entry.parts[0].layout
        return layout is not None and _accepted(layout, self.wishes.device.type)

    def against(self, made: Candidate, plan: Plan, dense: bool) -> str:
        """Why a wish excludes it, whatever memory there is."""
        wishes = self.wishes
        if not dense and plan.coverage == 0:
            return "it quantizes nothing of this model"
        if wishes.target is not None and wishes.target not in made.targets:
            return f"{wishes.target} does not read it"
        if wishes.train and not made.trainable:
            return "gradients do not pass it"
        if wishes.train and dense:
            return "a dense model is not trained on packed weights"
        return ""

    def too_large(self, made: Candidate) -> str:
        memory = self.wishes.memory
        if memory is None or made.fits:
            return ""
        return f"needs {_gb(made.bytes_needed)}, {_gb(made.bytes_needed - memory)} too much"


@functools.lru_cache(maxsize=1024)
def _accepted(layout: Any, device: str) -> bool:
    from anybit.kernels import available

    scheme = layout.scheme()
    return any(kernel.rank > 0 and kernel.refuses(scheme, torch.device(device)) is None for kernel, _ in available())


def _command(wishes: _Wishes, name: str, calibrated: bool) -> str:
    if name == DENSE:
        return f"anybit run {shlex.quote(wishes.path)} -p TEXT"
    output = f"{Path(wishes.path.rstrip('/')).name}-{name}"
    calib = " --calib TEXT_FILE" if calibrated else ""
    return f"anybit quantize {shlex.quote(wishes.path)} -o {shlex.quote(output)} --scheme {name}{calib}"


def _gb(count: float) -> str:
    if count < 1e6:
        return f"{count / 1e3:.1f} kB"
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _ranked(
    wishes: _Wishes, found: list[Candidate], others: tuple[tuple[str, str], ...], begin: float
) -> Recommendation:
    able = sorted((one for one in found if not one.obstacle), key=lambda one: one.order)
    rest = sorted((one for one in found if one.obstacle), key=lambda one: (not one.wished, one.bytes_needed))
    return Recommendation(
        wishes.path, str(wishes.device), wishes.memory, wishes.batch, wishes.context, tuple(placed([*able, *rest])),
        tuple(wishes.notes), others, seconds=time.perf_counter() - begin,
    )  # fmt: skip


def placed(ordered: Sequence[Candidate]) -> list[Candidate]:
    """The candidates, each with what decided against the one above it."""
    found: list[Candidate] = []
    for one in ordered:
        above = found[-1] if found and not found[-1].obstacle else None
        found.append(replace(one, why=one.obstacle or _why(one, above)))
    return found


def _why(one: Candidate, above: Candidate | None) -> str:
    if above is None:
        return "best quality, speed, size"
    if one.quality != above.quality:
        return "less quality"
    if one.speed != above.speed:
        return "less speed"
    if one.order[2] == above.order[2] and len(one.targets) < len(above.targets):
        return "fewer programs read it"
    if one.bytes_needed > above.bytes_needed:
        return f"{_gb(one.bytes_needed - above.bytes_needed)} more"
    return "as good as the one above"


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


# --- quantized already --------------------------------------------------------------------------------------------------------


def _of_quantized(ready: Prepared, wishes: _Wishes, begin: float) -> Recommendation:
    assert ready.quantizer is not None
    plan, shape = ready.plan, shape_of(ready.model.config)
    cache = cache_bytes(shape, wishes.batch, wishes.context, plan.dtype.itemsize)
    activations = activation_bytes(shape, plan, wishes.batch, wishes.context)
    if wishes.train:
        cache, activations = 0, training_bytes(shape, plan, wishes.batch, wishes.context)
    runtime = RUNTIME_BYTES if wishes.device.type == "cpu" else rules.DEVICE_RUNTIME_BYTES
    needed = runtime + max(plan.peak_bytes, plan.bytes_in_memory + cache + activations)
    found = conversions(ready)
    ready.checkpoint.release()
    return Recommendation(
        wishes.path, str(wishes.device), wishes.memory, wishes.batch, wishes.context, (), (*wishes.notes, *shape.notes),
        present=ready.quantizer.method_name, present_needs=needed, conversions=found, seconds=time.perf_counter() - begin,
    )  # fmt: skip


def conversions(ready: Prepared) -> tuple[tuple[str, str], ...]:
    """(scheme, "exact" or "rescaled") for every named scheme that can hold the codes of this checkpoint.

    Tried on the smallest weight of each kind of layout; `convert` looks at all of them.
    """
    samples: dict[Any, tuple[Entry, Any]] = {}
    for entry in ready.plan.entries:
        if entry.action != "packed":
            continue
        part = entry.parts[0]
        kind = replace(part.layout, shape=()) if part.layout is not None else None
        if kind not in samples or entry.weights < samples[kind][0].weights:
            samples[kind] = (entry, part)
    weights = [
        (entry, part, make_weight(ready.model, entry, part, ready.checkpoint)) for entry, part in samples.values()
    ]
    found = []
    for name, (cls, options) in schemes().items():
        if weights and cls.method != ready.quantizer.quantization_config.method:  # type: ignore[union-attr]
            kinds = {_conversion(ready, cls(**options), *sample) for sample in weights}
            if kinds and None not in kinds:
                found.append((name, "rescaled" if "rescaled" in kinds else "exact"))
    return tuple(sorted(found, key=lambda item: (item[1], item[0])))


def _conversion(ready: Prepared, config: QuantizationConfigMixin, entry: Entry, part: Any, weight: Any) -> str | None:
    try:
        target = AutoHfQuantizer.from_config(config, pre_quantized=False)
        target.begin(ready.model, list(ready.names.slots.values()))
        layout = target.layout_for(module_info(entry.slot, part, entry.parts, ready.plan.dtype))
        if layout is None:
            return None
        scheme = layout.scheme()
        if (weight.activation and weight.activation.rule) != (scheme.activation and scheme.activation.rule):
            return None
        stored = layout.encode(rewrite(weight, scheme))
        values = layout.decode(stored).to_dense(torch.float32)
        return "exact" if torch.equal(values, weight.to_dense(torch.float32)) else "rescaled"
    except AnybitError:
        return None
