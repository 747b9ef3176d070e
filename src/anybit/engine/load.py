"""Read a checkpoint into a packed model, one weight at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anybit import algorithms
from anybit.containers import Checkpoint
from anybit.engine import devices, skeleton
from anybit.engine.names import Names
from anybit.engine.plan import Entry, Plan, PlannedPart, build_plan
from anybit.engine.source import locate, read_quantizer
from anybit.errors import AnybitError, CalibrationNeeded
from anybit.modules import PackedWeight, Part, QuantEmbedding, QuantExperts, QuantLinear
from anybit.quantizers.base import HfQuantizer
from anybit.weight import Weight

Progress = Callable[[str, int, int], None]  # (module, bytes done, bytes in all)


def load(
    path: str | os.PathLike[str],
    quantization_config: Any = None,
    *,
    auto_class: Any = None,
    config: Any = None,
    device_map: Any = None,
    dtype: torch.dtype | str = "auto",
    max_memory: Mapping[Any, Any] | None = None,
    offload_folder: str | None = None,
    dequantize: bool = False,
    strict: bool = True,
    progress: Progress | None = None,
    hub_options: Mapping[str, Any] | None = None,
    **model_options: Any,
) -> nn.Module:
    """A model whose quantized weights stay packed, on any device.

    `path`: a folder, a .safetensors file beside a config.json, or a hub id. `quantization_config` on a dense checkpoint
    quantizes while loading; on a quantized one only its loading attributes count. `device_map`: None, "auto" and the like,
    a device, or a dict of module path to device or "disk". `dequantize`: make every weight dense. `strict` False names
    unexpected tensors in the plan instead of raising. Raises ConfigError, CheckpointError, NoKernel.
    """
    prepared = prepare(
        path, quantization_config, auto_class=auto_class, config=config, dtype=dtype, strict=strict,
        device=devices.main_device(device_map), hub_options=hub_options, **model_options,
    )  # fmt: skip
    model, plan, checkpoint = prepared.model, prepared.plan, prepared.checkpoint
    if prepared.quantizer is not None:
        prepared.quantizer.preprocess_model(model)
    for entry in plan.entries:
        if entry.action != "dense":
            put_in_place(model, entry, [part.layout.scheme() for part in entry.parts if part.layout is not None])
    placement = devices.place(model, plan, device_map, max_memory)
    done, total = 0, max(plan.bytes_on_disk, 1)
    offloader = devices.Offloader(placement, offload_folder)
    for entry in plan.entries:
        target = placement.device_of(entry.slot.module)
        entry.device = str(target)
        load_entry(model, entry, checkpoint, prepared.names, plan.dtype, target if target != "disk" else "cpu")
        if target == "disk":
            offloader.move_out(model, entry.slot.module)
        done += entry.bytes_stored
        if progress is not None:
            progress(entry.slot.module, done, total)
    for key in plan.plain:
        target = placement.device_of(key)
        load_plain(model, key, plan, checkpoint, prepared.names, "cpu" if target == "disk" else target)
        if target == "disk":
            offloader.move_out(model, key)
    finish(model, plan, placement)
    checkpoint.release()
    attach(model, prepared)
    if prepared.quantizer is not None:
        prepared.quantizer.postprocess_model(model)
    offloader.dispatch(model)
    if dequantize:
        from anybit.engine.dequantize import dequantize_model

        dequantize_model(model)
    return model


class Prepared:
    """A plan and what it was made from."""

    def __init__(self, model: nn.Module, plan: Plan, checkpoint: Checkpoint, names: Names, quantizer: HfQuantizer | None):
        self.model, self.plan, self.checkpoint, self.names, self.quantizer = model, plan, checkpoint, names, quantizer


def prepare(
    path: str | os.PathLike[str],
    quantization_config: Any = None,
    *,
    auto_class: Any = None,
    config: Any = None,
    dtype: torch.dtype | str = "auto",
    strict: bool = True,
    device: torch.device | str = "cpu",
    hub_options: Mapping[str, Any] | None = None,
    **model_options: Any,
) -> Prepared:
    """Everything `load` decides before it reads data: the backend first, then the model without weights, then the plan."""
    folder = locate(path, **(hub_options or {}))
    quantizer = read_quantizer(folder, quantization_config)
    if quantizer is not None:
        quantizer.validate_environment(device_map=device, weights_only=True)
    checkpoint = Checkpoint.open(folder)
    config = config if config is not None else skeleton.read_config(folder if folder.is_dir() else folder.parent)
    wanted = config.dtype if dtype in ("auto", None) else getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if wanted is None:
        wanted = _most_stored_dtype(checkpoint)
    if quantizer is not None:
        wanted = quantizer.update_dtype(wanted)
    model = skeleton.build(config, auto_class, dtype=wanted, **model_options)
    slots = skeleton.slots(model)
    names = Names(model, slots)
    if quantizer is not None:
        quantizer.begin(model, list(slots.values()))
    plan = build_plan(checkpoint, model, slots, names, quantizer, wanted, device, strict)
    return Prepared(model, plan, checkpoint, names, quantizer)


def _most_stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The floating dtype that most stored bytes have, for configurations that name none."""
    count: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        if info.dtype in ("float16", "bfloat16", "float32"):
            count[info.dtype] = count.get(info.dtype, 0) + info.nbytes
    found: torch.dtype = getattr(torch, max(count, key=lambda name: count[name], default="float32"))
    return found


# --- one weight --------------------------------------------------------------------------------------------------------


def load_entry(
    model: nn.Module, entry: Entry, checkpoint: Checkpoint, names: Names, dtype: torch.dtype, device: torch.device | str
) -> None:
    """Read, decode or quantize, and set one weight of the model."""
    if entry.action == "dense":
        set_tensor(model, entry.slot.parameter, read_dense(entry, checkpoint, names, model, dtype), device)
        return
    weights = []
    for part in entry.parts:
        assert part.layout is not None
        try:
            if entry.action == "packed":
                weight = part.layout.decode({name: checkpoint.read(info.name) for name, info in part.stored.items()})
            else:
                weight = quantize_dense(logical(checkpoint.read(part.stored[part.dense_name].name), entry), part, device)
        except AnybitError as error:
            file = next(iter(part.stored.values())).file
            raise type(error)._of(f"{part.prefix} ({file}): {error}") from error
        weights.append(weight.to(device))
    put_in_place(model, entry, weights)


def quantize_dense(dense: Tensor, part: PlannedPart, device: torch.device | str) -> Weight:
    """A dense weight in its part's layout, by the algorithm the layout names."""
    layout = part.layout
    assert layout is not None
    if layout.algorithm is None:
        raise CalibrationNeeded(
            f"{part.prefix} cannot be quantized to {type(layout).__name__} from its weights alone; "
            f"quantize it with an algorithm that takes calibration data"
        )
    return algorithms.get(layout.algorithm)(dense.to(device), layout.scheme(), **layout.algorithm_options())


def logical(dense: Tensor, entry: Entry) -> Tensor:
    """A stored dense tensor as [out, in] or [experts, out, in]."""
    whole = entry.parts[0].index == (None, None)
    return dense.transpose(-1, -2).contiguous() if entry.slot.transposed and whole else dense


def read_dense(entry: Entry, checkpoint: Checkpoint, names: Names, model: nn.Module, dtype: torch.dtype) -> Tensor:
    """A weight that stays dense, in the model's own orientation."""
    if entry.parts[0].index == (None, None) and entry.slot.parameter not in names.converter_of:
        return checkpoint.read(entry.parts[0].stored[entry.parts[0].dense_name].name).to(dtype)
    experts = list(dict.fromkeys(part.index[0] for part in entry.parts))
    rows = []
    for expert in experts:
        own = [part for part in entry.parts if part.index[0] == expert]
        rows.append(torch.cat([checkpoint.read(part.stored[part.dense_name].name).to(dtype) for part in own]))
    dense = torch.stack(rows) if experts[0] is not None else rows[0]
    return dense.transpose(-1, -2).contiguous() if entry.slot.transposed else dense


def put_in_place(model: nn.Module, entry: Entry, weights: list[Weight]) -> None:
    """Make the layer a packed one (once), then give it the weights."""
    slot = entry.slot
    parts = tuple(
        Part(part.layout, part.prefix if part.index != (None, None) else "", part.index)
        for part in entry.parts
        if part.layout is not None
    )
    path = slot.module
    module = model.get_submodule(path)
    if not isinstance(module, PackedWeight):
        module = packed_layer(module, slot)
        parent, _, own = path.rpartition(".")
        owner = model.get_submodule(parent)
        owner._parameters.pop(own, None)
        setattr(owner, own, module)
    if weights[0].device.type == "meta" and isinstance(module, PackedWeight) and module._parameters.get("_packed_0") is not None:
        return
    module.set_weights(parts, weights)


def packed_layer(module: Any, slot: skeleton.Slot) -> PackedWeight:
    """The packed twin of a layer; a subclass with behaviour of its own (scaled embeddings) keeps it."""
    if slot.kind == "experts":
        return QuantExperts(slot.transposed)
    bias = module._parameters.get("bias")
    if slot.kind in ("linear", "conv1d"):
        packed: PackedWeight = QuantLinear(slot.shape[1], slot.shape[0], bias)
    else:
        packed = QuantEmbedding(slot.shape[0], slot.shape[1], module.padding_idx)
    if type(module) not in (nn.Linear, nn.Embedding) and slot.kind != "conv1d":
        twin = type(f"Quant{type(module).__name__}", (type(module), type(packed)), {})
        state = {**module.__dict__, **packed.__dict__, "_buffers": module._buffers}
        packed = twin.__new__(twin)
        packed.__dict__.update(state)
    packed.train(module.training)
    return packed


# --- everything else ----------------------------------------------------------------------------------------------------


def load_plain(
    model: nn.Module, key: str, plan: Plan, checkpoint: Checkpoint, names: Names, device: torch.device | str
) -> None:
    """Norms, biases, buffers: read as they are, converted the way transformers converts dense tensors."""
    infos = plan.plain[key]
    converter = names.converter_of.get(key)
    if converter is None:
        tensor = checkpoint.read(infos[0].name)
    else:
        tensor = names.convert(converter, key, {info.name: checkpoint.read(info.name) for info in infos}, model)
    owner, _, own = key.rpartition(".")
    is_packed_bias = isinstance(model.get_submodule(owner), PackedWeight)
    if tensor.is_floating_point() and tensor.element_size() > 1 and not is_packed_bias and own in model.get_submodule(owner)._parameters:
        tensor = tensor.to(plan.dtype)
    set_tensor(model, key, tensor, device)


def set_tensor(model: nn.Module, key: str, tensor: Tensor, device: torch.device | str) -> None:
    """Replace a parameter or buffer of the model."""
    path, _, own = key.rpartition(".")
    module = model.get_submodule(path)
    tensor = tensor.to(device)
    if own in module._parameters:
        old = module._parameters[own]
        module._parameters[own] = nn.Parameter(tensor, requires_grad=bool(old is not None and old.requires_grad and tensor.is_floating_point()))
    else:
        module._buffers[own] = tensor


def finish(model: nn.Module, plan: Plan, placement: devices.Placement) -> None:
    """Tie weights, recompute buffers that are never stored, and freeze what is packed."""
    for module in model.modules():
        if isinstance(module, PackedWeight):
            module._is_hf_initialized = True
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    _tie_packed(model, plan)
    for key, buffer in list(_computed_buffers(model)):
        set_tensor(model, key, torch.empty(buffer.shape, dtype=buffer.dtype), placement.device_of(key))
    model.initialize_weights()  # type: ignore[operator]
    if any(tensor.device.type == "meta" for tensor in model.parameters()):
        model.tie_weights(recompute_mapping=False)  # type: ignore[operator]


def _computed_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    found = []
    for name, module in model.named_modules():
        for own in module._non_persistent_buffers_set:
            buffer = module._buffers.get(own)
            if buffer is not None and buffer.device.type == "meta":
                found.append((f"{name}.{own}" if name else own, buffer))
    return found


def _tie_packed(model: nn.Module, plan: Plan) -> None:
    """An output layer tied to a packed embedding multiplies with the same packed tensors."""
    for target, source in plan.tied.items():
        owner = model.get_submodule(source.rpartition(".")[0])
        module_path = target.rpartition(".")[0]
        module = model.get_submodule(module_path)
        if not isinstance(owner, PackedWeight) or isinstance(module, PackedWeight):
            continue
        linear = QuantLinear(module.in_features, module.out_features, module._parameters.get("bias"))  # type: ignore[arg-type]
        linear.share(owner)
        parent, _, own = module_path.rpartition(".")
        setattr(model.get_submodule(parent), own, linear)


def attach(model: Any, prepared: Prepared) -> None:
    """Mark the model the way users of transformers know it, and teach it to save itself packed."""
    from anybit.engine.save import bind

    model.anybit_plan = prepared.plan
    model.hf_quantizer = prepared.quantizer
    if prepared.quantizer is not None:
        model.is_quantized = True
        model.quantization_method = prepared.quantizer.quantization_config.quant_method
        model.config.quantization_config = prepared.quantizer.quantization_config
    if any(isinstance(module, QuantExperts) for module in model.modules()):
        _use_packed_experts(model)
    bind(model, prepared)


def _use_packed_experts(model: Any) -> None:
    """Route transformers' experts modules through `experts_forward`."""
    from transformers.integrations import moe

    from anybit.modules.experts import experts_forward

    moe.ALL_EXPERTS_FUNCTIONS.register("anybit", experts_forward)
    for module in model.modules():
        if hasattr(module, "config") and hasattr(module.config, "_experts_implementation"):
            module.config._experts_implementation = "anybit"
