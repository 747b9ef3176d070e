"""What will happen to every weight, decided from headers and configuration before a byte of data is read."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from anybit.containers import Checkpoint, TensorInfo
from anybit.engine.names import WHOLE, Conversion, Cut, Index, Names, Sorted
from anybit.engine.names import Part as NamedPart
from anybit.engine.outlining import aligned, alike, size
from anybit.engine.skeleton import Slot
from anybit.errors import CalibrationNeeded, MissingTensor, ShapeMismatch, UnexpectedTensor, did_you_mean
from anybit.kernels import Choice, choose
from anybit.modules.packed import joined
from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.measurement import Measurement
from anybit.weight import Layout, ModuleInfo
from anybit.weight.layout import join_name
from anybit.weight.row_cut import RowCutLayout

# Python, the allocator and the reading buffers of one load; measured on Linux with torch 2.13
OVERHEAD_BYTES = 24 << 20


@dataclass(frozen=True, slots=True)
class PlannedPart:
    """One stored unit of a weight: its checkpoint name, where it belongs, and its tensors by relative name.

    `conversion`: how a dense unit is made of the stored tensors, if it is not simply one of them. `dense_prefix`: what
    checkpoints of transformers call the unit; with "*" for the number of the expert where one unit has all of them. `cut`: of
    which stored unit the weight is some rows (then `prefix` is the layer's own name), see `names.Part`.
    """

    prefix: str
    index: Index
    stored: Mapping[str, TensorInfo]
    layout: Layout | None
    conversion: Conversion | None = None
    own_dense_prefix: str | None = None
    cut: Cut | None = None

    def packed_as(self, layout: Layout) -> PlannedPart:
        """The same unit, with its layout known."""
        return PlannedPart(
            self.prefix, self.index, self.stored, layout, self.conversion, self.own_dense_prefix, self.cut
        )

    @property
    def dense_prefix(self) -> str:
        return self.own_dense_prefix or self.prefix

    @property
    def dense_name(self) -> str:
        """Relative name of a dense part's only tensor."""
        return next(iter(self.stored))

    @property
    def bytes_stored(self) -> int:
        stored = sum(info.nbytes for info in self.stored.values())
        if self.cut is None or self.layout is None:
            return stored
        return stored * self.layout.shape[0] // self.cut[2]


@dataclass
class Entry:
    """One weight of the model. action: "packed" (stored quantized), "quantize" (dense, packed while loading) or "dense"."""

    slot: Slot
    parts: list[PlannedPart]
    action: str
    kernel: str = ""
    reason: str = ""
    device: str = "cpu"
    bytes_memory: int = 0
    largest_part: int = 0

    @property
    def bytes_stored(self) -> int:
        return sum(part.bytes_stored for part in self.parts)

    @property
    def weights(self) -> int:
        return math.prod(self.slot.shape)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes_memory / max(self.weights, 1)

    @property
    def layout(self) -> str:
        found = next((part.layout for part in self.parts if part.layout is not None), None)
        return type(found).__name__ if found is not None else "dense"


@dataclass(repr=False)
class Plan:
    """Everything a load will do. `plain`: model tensor -> stored names; `ignored`: stored name -> reason."""

    path: str
    method: str | None
    entries: list[Entry]
    plain: dict[str, list[TensorInfo]]
    ignored: dict[str, str]
    tied: dict[str, str]
    dtype: torch.dtype
    notes: list[str] = field(default_factory=list)
    plain_bytes: dict[str, int] = field(default_factory=dict)
    conversions: dict[str, Conversion] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    @property
    def bytes_on_disk(self) -> int:
        stored = [info for entry in self.entries for part in entry.parts for info in part.stored.values()]
        plain = [info for infos in self.plain.values() for info in infos]
        return sum({info.name: info.nbytes for info in (*stored, *plain)}.values())  # some make several weights

    @property
    def bytes_in_memory(self) -> int:
        """Weights after loading: packed layers as their kernels hold them, everything else in its dtype."""
        return sum(entry.bytes_memory for entry in self.entries) + sum(self.plain_bytes.values())

    @property
    def peak_bytes(self) -> int:
        """Largest resident memory of the load itself, without what Python and torch hold before it."""
        return self.bytes_in_memory + max((entry.largest_part for entry in self.entries), default=0) + OVERHEAD_BYTES

    @property
    def coverage(self) -> float:
        """Share of the model's packable weights, experts and embeddings included, that are packed."""
        total = sum(entry.weights for entry in self.entries)
        return sum(entry.weights for entry in self.entries if entry.action != "dense") / max(total, 1)

    def add_missing(self, key: str, strict: bool) -> None:
        """A weight of the model that is not stored; raises MissingTensor if `strict`."""
        if strict:
            raise MissingTensor(
                f"tensor {key!r} is not in {self.path}. Download or write the checkpoint again; if it is meant to be trained "
                "from scratch (a new head, say), pass strict=False, and the model class initialises it"
            )
        self.missing.append(key)
        self.notes.append(f"{key} is not stored; the model class initialised it")

    def dtype_in_memory(self, key: str, info: TensorInfo) -> torch.dtype:
        """Of a tensor that stays dense: 16- and 32-bit floats become the model's dtype, everything else stays."""
        stored: torch.dtype = getattr(torch, info.dtype)
        return self.dtypes[key] if stored.is_floating_point and stored.itemsize > 1 else stored

    def outline(self) -> list[tuple[str, list[Entry]]]:
        """Entries of one kind and of one place in the blocks under one name: "model.layers.{0-21}.mlp.down_proj"."""
        return alike(
            self.entries,
            name=lambda entry: entry.slot.module,
            same=lambda entry: (
                entry.action, entry.layout, tuple(entry.slot.shape), entry.kernel, entry.device, entry.reason
            ),
        )  # fmt: skip

    def __repr__(self) -> str:
        packed = [entry for entry in self.entries if entry.action != "dense"]
        return (
            f"<Plan of {self.path}: {self.method or 'dense'}, {len(packed)} of {len(self.entries)} weights packed "
            f"({self.coverage:.1%}), {size(self.bytes_in_memory)} in memory; print it for every module>"
        )

    def __str__(self) -> str:
        rows = [("module", "layout", "shape", "bits", "kernel", "why")]
        for name, members in self.outline():
            first = members[0]
            shape = "x".join(map(str, first.slot.shape))
            bits = f"{first.bits_per_weight:.2f}"
            rows.append((name, first.layout.removesuffix("Layout"), shape, bits, first.kernel, first.reason))
        return "\n".join([repr(self), *aligned(rows), *self.notes])

    def to_dict(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "method": self.method,
            "bytes_on_disk": self.bytes_on_disk,
            "bytes_in_memory": self.bytes_in_memory,
            "peak_bytes": self.peak_bytes,
            "coverage": self.coverage,
            "modules": [
                {
                    "module": entry.slot.module,
                    "kind": entry.slot.kind,
                    "shape": list(entry.slot.shape),
                    "action": entry.action,
                    "layout": entry.layout,
                    "kernel": entry.kernel,
                    "device": entry.device,
                    "bytes": entry.bytes_memory,
                    "bits_per_weight": entry.bits_per_weight,
                    "reason": entry.reason,
                }
                for entry in self.entries
            ],
            "ignored": self.ignored,
            "missing": self.missing,
            "notes": self.notes,
        }


def build_plan(
    checkpoint: Checkpoint,
    model: nn.Module,
    slots: dict[str, Slot],
    names: Names,
    quantizer: HfQuantizer | None,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    strict: bool = True,
    calibrated: bool = False,
) -> Plan:
    """Place every stored tensor, choose a layout and a kernel for every weight.

    `dtype`: of the model; what floating-point tensors that stay dense become. `calibrated`: there are data to measure static
    scales on. Raises MissingTensor, UnexpectedTensor, ShapeMismatch, CalibrationNeeded, or what the quantizer finds
    contradictory; with `strict` False unexpected tensors are named as ignored.
    """
    sorted_names = names.sort(checkpoint.tensors)
    tied = _tied_keys(model, sorted_names)
    plan = Plan(str(checkpoint.path), quantizer.method_name if quantizer else None, [], {}, {}, tied, dtype)
    plan.dtypes = _dtypes(model, names, dtype)
    builder = _Builder(plan, checkpoint, quantizer, device)
    for parameter, slot in slots.items():
        parts = _parts_of(slot, sorted_names, checkpoint)
        if not parts:
            if parameter not in tied:
                plan.add_missing(parameter, strict)
            continue
        if parameter in tied:
            twin = _parts_of(slots[tied[parameter]], sorted_names, checkpoint) if tied[parameter] in slots else []
            if twin and _same_dense(parts, twin, checkpoint):
                plan.ignored[next(iter(parts[0].stored.values())).name] = (
                    f"tied to {tied[parameter]}, which holds the same bytes"
                )
                continue
            tied.pop(parameter)
            plan.notes.append(
                f"{parameter} could share a weight of the model, but is stored with contents of its own, and keeps them"
            )
        plan.entries.append(builder.entry(slot, parts))

    if quantizer is not None:
        for what, modules in quantizer.decisions.items():
            others = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
            plan.notes.append(f"{what} ({modules[0]}{others})")
    _settle_rest(sorted_names.unknown, plan, model, names, quantizer, checkpoint, strict)
    for key, stored in sorted_names.plain.items():
        info = checkpoint.tensors[stored]
        _check_plain(key, info, names)
        plan.plain[key] = [info]
    for key, conversion in sorted_names.conversions.items():
        if key not in slots:
            plan.plain[key] = [checkpoint.tensors[name] for name, _ in conversion.sources]
            plan.conversions[key] = conversion
    for key, infos in plan.plain.items():
        plan.plain_bytes[key] = math.prod(names.state[key].shape) * plan.dtype_in_memory(key, infos[0]).itemsize
    for key in names.state:
        if key not in plan.plain and key not in slots and key not in tied:
            plan.add_missing(key, strict)
    for key in plan.missing:
        plan.plain_bytes[key] = names.state[key].numel() * plan.dtypes[key].itemsize
    if quantizer is not None and not quantizer.pre_quantized and not calibrated:
        refuse_unmeasured(plan.entries, quantizer.measurements(model))
    return plan


def is_static(entry: Entry) -> bool:
    """Whether a weight that is to be quantized has static scales of its input."""
    layouts = {part.layout for part in entry.parts if part.layout is not None} if entry.action == "quantize" else set()
    return any(layout.static_inputs() for layout in layouts)


def refuse_uncalibrated(plan: Plan) -> None:
    """CalibrationNeeded where codes are fitted to data, and there is none: before anything is read."""
    names = [
        entry.slot.module
        for entry in plan.entries
        if entry.action == "quantize" and any(part.layout.algorithm is None for part in entry.parts if part.layout)
    ]
    if names:
        raise CalibrationNeeded(
            f"{plan.method} cannot be made of {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} from weights "
            "alone: its codes are fitted to calibration data. Pass calibration= (--calib) with text like what the model is for, "
            'or choose a method that needs no data, e.g. BitsAndBytesConfig(load_in_4bit=True) ("nf4")'
        )


def refuse_unmeasured(entries: Iterable[Entry], measurements: Mapping[str, Measurement]) -> None:
    """CalibrationNeeded where something is to be stored that only data tells, and there is none."""
    names = [f"the scale of the input of {entry.slot.module}" for entry in entries if is_static(entry)]
    names += [f"{', '.join(own.specs)} of {path}" for path, own in measurements.items()]
    if names:
        raise CalibrationNeeded(
            f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: static scales are measured on data, and "
            "there is none here. Make the checkpoint with `quantize(..., calibration=...)` (--calib), or choose a scheme whose "
            "inputs, outputs and cache are quantized dynamically or not at all"
        )


def _tied_keys(model: nn.Module, sorted_names: Sorted) -> dict[str, str]:
    """Model key -> key of the weight it shares, where the second is the one that is stored."""
    tied: dict[str, str] = {}
    declared: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for target, source in declared.items():
        source = tied.get(source, source)
        if _has(sorted_names, target) and not _has(sorted_names, source):
            target, source = source, target
        tied[target] = source
    return tied


def _has(sorted_names: Sorted, key: str) -> bool:
    return key in sorted_names.parts or key in sorted_names.plain or key in sorted_names.conversions


def _same_dense(left: list[PlannedPart], right: list[PlannedPart], checkpoint: Checkpoint) -> bool:
    """Whether two weights are one dense tensor each, with the same bytes."""
    if not (len(left) == len(right) == 1 and _is_dense(left[0].stored) and _is_dense(right[0].stored)):
        return False
    first, second = (part.stored[part.dense_name] for part in (*left, *right))
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return torch.equal(*(checkpoint.read(info.name).contiguous().view(torch.uint8) for info in (first, second)))


def _dtypes(model: nn.Module, names: Names, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Model key -> dtype in memory, as transformers chooses it: some modules insist on float32."""
    kept = [re.compile(rf"(^|\.){name}($|\.)") for name in model._get_dtype_plan(dtype)]  # type: ignore[operator]
    return {
        key: torch.float32 if any(pattern.search(key) for pattern in kept) else tensor.dtype
        for key, tensor in names.state.items()
    }


def _parts_of(slot: Slot, sorted_names: Sorted, checkpoint: Checkpoint) -> list[PlannedPart]:
    """Stored units of a slot, in the order of their index, without layouts yet."""

    tensors = checkpoint.tensors

    def infos(part: NamedPart) -> dict[str, TensorInfo]:
        return {relative: tensors[name] for relative, name in part.stored.items()}

    conversion = sorted_names.conversions.get(slot.parameter)
    if conversion is not None:
        stored = {name: checkpoint.tensors[name] for name, _ in conversion.sources}
        return [PlannedPart(slot.module, WHOLE, stored, None, conversion)]
    found = sorted_names.parts.get(slot.parameter, {})
    order = sorted(found, key=lambda index: (-1 if index[0] is None else index[0], index[1] or 0))
    return [
        PlannedPart(
            found[index].prefix,
            index,
            infos(found[index]),
            None,
            own_dense_prefix=found[index].dense,
            cut=found[index].cut,
        )
        for index in order
    ]


class _Builder:
    """Makes the entries of one plan. What depends on layouts alone is worked out once per layout."""

    def __init__(self, plan: Plan, checkpoint: Checkpoint, quantizer: HfQuantizer | None, device: torch.device | str):
        self.plan, self.checkpoint, self.quantizer, self.device = plan, checkpoint, quantizer, device
        self.pre_quantized = quantizer is not None and quantizer.pre_quantized
        self._specs: dict[Layout, dict[str, Any]] = {}
        self._chosen: dict[Any, tuple[Choice, int]] = {}

    def entry(self, slot: Slot, parts: list[PlannedPart]) -> Entry:
        _check_complete(slot, parts)
        layouts = [self.layout(slot, part, parts) for part in parts]
        parts = [part if layout is None else part.packed_as(layout) for part, layout in zip(parts, layouts)]
        packed = [part for part in parts if part.layout is not None]
        if packed and len(packed) < len(parts):  # an expert stack is packed whole or not at all
            dense = next(part.prefix for part in parts if part.layout is None)
            if self.pre_quantized:
                raise ShapeMismatch(
                    f"{slot.parameter}: {len(packed)} of {len(parts)} stored parts are quantized, {dense} is dense. "
                    "All parts of one weight must be stored alike"
                )
            parts, packed = [replace(part, layout=None) for part in parts], []
        if not self.pre_quantized or not packed:
            _check_dense_shape(slot, parts)
        return self.packed(slot, parts) if packed else self.dense(slot, parts)

    def layout(self, slot: Slot, part: PlannedPart, parts: list[PlannedPart]) -> Layout | None:
        info = module_info(slot, part, parts, self.plan.dtype)
        prefix = part.prefix
        if part.cut is not None:
            prefix, _, rows = part.cut
            info = replace(info, name=prefix, shape=(rows, *info.shape[1:]))
        if self.quantizer is not None and self.pre_quantized and part.conversion is None:
            layout = self.quantizer.layout_of(info, part.stored, _peeker(self.checkpoint, part.stored))
            if layout is not None:
                if layout not in self._specs:
                    self._specs[layout] = layout.specs()
                _check_stored(layout, self._specs[layout], part.stored, prefix)
                if part.cut is None:
                    return layout
                return RowCutLayout.of(layout, prefix, part.cut[1], part.cut[1] + slot.shape[0])
        if part.conversion is not None:
            _check_convertible(part, self.quantizer if self.pre_quantized else None)
        if part.conversion is None and not _is_dense(part.stored):
            method = (
                self.quantizer.method_name if self.quantizer is not None and self.pre_quantized else "no quantization"
            )
            raise UnexpectedTensor(
                f"{prefix}: stored tensors {', '.join(sorted(part.stored))} are not a dense weight, and {method} does not "
                f"read them (file {next(iter(part.stored.values())).file}). Check the checkpoint's quantization_config"
            )
        if self.quantizer is None or self.pre_quantized:
            return None
        return self.quantizer.layout_for(info)

    def dense(self, slot: Slot, parts: list[PlannedPart]) -> Entry:
        entry = Entry(slot, parts, "dense", device=str(self.device), reason=_dense_reason(slot, self.quantizer))
        stored = next(iter(parts[0].stored.values()))
        entry.bytes_memory = entry.weights * self.plan.dtype_in_memory(slot.parameter, stored).itemsize
        whole = len(parts) == 1 and parts[0].conversion is None and not slot.transposed
        entry.largest_part = 0 if whole else entry.bytes_memory
        return entry

    def packed(self, slot: Slot, parts: list[PlannedPart]) -> Entry:
        entry = Entry(slot, parts, "packed" if self.pre_quantized else "quantize", device=str(self.device))
        first = parts[0].layout
        alike = all(part.layout is first or part.layout == first for part in parts)
        key = (first, len(parts), parts[0].index, slot.kind) if alike else id(entry)
        if key not in self._chosen:
            schemes = [part.layout.scheme() for part in parts if part.layout is not None]
            scheme = joined([part.index for part in parts], schemes)
            choice = choose(scheme, self.device)
            _, tensors = choice.kernel.prepare(scheme)
            extras = [tensor for own in schemes for tensor in own.extras.values()]
            self._chosen[key] = choice, sum(tensor.numel() * tensor.element_size() for tensor in [*tensors, *extras])
        choice, entry.bytes_memory = self._chosen[key]
        entry.kernel, entry.reason = choice.kernel.name, choice.reason
        # while a weight is made, its stored form lies beside the result; stacked parts lie beside their stack
        entry.largest_part = max(part.bytes_stored for part in parts) + (entry.bytes_memory if len(parts) > 1 else 0)
        return entry


def module_info(slot: Slot, part: PlannedPart, parts: list[PlannedPart], dtype: torch.dtype) -> ModuleInfo:
    """What a method is told of a stored unit: a part of fused experts is a linear of its own."""
    target = str(dtype).removeprefix("torch.")
    if part.index == WHOLE:
        name = part.prefix if slot.kind == "experts" else slot.module
        return ModuleInfo(name, slot.kind, slot.shape, target, slot.has_bias, slot.class_name, slot.transposed)
    *lead, rows, columns = slot.shape
    rows //= (parts[-1].index[1] or 0) + 1  # they are in order
    if part.index[0] is None and slot.kind == "experts":
        return ModuleInfo(part.prefix, "experts", (*lead, rows, columns), target, slot.has_bias, slot.class_name)
    return ModuleInfo(part.prefix, "linear", (rows, columns), target, slot.has_bias, "Linear")


_DENSE = {"float16", "bfloat16", "float32", "float64"}


def _is_dense(stored: Mapping[str, TensorInfo]) -> bool:
    """One floating-point tensor under the dense name ("weight", or the parameter's own) and nothing else."""
    return len(stored) == 1 and all(name in ("weight", "") and info.dtype in _DENSE for name, info in stored.items())


def _peeker(checkpoint: Checkpoint, stored: Mapping[str, TensorInfo]) -> Callable[[str], torch.Tensor]:
    return lambda relative: checkpoint.read(stored[relative].name)


def _check_stored(layout: Layout, specs: Mapping[str, Any], stored: Mapping[str, TensorInfo], prefix: str) -> None:
    """Every tensor the layout names is there with its dtype and shape, and nothing else is."""
    for relative, (dtype, shape) in specs.items():
        if relative not in stored:
            full = join_name(prefix, relative)
            raise MissingTensor(
                f"tensor {full!r} is not in the checkpoint ({type(layout).__name__} needs it, {dtype} {shape})"
                f"{did_you_mean(relative, [name for name in stored if name not in specs])}"
            )
        info = stored[relative]
        if info.dtype != dtype or tuple(info.shape) != tuple(shape):
            raise ShapeMismatch(
                f"tensor {info.name!r} in {info.file} is {info.dtype} {tuple(info.shape)}, "
                f"{type(layout).__name__} for a weight {layout.shape} needs {dtype} {tuple(shape)}"
            )
    for relative, info in stored.items():
        if relative not in specs:
            raise UnexpectedTensor(
                f"tensor {info.name!r} in {info.file} belongs to {prefix}, but {type(layout).__name__} has no use for it "
                f"(it reads {', '.join(specs)})"
            )


def _check_convertible(part: PlannedPart, quantizer: HfQuantizer | None) -> None:
    """transformers' operations turn dense tensors into others; they know nothing of packed ones."""
    for info in part.stored.values():
        if quantizer is not None and info.dtype not in _DENSE:
            kinds = [type(operation).__name__ for operation in part.conversion.operations]  # type: ignore[union-attr]
            raise UnexpectedTensor(
                f"tensor {info.name!r} in {info.file} is {info.dtype}: {quantizer.method_name} has it packed, and the model "
                f"class makes {part.prefix} of it by {', '.join(kinds)}, which is possible with dense weights only. Dequantize "
                "the checkpoint with the program that wrote it"
            )


def _check_complete(slot: Slot, parts: list[PlannedPart]) -> None:
    """All experts and all of the fused rows are stored."""
    if parts[0].index == WHOLE:
        return
    positions = {part.index[1] for part in parts}
    experts = range(slot.shape[0]) if parts[0].index[0] is not None else [None]
    present = {part.index for part in parts}
    for expert in experts:
        for position in positions:
            if (expert, position) not in present:
                raise MissingTensor(
                    f"{slot.parameter}: expert {expert}, part {position} is not stored; "
                    f"{len(present)} of {len(list(experts)) * len(positions)} parts are there, e.g. {parts[0].prefix}"
                )


def _check_dense_shape(slot: Slot, parts: list[PlannedPart]) -> None:
    if parts[0].index != WHOLE or parts[0].conversion is not None:
        return
    info = parts[0].stored[parts[0].dense_name]
    want = tuple(slot.shape)
    if slot.transposed:
        want = (*want[:-2], want[-1], want[-2])
    if tuple(info.shape) != want:
        raise ShapeMismatch(
            f"tensor {info.name!r} in {info.file} has shape {tuple(info.shape)}, the model wants {want}"
        )


def _check_plain(key: str, info: TensorInfo, names: Names) -> None:
    want = tuple(names.state[key].shape)
    if tuple(info.shape) != want:
        raise ShapeMismatch(
            f"tensor {info.name!r} in {info.file} has shape {tuple(info.shape)}, the model wants {want}"
        )


def _dense_reason(slot: Slot, quantizer: HfQuantizer | None) -> str:
    if quantizer is None:
        return "not quantized"
    if quantizer.pre_quantized:
        return "stored dense"
    return quantizer.skip_reasons.get(slot.module, "left dense by the configuration")


def _settle_rest(
    rest: list[str],
    plan: Plan,
    model: nn.Module,
    names: Names,
    quantizer: HfQuantizer | None,
    checkpoint: Checkpoint,
    strict: bool,
) -> None:
    """Name the reason why each remaining stored tensor is not used, or refuse."""
    patterns = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []]
    for key in rest:
        claimed = quantizer.claims(key) if quantizer is not None else None
        if claimed is not None:
            plan.ignored[key] = claimed
        elif any(pattern.search(key) for pattern in patterns):
            plan.ignored[key] = f"{type(model).__name__} names it as not needed"
        elif key.endswith("rotary_emb.inv_freq"):
            plan.ignored[key] = "recomputed from the configuration"
        elif not strict:
            plan.ignored[key] = f"{type(model).__name__} has no such weight"
        else:
            info = checkpoint.tensors[key]
            raise UnexpectedTensor(
                f"tensor {key!r} in {info.file} belongs to no weight of {type(model).__name__}"
                f"{did_you_mean(key, names.state) or '.'} Pass strict=False to load without it; the plan then names it"
            )
