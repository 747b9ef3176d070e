"""One weight at a time: stored tensors -> a layer of the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from anybit import algorithms
from anybit.containers import Checkpoint
from anybit.engine import staging
from anybit.engine.names import WHOLE, Index
from anybit.engine.plan import Entry, Plan, PlannedPart
from anybit.engine.skeleton import Slot
from anybit.errors import AnybitError, CalibrationNeeded, located
from anybit.kernels import Kernel
from anybit.modules import PackedWeight, Part, QuantEmbedding, QuantExperts, QuantLinear, TiedLinear
from anybit.quantizers.attachments import carry_over
from anybit.weight import Layout, Weight
from anybit.weight.joining import Alternating
from anybit.weight.layout import join_name
from anybit.weight.row_cut import RowCutLayout

Alike = tuple[tuple[Layout, Index], ...]  # what weights of one form are made of


def load_entry(
    model: nn.Module,
    entry: Entry,
    plan: Plan,
    checkpoint: Checkpoint,
    device: torch.device,
    kernels: dict[tuple[Alike, torch.device], Kernel] | None = None,
) -> None:
    """Read, decode or quantize, and set one weight of the model. `kernels`: those chosen before, for weights of one form."""
    if entry.action == "dense":
        set_tensor(model, entry.slot.parameter, read_dense(model, entry, plan, checkpoint), device)
        return
    weights = [make_weight(model, entry, part, checkpoint, device).to(device) for part in entry.parts]
    key = _alike(entry), device
    known = kernels if kernels is not None else {}
    known[key] = attach_packed(model, entry, weights, known.get(key)).kernel


def make_weight(
    model: nn.Module, entry: Entry, part: PlannedPart, checkpoint: Checkpoint, device: torch.device | str = "cpu"
) -> Weight:
    """The weight of one stored unit, decoded or quantized. Errors name the unit and its file."""
    layout = part.layout
    assert layout is not None
    try:
        if entry.action == "packed":
            return _decoded(layout, part, checkpoint, torch.device(device))
        if layout.algorithm is None:
            raise CalibrationNeeded(
                f"it cannot be quantized to {type(layout).__name__} from its weights alone; "
                "quantize it with an algorithm that takes calibration data"
            )
        dense = dense_part(model, entry, part, checkpoint).to(device)
        options = covering(layout, part.prefix, checkpoint).algorithm_options()
        return algorithms.get(layout.algorithm)(dense, layout.scheme(), **options)
    except AnybitError as error:
        raise located(error, f"{part.prefix} ({next(iter(part.stored.values())).file})") from error.__cause__


def _decoded(layout: Layout, part: PlannedPart, checkpoint: Checkpoint, device: torch.device) -> Weight:
    """The weight of stored tensors, on `device`. They are read in a map of their file, which nothing keeps afterwards.

    Most layouts make new tensors of the largest ones: copying these out of the file first would be a second pass over them.
    """
    stored = {name: checkpoint.read(info.name, copy=False) for name, info in part.stored.items()}
    weight = layout.read(stored) if isinstance(layout, RowCutLayout) else layout.decode(stored)
    starts = [(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in stored.values()]

    def owned(tensor: Tensor) -> Tensor:
        place = tensor.data_ptr()
        return tensor.clone() if any(start <= place < stop for start, stop in starts) else tensor

    weight = weight.map(owned) if device.type == "cpu" else weight.map(lambda tensor: staging.moved(tensor, device))
    del stored
    checkpoint.release()
    return weight


def covering(
    layout: Layout, prefix: str, checkpoint: Checkpoint, changed: Mapping[str, Tensor] | None = None
) -> Layout:
    """The layout of the unit `prefix`, its largest scale covering the layers that engines join with it.

    `changed`: dense weights, by name, that are no longer as the checkpoint has them.
    """
    found = [0.0]
    for own in layout.alongside:
        name = join_name(prefix.rpartition(".")[0], f"{own}.weight")
        if name in checkpoint.tensors:
            dense = changed[name] if changed and name in changed else checkpoint.read(name)
            found.append(max(abs(float(number)) for number in torch.aminmax(dense)))
    return layout.covering(max(found)) if layout.alongside else layout


def assembled(parts: Iterable[tuple[PlannedPart, Tensor]]) -> Tensor:
    """The logical weight, [out, in] or [experts, out, in], that units make together."""
    rows: dict[int | None, list[Tensor]] = {}
    turns = False
    for part, value in parts:
        rows.setdefault(part.index[0], []).append(value)
        turns = turns or isinstance(part.index[1], Alternating)
    join = by_turns if turns else torch.cat
    experts = [join(own) if len(own) > 1 else own[0] for own in rows.values()]
    return experts[0] if None in rows else torch.stack(experts)


def by_turns(matrices: Sequence[Tensor]) -> Tensor:
    """Their rows one after the other: the first of each, then the second of each."""
    return torch.stack(list(matrices), 1).flatten(0, 1)


def oriented(entry: Entry, logical: Tensor) -> Tensor:
    """As the model's class keeps it."""
    return logical.transpose(-1, -2).contiguous() if entry.slot.transposed else logical


def dense_part(model: nn.Module, entry: Entry, part: PlannedPart, checkpoint: Checkpoint) -> Tensor:
    """A dense unit, logical: [out, in] or [experts, out, in], in its stored dtype."""
    if part.conversion is not None:
        dense = part.conversion.run(checkpoint.read, model)[entry.slot.parameter]
    else:
        dense = checkpoint.read(part.stored[part.dense_name].name)
    return dense.transpose(-1, -2) if entry.slot.transposed and part.index == WHOLE else dense


def read_dense(model: nn.Module, entry: Entry, plan: Plan, checkpoint: Checkpoint) -> Tensor:
    """A weight that stays dense, in the model's own orientation and dtype."""
    first = entry.parts[0]
    if first.conversion is not None:
        dense = first.conversion.run(checkpoint.read, model)[entry.slot.parameter]
        return dense.to(plan.dtype_in_memory(entry.slot.parameter, next(iter(first.stored.values()))))
    dtype = plan.dtype_in_memory(entry.slot.parameter, first.stored[first.dense_name])
    if first.index == WHOLE:
        return checkpoint.read(first.stored[first.dense_name].name).to(dtype)
    if entry.slot.transposed or isinstance(first.index[1], Alternating):
        parts = ((part, checkpoint.read(part.stored[part.dense_name].name)) for part in entry.parts)
        return oriented(entry, assembled(parts)).to(dtype)
    # parts are written where they belong, one at a time
    full = torch.empty(entry.slot.shape, dtype=dtype)
    experts = {expert: number for number, expert in enumerate(dict.fromkeys(part.index[0] for part in entry.parts))}
    filled = dict.fromkeys(experts, 0)
    for part in entry.parts:
        tensor = checkpoint.read(part.stored[part.dense_name].name)
        own = full if part.index[0] is None else full[experts[part.index[0]]]
        start, rows = filled[part.index[0]], tensor.shape[-2]
        own[..., start : start + rows, :] = tensor
        filled[part.index[0]] = start + rows
    return full


def attach_packed(model: nn.Module, entry: Entry, weights: list[Weight], kernel: Kernel | None = None) -> PackedWeight:
    """Make the layer a packed one (once), then give it the weights; `kernel`: default the best one."""
    module, parts = _packed_module(model, entry)
    module.set_weights(parts, weights, kernel)
    return module


def attach_scheme(model: nn.Module, entry: Entry, known: dict[Alike, PackedWeight]) -> None:
    """Make the layer a packed one without numbers. `known`: one such layer for every form, which others are copied from."""
    module, parts = _packed_module(model, entry)
    key = _alike(entry)
    if key in known:
        module.take_form(parts, known[key])
    else:
        module.set_weights(parts, [part.layout.scheme() for part in parts])
        known[key] = module


def _alike(entry: Entry) -> Alike:
    return tuple((part.layout, part.index) for part in entry.parts if part.layout is not None)


def _packed_module(model: nn.Module, entry: Entry) -> tuple[PackedWeight, tuple[Part, ...]]:
    slot = entry.slot
    parts = tuple(Part(part.layout, part.prefix, part.index) for part in entry.parts if part.layout is not None)
    module: Any = model.get_submodule(slot.module) if slot.kind != "experts" else _get(model, slot.module)
    if not isinstance(module, PackedWeight):
        module = packed_layer(module, slot)
        parent, _, own = slot.module.rpartition(".")
        owner = model.get_submodule(parent)
        owner._parameters.pop(own, None)
        setattr(owner, own, module)
    return module, parts


def _get(model: nn.Module, path: str) -> Any:
    parent, _, own = path.rpartition(".")
    return getattr(model.get_submodule(parent), own)


def packed_layer(module: Any, slot: Slot) -> PackedWeight:
    """The packed twin of a layer; a subclass with behaviour of its own (scaled embeddings) keeps it."""
    if slot.kind == "experts":
        return QuantExperts(slot.transposed)
    if slot.kind == "embedding":
        packed: PackedWeight = QuantEmbedding(slot.shape[0], slot.shape[1], module.padding_idx)
    else:
        packed = QuantLinear(slot.shape[1], slot.shape[0], module._parameters.get("bias"))
    if type(module) not in (nn.Linear, nn.Embedding) and slot.kind != "conv1d":
        twin: Any = type(f"Quant{type(module).__name__}", (type(module), type(packed)), {})
        own = {name: tensor for name, tensor in module._parameters.items() if name != "weight"}
        kept = {"_parameters": own, "_buffers": module._buffers, "_modules": module._modules}
        state = {**module.__dict__, **packed.__dict__, **kept}
        packed = twin.__new__(twin)
        packed.__dict__.update(state)
    carry_over(module, packed)
    packed.train(module.training)
    return packed


# --- everything else ----------------------------------------------------------------------------------------------------------


def load_plain(model: nn.Module, key: str, plan: Plan, checkpoint: Checkpoint, device: torch.device | str) -> None:
    """Norms, biases, buffers: read as they are, or converted by transformers' operations."""
    infos = plan.plain[key]
    conversion = plan.conversions.get(key)
    tensor = checkpoint.read(infos[0].name) if conversion is None else conversion.run(checkpoint.read, model)[key]
    owner = model.get_submodule(key.rpartition(".")[0])
    if not isinstance(owner, PackedWeight):  # the bias of a packed layer is saved as it was stored
        tensor = tensor.to(plan.dtype_in_memory(key, infos[0]))
    set_tensor(model, key, tensor, device)


def set_tensor(model: nn.Module, key: str, tensor: Tensor, device: torch.device | str) -> None:
    """Replace a parameter or buffer of the model."""
    path, _, own = key.rpartition(".")
    module = model.get_submodule(path)
    tensor = tensor.to(device)
    if own in module._parameters:
        old = module._parameters[own]
        trained = old is not None and old.requires_grad and tensor.is_floating_point()
        module._parameters[own] = nn.Parameter(tensor, requires_grad=trained)
    else:
        module._buffers[own] = tensor


def tie(model: Any, plan: Plan) -> None:
    """Let tied layers share: the same parameter if it is dense, the same packed table if it is not."""
    model.all_tied_weights_keys = dict(plan.tied)
    for target, source in plan.tied.items():
        owner = model.get_submodule(source.rpartition(".")[0])
        path, _, own = target.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(owner, PackedWeight) and own == "weight":
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, TiedLinear(owner, module._parameters.get("bias")))
        else:
            module._parameters[own] = owner._parameters[source.rpartition(".")[2]]
