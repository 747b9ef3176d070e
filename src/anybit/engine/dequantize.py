"""Packed weights -> dense ones, in a loaded model or file to file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from anybit.engine import skeleton
from anybit.engine.load import Prepared, Progress, prepare
from anybit.engine.materialize import assembled, dense_part, make_weight, oriented
from anybit.engine.names import WHOLE, ExpertBiases
from anybit.engine.plan import Entry, Plan, PlannedPart
from anybit.engine.quantize import Fold, copy_job, source_config, stored_of
from anybit.engine.write import Job, Spec, write_checkpoint
from anybit.errors import ConfigError
from anybit.modules import PackedWeight, QuantExperts, TiedLinear
from anybit.quantizers.attachments import detach
from anybit.quantizers.checkpoint_config import KEY
from anybit.weight.layout import join_name

# keys of a model configuration that say it is quantized
QUANTIZED = (KEY, "compression_config", "quantization")


def dequantize(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = "auto",
    device: torch.device | str = "cpu",
    max_shard_size: int | str | None = None,
    force: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
    hub_options: Mapping[str, Any] | None = None,
    changes: Mapping[str, Fold] | None = None,
) -> Plan:
    """Write the quantized checkpoint `src` as a dense one to the new folder `dst`, one weight in memory at a time.

    `dtype`: of the dense weights (default: the model's). `changes`: of weights, by parameter. Raises ConfigError for a
    source that is not quantized, CheckpointError, FileExistsError without `force`.
    """
    ready = prepare(src, dtype=dtype, device_map=device, allow_pickle=allow_pickle, hub_options=hub_options)
    if ready.quantizer is None:
        raise ConfigError(f"{src} is not quantized: its configuration has no {KEY}. There is nothing to dequantize")
    jobs: list[Job] = []
    folds = {**ready.quantizer.folds, **(changes or {})}
    for entry in ready.plan.entries:
        fold = folds.get(entry.slot.parameter)
        if entry.parts[0].index[0] is not None and ready.names.stores_stack(entry.slot):
            jobs.append(_dense_stack_job(ready, entry, torch.device(device), fold))
        elif entry.action == "dense":
            jobs += [copy_job(ready.checkpoint, info, ready.plan.dtype, fold) for info in stored_of(entry)]
        else:
            jobs += [_dense_job(ready, entry, part, torch.device(device), fold) for part in entry.parts]
    for key, infos in ready.plan.plain.items():
        biases = ready.plan.conversions.get(key)
        if isinstance(biases, ExpertBiases):
            jobs.append(joined_biases(ready, biases))
        elif key not in ready.quantizer.attached:
            jobs += [copy_job(ready.checkpoint, info, ready.plan.dtype, folds.get(key)) for info in infos]
    # what several weights are made of is copied once
    jobs = list({next(iter(job.specs)): job for job in jobs}.values())
    config = without_quantization(source_config(ready))
    for key in ("torch_dtype", *type(ready.quantizer.quantization_config).claims):
        config.pop(key, None)
    config["dtype"] = str(ready.plan.dtype).removeprefix("torch.")
    dropped = type(ready.quantizer.quantization_config).side_files
    write_checkpoint(
        dst, jobs, config, max_shard_size=max_shard_size, copy_from=ready.side_files(dropped),
        extra_files=ready.extra_files(), force=force, progress=progress,
    )  # fmt: skip
    ready.checkpoint.release()
    return ready.plan


def without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """A model configuration without any quantization of it or of its parts."""
    return {
        name: without_quantization(value) if isinstance(value, dict) and name.endswith("config") else value
        for name, value in config.items()
        if name not in QUANTIZED
    }


def _dense_job(ready: Prepared, entry: Entry, part: PlannedPart, device: torch.device, fold: Fold | None) -> Job:
    """The dense weight of one stored unit, under the name and in the orientation it has in a dense checkpoint."""
    assert part.layout is not None
    if "*" in part.dense_prefix:
        return _dense_experts_job(ready, entry, part, device, fold)
    whole = entry.slot.kind == "experts" and part.index == WHOLE
    name = part.dense_prefix if whole else join_name(part.dense_prefix, "weight")
    turned = entry.slot.transposed and part.index == WHOLE
    shape = part.layout.shape
    shape = (*shape[:-2], shape[-1], shape[-2]) if turned else shape
    dtype = ready.plan.dtype

    def make() -> dict[str, Tensor]:
        weight = make_weight(ready.model, entry, part, ready.checkpoint, device)
        dense = weight.to_dense(dtype) if fold is None else fold(weight.to_dense(torch.float32)).to(dtype)
        ready.checkpoint.release()
        return {name: (dense.transpose(-1, -2).contiguous() if turned else dense).cpu()}

    specs: dict[str, Spec] = {name: (str(dtype).removeprefix("torch."), tuple(shape))}
    return Job(part.prefix, specs, make)


def _dense_stack_job(ready: Prepared, entry: Entry, device: torch.device, fold: Fold | None) -> Job:
    """The stack of experts that were stored one by one, as the model's class and its dense checkpoints have it."""
    dtype = ready.plan.dtype

    def own(part: PlannedPart) -> Tensor:
        if part.layout is None:
            return dense_part(ready.model, entry, part, ready.checkpoint).to(dtype)
        weight = make_weight(ready.model, entry, part, ready.checkpoint, device)
        return weight.to_dense(dtype if fold is None else torch.float32)

    def make() -> dict[str, Tensor]:
        dense = assembled((part, own(part)) for part in entry.parts)
        ready.checkpoint.release()
        return {name: oriented(entry, dense if fold is None else fold(dense).to(dtype)).cpu()}

    name = stack_name(entry)
    *lead, rows, columns = entry.slot.shape
    shape = (*lead, columns, rows) if entry.slot.transposed else entry.slot.shape
    return Job(name, {name: (str(dtype).removeprefix("torch."), tuple(shape))}, make)


def stack_name(entry: Entry) -> str:
    """What the checkpoint would call the stack of experts that are stored one by one."""
    start = entry.parts[0].dense_prefix.rpartition(".experts.")[0]
    return f"{start}.experts.{entry.slot.parameter.rpartition('.')[2]}"


def joined_biases(ready: Prepared, biases: ExpertBiases) -> Job:
    """Biases of experts that were stored one by one, as the model has them."""
    (first, _), *_ = biases.sources
    name = f"{first.rpartition('.experts.')[0]}.experts.{biases.renamed.rpartition('.')[2]}"
    dtype = ready.plan.dtype

    def make() -> dict[str, Tensor]:
        return {name: biases.run(ready.checkpoint.read, ready.model)[biases.renamed].to(dtype)}

    shape = tuple(ready.names.state[biases.renamed].shape)
    return Job(name, {name: (str(dtype).removeprefix("torch."), shape)}, make)


def _dense_experts_job(
    ready: Prepared, entry: Entry, part: PlannedPart, device: torch.device, fold: Fold | None
) -> Job:
    """The dense weights of a unit that holds all experts, each under its own name."""
    assert part.layout is not None
    experts, *shape = part.layout.shape
    names = [join_name(part.dense_prefix.replace("*", str(expert)), "weight") for expert in range(experts)]
    dtype = ready.plan.dtype

    def make() -> dict[str, Tensor]:
        weight = make_weight(ready.model, entry, part, ready.checkpoint, device)
        dense = weight.to_dense(dtype) if fold is None else fold(weight.to_dense(torch.float32)).to(dtype)
        ready.checkpoint.release()
        return {name: dense[expert].cpu() for expert, name in enumerate(names)}

    return Job(part.prefix, dict.fromkeys(names, (str(dtype).removeprefix("torch."), tuple(shape))), make)


def dequantize_model(model: Any, dtype: torch.dtype | None = None) -> Any:
    """Make every weight of a loaded model dense, one at a time, in `dtype` (default: the model's); returns the model."""
    plan: Plan = model.anybit_plan
    target = dtype if dtype is not None else plan.dtype
    config = model.config
    stored = config.__dict__.pop(KEY, None)
    try:
        fresh = skeleton.build(config, type(model), dtype=target)
    finally:
        if stored is not None:
            setattr(config, KEY, stored)
    quantizer = model.__dict__.get("hf_quantizer")
    folds = quantizer.folds if quantizer is not None else {}
    turned = {entry.slot.module for entry in plan.entries if entry.slot.transposed}  # the class stores [in, out]
    packed_names = {name for name, module in model.named_modules() if isinstance(module, PackedWeight)}
    tied = [(name, module) for name, module in model.named_modules() if isinstance(module, TiedLinear)]
    for name, module in list(model.named_modules()):
        if not isinstance(module, PackedWeight):
            continue
        fold = folds.get(f"{name}.weight")
        dense = module.dequantize(target) if fold is None else fold(module.dequantize(torch.float32)).to(target)
        parent, _, own = name.rpartition(".")
        owner = model.get_submodule(parent)
        if isinstance(module, QuantExperts):
            del owner._modules[own]
            owner._parameters[own] = nn.Parameter(dense)
            order = [*fresh.get_submodule(parent)._parameters, *owner._parameters]
            owner._parameters = {
                key: owner._parameters[key] for key in dict.fromkeys(order) if key in owner._parameters
            }
        else:
            layer: Any = fresh.get_submodule(name)
            if name in turned:
                dense = dense.T.contiguous()
            _fill(layer, dense, module)
            setattr(owner, own, layer)
    for name, module in tied:
        parent, _, own = name.rpartition(".")
        layer = fresh.get_submodule(name)
        _fill(layer, torch.empty(0), module)
        layer.weight = model.get_parameter(plan.tied[f"{name}.weight"])
        setattr(model.get_submodule(parent), own, layer)
    for key, fold in folds.items():
        if key.rpartition(".")[0] not in packed_names or key.endswith(".bias"):
            parameter = model.get_parameter(key)
            parameter.data = fold(parameter.data.to(torch.float32)).to(parameter.dtype)
    if quantizer is not None:
        detach(model, quantizer.attached)
    if dtype is not None:
        model.to(dtype)
    for key in (*QUANTIZED[1:], *(type(quantizer.quantization_config).claims if quantizer is not None else ())):
        config.__dict__.pop(key, None)
    for attribute in ("save_pretrained", "dequantize", "anybit_plan", "_anybit_source"):
        model.__dict__.pop(attribute, None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    return model


def _fill(layer: nn.Module, dense: Tensor, packed: nn.Module) -> None:
    """Give a layer on the meta device its weight and what the packed layer holds beside it."""
    layer._parameters["weight"] = nn.Parameter(dense)
    for own, parameter in packed._parameters.items():
        if parameter is not None and not own.startswith(("_packed_", "_extra_")):
            layer._parameters[own] = nn.Parameter(
                parameter.detach().to(dense.dtype), requires_grad=parameter.requires_grad
            )
    layer._buffers.update(packed._buffers)
    layer.train(packed.training)
