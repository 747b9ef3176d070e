"""Read a checkpoint into a packed model, one weight at a time."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anybit._memory import give_back_free_memory, without_collections
from anybit.containers import Checkpoint
from anybit.engine import devices, skeleton, staging
from anybit.engine.materialize import Alike, attach_scheme, load_entry, load_plain, set_tensor, tie
from anybit.engine.names import Names
from anybit.engine.plan import Plan, build_plan, refuse_uncalibrated
from anybit.engine.source import locate, read_quantizer, recognize_quantizer, unbundled
from anybit.engine.write import side_files
from anybit.errors import InvalidOption, did_you_mean
from anybit.kernels import Kernel
from anybit.modules import PackedWeight
from anybit.modules.dense import quicken
from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.bundle import Bundle
from anybit.quantizers.checkpoint_config import read_json

TRIM_EVERY_BYTES = 32 << 20
Progress = Callable[[str, int, int], None]  # (module, bytes done, bytes in all)


def load(
    path: str | os.PathLike[str],
    quantization_config: Any = None,
    *,
    auto_class: Any = None,
    config: Any = None,
    device_map: Any = None,
    dtype: torch.dtype | str | None = "auto",
    max_memory: Mapping[Any, Any] | None = None,
    offload_folder: str | None = None,
    calibration: Any = None,
    rotate: str | bool = False,
    dequantize: bool = False,
    strict: bool = True,
    allow_pickle: bool = False,
    progress: Progress | None = None,
    hub_options: Mapping[str, Any] | None = None,
    **model_options: Any,
) -> nn.Module:
    """A model whose quantized weights stay packed, on any device.

    `path`: a folder, a .safetensors file beside a config.json, or a hub id. `quantization_config` on a dense checkpoint
    quantizes while loading, with `calibration` data (as `quantize` takes them) or the configuration's own `dataset` if there are
    some; on a quantized one only its loading attributes count. `rotate`: "r1+r2" (True) turns dense weights by Hadamard matrices
    before they are quantized, see `rotation`. `device_map`: None, "auto" and the like,
    a device, or a dict of module path to device or "disk". `dequantize`: make every weight dense. `strict` False names
    unexpected tensors in the plan instead of raising, and lets the model class initialise missing ones. `allow_pickle`: read
    .bin files through a restricted reader.
    Raises ConfigError, CheckpointError, NoKernel.
    """
    options: dict[str, Any] = {"hub_options": hub_options, **model_options}
    if quantization_config is not None:
        from anybit.engine.calibrated_load import load_calibrated, wants_data

        if wants_data(locate(path, allow_pickle=allow_pickle, **(hub_options or {})), quantization_config, calibration):
            return load_calibrated(
                path, quantization_config, calibration, auto_class=auto_class, config=config, device_map=device_map, dtype=dtype,
                max_memory=max_memory, offload_folder=offload_folder, rotate=rotate, dequantize=dequantize, strict=strict,
                allow_pickle=allow_pickle, progress=progress, **options,
            )  # fmt: skip
    turned: list[str] = []
    if rotate:
        from anybit.engine.rotation import rotated, steps, untied

        plain = prepare(path, auto_class=auto_class, config=config, dtype=dtype, allow_pickle=allow_pickle, **options)
        seen = rotated(plain, steps(rotate))
        own, turned = untied(plain.model.config, seen), seen.notes
        config = config if own is None else own
        options["through"] = seen.through
    prepared = prepare(
        path, quantization_config, auto_class=auto_class, config=config, dtype=dtype, strict=strict,
        device_map=device_map, allow_pickle=allow_pickle, **options,
    )  # fmt: skip
    prepared.plan.notes += turned
    refuse_uncalibrated(prepared.plan)
    model, plan, checkpoint = prepared.model, prepared.plan, prepared.checkpoint
    placement = place(prepared, device_map, max_memory)
    done, total = 0, max(plan.bytes_on_disk, 1)
    offloader = devices.Offloader(placement, offload_folder)
    kernels: dict[tuple[Alike, torch.device], Kernel] = {}
    for entry in plan.entries:
        target = placement.device_of(entry.slot.module)
        load_entry(model, entry, plan, checkpoint, target if target != "disk" else torch.device("cpu"), kernels)
        if target == "disk":
            offloader.move_out(model, entry.slot.module)
        before, done = done, done + entry.bytes_stored
        if done // TRIM_EVERY_BYTES > before // TRIM_EVERY_BYTES:
            give_back_free_memory()
        if progress is not None:
            progress(entry.slot.module, done, total)
    for key in plan.plain:
        target = placement.device_of(key)
        load_plain(model, key, plan, checkpoint, "cpu" if target == "disk" else target)
        if target == "disk":
            offloader.move_out(model, key)
    _finish(model, plan, placement)
    checkpoint.release()
    staging.release()
    _mark(model, prepared)
    offloader.dispatch(model)
    # transformers' spelling of the same wish: an option of several configuration classes
    if dequantize or getattr(getattr(prepared.quantizer, "quantization_config", None), "dequantize", False):
        from anybit.engine.dequantize import dequantize_model

        dequantize_model(model)
    return model


def plan(
    path: str | os.PathLike[str],
    quantization_config: Any = None,
    *,
    device_map: Any = None,
    max_memory: Mapping[Any, Any] | None = None,
    **options: Any,
) -> Plan:
    """What `load` with the same arguments would do, from headers alone. Raises what `load` would raise."""
    prepared = prepare(path, quantization_config, device_map=device_map, **options)
    refuse_uncalibrated(prepared.plan)
    place(prepared, device_map, max_memory)
    prepared.checkpoint.release()
    return prepared.plan


@dataclass(frozen=True)
class Prepared:
    """A plan and what it was made from."""

    model: Any
    plan: Plan
    checkpoint: Checkpoint
    names: Names
    quantizer: HfQuantizer | None
    folder: Path
    own_config: bool = True  # the model's configuration is the one in the folder, or in the bundle
    bundle: Bundle | None = None  # what the checkpoint's own files hold instead of files beside them

    def stored_config(self) -> dict[str, Any] | None:
        """What config.json holds, or would hold; None without one."""
        if self.bundle is not None:
            return copy.deepcopy(dict(self.bundle.config))
        file = self.folder / "config.json"
        return read_json(file) if file.is_file() else None

    def side_files(self, drop: Iterable[str] = ()) -> list[Path]:
        """Files that go along with the model; `drop`: names that no longer hold."""
        return side_files(self.folder, drop) if self.bundle is None else []

    def extra_files(self) -> dict[str, bytes]:
        """The same for files that a bundle holds inside, by name."""
        return {} if self.bundle is None else self.bundle.side_files()


@without_collections()
def prepare(
    path: str | os.PathLike[str],
    quantization_config: Any = None,
    *,
    auto_class: Any = None,
    config: Any = None,
    dtype: torch.dtype | str | None = "auto",
    strict: bool = True,
    device_map: Any = None,
    allow_pickle: bool = False,
    hub_options: Mapping[str, Any] | None = None,
    calibrated: bool = False,
    through: Callable[[Checkpoint, HfQuantizer | None], Checkpoint] | None = None,
    **model_options: Any,
) -> Prepared:
    """Everything `load` decides before it reads data: the backend first, then the model without weights, then the plan.

    `calibrated`: there are data to measure static scales on. `through`: how the checkpoint is seen, e.g. rotated.
    """
    location = locate(path, allow_pickle=allow_pickle, **(hub_options or {}))
    folder = location if location.is_dir() else location.parent
    quantizer = read_quantizer(location, quantization_config)
    device = devices.main_device(device_map)
    if quantizer is not None:
        quantizer.validate_environment(device_map=device_map, weights_only=True)
    weights = location if quantizer is None else quantizer.weights_in(location)
    packages = quantizer.pickled_packages if quantizer is not None else ()
    checkpoint: Any = Checkpoint.open(weights, allow_pickle=allow_pickle, packages=packages)
    if quantizer is None or not quantizer.pre_quantized:
        shown = recognize_quantizer(location, checkpoint.tensors, quantization_config)
        if shown is not None:
            shown.validate_environment(device_map=device_map, weights_only=True)
            quantizer = shown
    checkpoint, bundle = unbundled(checkpoint, quantizer)
    if quantizer is not None:
        checkpoint = quantizer.spelled_out(checkpoint)
    if through is not None:
        checkpoint = through(checkpoint, quantizer)
    own_config = config is None
    if config is None:
        config = skeleton.read_config(folder) if bundle is None else skeleton.config_of(bundle.config)
    wanted = _dtype(dtype, config, checkpoint)
    if quantizer is not None:
        wanted = quantizer.update_dtype(wanted)
    model = skeleton.build(config, auto_class, dtype=wanted, **model_options)
    slots = skeleton.slots(model)
    names = Names(model, slots, quantizer.other_names) if quantizer is not None else Names(model, slots)
    if quantizer is not None:
        if quantizer.pre_quantized:
            slots.update(skeleton.packed_routers(model, checkpoint.tensors, names.path_of))
        quantizer.attach(model, checkpoint, names.path_of)
        names.state = dict(model.state_dict())
        quantizer.calibrated = calibrated
        quantizer.begin(model, list(slots.values()))
    made = build_plan(checkpoint, model, slots, names, quantizer, wanted, device, strict, calibrated)
    own_config = own_config and type(model).__name__ in (config.architectures or [type(model).__name__])
    return Prepared(model, made, checkpoint, names, quantizer, folder, own_config, bundle)


@without_collections()
def place(prepared: Prepared, device_map: Any, max_memory: Mapping[Any, Any] | None = None) -> devices.Placement:
    """Put packed layers without numbers into the model, and decide which device each weight gets."""
    known: dict[Alike, PackedWeight] = {}
    for entry in prepared.plan.entries:
        if entry.action != "dense":
            attach_scheme(prepared.model, entry, known)
    placement = devices.place(prepared.model, device_map, max_memory)
    for entry in prepared.plan.entries:
        entry.device = str(placement.device_of(entry.slot.module))
    return placement


def _dtype(dtype: torch.dtype | str | None, config: Any, checkpoint: Checkpoint) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in ("auto", None):
        found = getattr(torch, str(dtype).removeprefix("torch."), None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            known = ("auto", "float32", "bfloat16", "float16")
            raise InvalidOption(f"dtype is {dtype!r}; use one of {', '.join(known)}{did_you_mean(str(dtype), known)}")
        return found
    return config.dtype if isinstance(config.dtype, torch.dtype) else _most_stored_dtype(checkpoint)


def _most_stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The floating dtype that most stored bytes have, for configurations that name none."""
    count: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        if info.dtype in ("float16", "bfloat16", "float32"):
            count[info.dtype] = count.get(info.dtype, 0) + info.nbytes
    found: torch.dtype = getattr(torch, max(count, key=lambda name: count[name], default="float32"))
    return found


# --- after the weights -----------------------------------------------------------------------------------------------------


def _finish(model: Any, plan: Plan, placement: devices.Placement) -> None:
    """Tie weights, and compute buffers that are never stored."""
    for module in model.modules():
        # a layer may have buffers to compute (Gemma's embed_scale); its weight says for itself that it needs nothing
        if isinstance(module, PackedWeight) and not module._non_persistent_buffers_set:
            module._is_hf_initialized = True  # type: ignore[assignment]
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor._is_hf_initialized = True
    for key in plan.missing:
        shape, target = model.get_parameter_or_buffer(key).shape, placement.device_of(key)
        empty = torch.empty(shape, dtype=plan.dtypes[key])
        set_tensor(model, key, empty, "cpu" if target == "disk" else target)
    tie(model, plan)
    for name, module in model.named_modules():
        for own in module._non_persistent_buffers_set:
            buffer = module._buffers.get(own)
            if buffer is not None and buffer.device.type == "meta":
                key = f"{name}.{own}" if name else own
                target = placement.device_of(key)
                set_tensor(
                    model, key, torch.empty(buffer.shape, dtype=buffer.dtype), "cpu" if target == "disk" else target
                )
    model.initialize_weights()
    quicken(model)


def _mark(model: Any, prepared: Prepared) -> None:
    """Mark the model the way users of transformers know it, and teach it to save and dequantize itself."""
    from anybit.engine.save import bind

    quantizer = prepared.quantizer
    if quantizer is not None:
        quantizer.preprocess_model(model)
    model.anybit_plan = prepared.plan
    model.config._name_or_path = model.name_or_path = prepared.plan.path
    if model.can_generate() and prepared.bundle is not None:
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig(**prepared.bundle.generation)
    elif model.can_generate() and (prepared.folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(prepared.folder)
    packed = [module for module in model.modules() if isinstance(module, PackedWeight)]
    if any(hasattr(module, "grouped") for module in packed):
        use_packed_experts(model)
    bind(model, prepared)
    if quantizer is not None:
        quantizer.postprocess_model(model)


def use_packed_experts(model: Any) -> None:
    """Route transformers' experts modules through `experts_forward`."""
    from transformers.integrations import moe

    from anybit.modules.experts import experts_forward

    moe.ALL_EXPERTS_FUNCTIONS.register("anybit", experts_forward)
    for module in model.modules():
        if hasattr(module, "config") and hasattr(module.config, "_experts_implementation"):
            module.config._experts_implementation = "anybit"
