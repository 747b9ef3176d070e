"""What will happen to every weight, decided from headers and configuration before a byte of data is read."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from anybit.containers import Checkpoint, TensorInfo
from anybit.engine.names import Names
from anybit.engine.skeleton import Slot
from anybit.errors import MissingTensor, ShapeMismatch, UnexpectedTensor, did_you_mean
from anybit.kernels import choose
from anybit.quantizers.base import HfQuantizer
from anybit.weight import Layout, ModuleInfo, Weight
from anybit.weight.layout import join_name

# Python, the allocator and the reading buffers of one load; measured on Linux with torch 2.13
OVERHEAD_BYTES = 64 << 20


@dataclass(frozen=True)
class PlannedPart:
    """One stored unit of a weight: its checkpoint name, where it belongs, and its tensors by relative name."""

    prefix: str
    index: tuple[int | None, int | None]
    stored: Mapping[str, TensorInfo]
    layout: Layout | None

    @property
    def dense_name(self) -> str:
        """Relative name of a dense part's only tensor."""
        return next(iter(self.stored))

    @property
    def bytes_stored(self) -> int:
        return sum(info.nbytes for info in self.stored.values())


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


@dataclass
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

    @property
    def bytes_on_disk(self) -> int:
        return sum(entry.bytes_stored for entry in self.entries) + sum(
            info.nbytes for infos in self.plain.values() for info in infos
        )

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
) -> Plan:
    """Place every stored tensor, choose a layout and a kernel for every weight.

    `dtype`: of the model; what floating-point tensors that stay dense become. Raises MissingTensor, UnexpectedTensor,
    ShapeMismatch, or what the quantizer finds contradictory; with `strict` False unexpected tensors are named as ignored.
    """
    grouped: dict[str, dict[tuple[int | None, int | None], dict[str, TensorInfo]]] = {}
    prefixes: dict[tuple[str, tuple[int | None, int | None]], str] = {}
    plain: dict[str, list[TensorInfo]] = {}
    ignored: dict[str, str] = {}
    for key, info in checkpoint.tensors.items():
        place = names.place(key)
        if place is not None:
            grouped.setdefault(place.slot, {}).setdefault(place.index, {})[place.relative] = info
            prefixes[place.slot, place.index] = place.prefix
            continue
        renamed, _ = names.rename(key)
        if renamed in names.state:
            plain.setdefault(renamed, []).append(info)
        else:
            ignored[key] = ""
    tied = dict(getattr(model, "all_tied_weights_keys", {}) or {})
    plan = Plan(str(checkpoint.path), quantizer.method_name if quantizer else None, [], plain, {}, tied, dtype)

    for parameter, slot in slots.items():
        found = grouped.pop(parameter, None)
        if found is None:
            if parameter not in tied and parameter not in plain:
                _missing(parameter, checkpoint)
            continue
        if parameter in tied and tied[parameter] in grouped | {entry.slot.parameter: 0 for entry in plan.entries}:
            for stored in found.values():
                for info in stored.values():
                    plan.ignored[info.name] = f"tied to {tied[parameter]}, which is stored too"
            continue
        plan.entries.append(_entry(slot, found, prefixes, checkpoint, quantizer, dtype, device, plan))

    _settle_rest(ignored, plan, model, names, quantizer, checkpoint, strict)
    for key, infos in plain.items():
        stored = infos[0]
        _check_plain(key, infos, names)
        itemsize = _plain_dtype(stored, dtype).itemsize
        plan.plain_bytes[key] = math.prod(names.state[key].shape) * itemsize
    missing = [key for key in names.state if key not in plain and key not in slots and key not in tied]
    if missing:
        _missing(missing[0], checkpoint)
    return plan


def _entry(
    slot: Slot,
    found: dict[tuple[int | None, int | None], dict[str, TensorInfo]],
    prefixes: Mapping[tuple[str, tuple[int | None, int | None]], str],
    checkpoint: Checkpoint,
    quantizer: HfQuantizer | None,
    dtype: torch.dtype,
    device: torch.device | str,
    plan: Plan,
) -> Entry:
    parts: list[PlannedPart] = []
    for index in sorted(found, key=lambda place: (place[0] or 0, place[1] or 0)):
        stored, prefix = found[index], prefixes[slot.parameter, index]
        info = _part_info(slot, index, prefix, found, dtype)
        layout = None
        if quantizer is not None and quantizer.pre_quantized:
            layout = quantizer.layout_of(info, stored, _peeker(checkpoint, stored))
        if layout is not None:
            _check_stored(layout, stored, prefix)
        elif not _is_dense(stored):
            names_found = ", ".join(sorted(stored))
            method = quantizer.method_name if quantizer is not None and quantizer.pre_quantized else "no quantization"
            raise UnexpectedTensor(
                f"{prefix}: stored tensors {names_found} are not a dense weight, and {method} does not read them "
                f"(file {next(iter(stored.values())).file}). Check the checkpoint's quantization_config"
            )
        elif quantizer is not None and not quantizer.pre_quantized:
            layout = quantizer.layout_for(info)
        parts.append(PlannedPart(prefix, index, stored, layout))
    _check_complete(slot, parts)
    packed = [part.layout for part in parts if part.layout is not None]
    if packed and len(packed) < len(parts):  # an expert stack is packed whole or not at all
        dense = next(part.prefix for part in parts if part.layout is None)
        if quantizer is not None and quantizer.pre_quantized:
            raise ShapeMismatch(f"{slot.parameter}: {len(packed)} of {len(parts)} stored parts are quantized, {dense} is dense")
        parts = [PlannedPart(part.prefix, part.index, part.stored, None) for part in parts]
        packed = []
    if not packed:
        entry = Entry(slot, parts, "dense")
        stored_dtype = _plain_dtype(parts[0].stored[parts[0].dense_name], dtype)
        entry.bytes_memory = entry.weights * stored_dtype.itemsize
        entry.largest_part = entry.bytes_memory if len(parts) > 1 else 0
        entry.reason = _dense_reason(slot, quantizer)
        entry.device = str(device)
        _check_dense_shape(slot, parts)
        return entry
    action = "packed" if quantizer is not None and quantizer.pre_quantized else "quantize"
    entry = Entry(slot, parts, action, device=str(device))
    scheme = parts[0].layout.scheme()  # type: ignore[union-attr]
    choice = choose(scheme, device)
    entry.kernel = choice.kernel.name
    entry.reason = choice.reason
    if action == "quantize":
        _check_dense_shape(slot, parts)
    seen: dict[Layout, tuple[int, int]] = {}
    for part in parts:
        assert part.layout is not None
        if part.layout not in seen:
            seen[part.layout] = _memory_of(part.layout.scheme(), choice.kernel)
        memory, extras = seen[part.layout]
        entry.bytes_memory += memory + extras
        # while a part is made, its stored form and temporaries of one chunk lie beside the result
        entry.largest_part = max(entry.largest_part, part.bytes_stored + memory)
    return entry


def _memory_of(scheme: Weight, kernel: Any) -> tuple[int, int]:
    _, tensors = kernel.prepare(scheme)
    extras = sum(tensor.numel() * tensor.element_size() for tensor in scheme.extras.values())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors), extras


def _part_info(
    slot: Slot,
    index: tuple[int | None, int | None],
    prefix: str,
    found: Mapping[tuple[int | None, int | None], Mapping[str, TensorInfo]],
    dtype: torch.dtype,
) -> ModuleInfo:
    """What a method is told of a stored unit: a part of fused experts is a linear of its own."""
    target = str(dtype).removeprefix("torch.")
    if index == (None, None):
        return ModuleInfo(prefix if slot.kind == "experts" else slot.module, slot.kind, slot.shape, target, slot.has_bias, slot.class_name)
    *_, rows, columns = slot.shape
    positions = len({place[1] for place in found})
    return ModuleInfo(prefix, "linear", (rows // positions, columns), target, slot.has_bias, "Linear")


_DENSE = {"float16", "bfloat16", "float32", "float64"}


def _is_dense(stored: Mapping[str, TensorInfo]) -> bool:
    """One floating-point tensor under the dense name ("weight", or the parameter's own) and nothing else."""
    return len(stored) == 1 and all(name in ("weight", "") and info.dtype in _DENSE for name, info in stored.items())


def _plain_dtype(info: TensorInfo, dtype: torch.dtype) -> torch.dtype:
    stored: torch.dtype = getattr(torch, info.dtype)
    return dtype if stored.is_floating_point and stored.itemsize > 1 else stored


def _peeker(checkpoint: Checkpoint, stored: Mapping[str, TensorInfo]) -> Callable[[str], torch.Tensor]:
    return lambda relative: checkpoint.read(stored[relative].name)


def _check_stored(layout: Layout, stored: Mapping[str, TensorInfo], prefix: str) -> None:
    """Every tensor the layout names is there with its dtype and shape, and nothing else is."""
    specs = layout.specs()
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


def _check_complete(slot: Slot, parts: list[PlannedPart]) -> None:
    """All experts and all of the fused rows are stored."""
    if parts[0].index == (None, None):
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
    if parts[0].index != (None, None):
        return
    info = parts[0].stored[parts[0].dense_name]
    want = tuple(slot.shape)
    if slot.transposed:
        want = (*want[:-2], want[-1], want[-2])
    if tuple(info.shape) != want:
        raise ShapeMismatch(f"tensor {info.name!r} in {info.file} has shape {tuple(info.shape)}, the model wants {want}")


def _check_plain(key: str, infos: list[TensorInfo], names: Names) -> None:
    want = tuple(names.state[key].shape)
    if len(infos) == 1 and key not in names.converter_of and tuple(infos[0].shape) != want:
        raise ShapeMismatch(f"tensor {infos[0].name!r} in {infos[0].file} has shape {tuple(infos[0].shape)}, the model wants {want}")


def _dense_reason(slot: Slot, quantizer: HfQuantizer | None) -> str:
    if quantizer is None:
        return "not quantized"
    if quantizer.pre_quantized:
        return "stored dense"
    return quantizer.skip_reasons.get(slot.module, "left dense by the configuration")


def _missing(parameter: str, checkpoint: Checkpoint) -> None:
    raise MissingTensor(
        f"tensor {parameter!r} is not in {checkpoint.path}{did_you_mean(parameter, checkpoint.tensors)} "
        f"The model cannot be complete without it"
    )


def _settle_rest(
    rest: dict[str, str],
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
                f"{did_you_mean(key, names.state)} Pass strict=False to load without it; the plan then names it"
            )
