"""Dense checkpoint -> quantized checkpoint, file to file: one weight in memory at a time."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anybit.containers import Checkpoint
from anybit.containers.shards import parse_size
from anybit.engine.budget import budget
from anybit.engine.bundling import bundle_for, write_bundle
from anybit.engine.calibration import LENGTH, SAMPLES, SEED, calibration_tokens, rounding_options
from anybit.engine.forecast import Forecast, forecast
from anybit.engine.hidden_states import Work
from anybit.engine.load import Prepared, Progress, prepare
from anybit.engine.lora_start import ITERATIONS, RANK, Start
from anybit.engine.materialize import make_weight
from anybit.engine.plan import Entry, Plan, refuse_uncalibrated
from anybit.engine.resume import Resume, difference, identity_of, source_identity
from anybit.engine.rotation import FUSED, Rotated, rotated, untied
from anybit.engine.rotation import steps as rotations
from anybit.engine.write import Job, Spec, write_checkpoint
from anybit.errors import CheckpointError, ConfigError
from anybit.weight.layout import join_name

Fold = Callable[[Tensor], Tensor]  # float32 -> float32 of one shape


def quantize(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    quantization_config: Any,
    *,
    calibration: Any = None,
    algorithm: str | None = None,
    algorithm_options: Mapping[str, Any] | None = None,
    rotate: str | bool = False,
    lora_init: str | None = None,
    rank: int = RANK,
    lora_iterations: int = ITERATIONS,
    samples: int | None = None,
    sequence_length: int | None = None,
    seed: int = SEED,
    dtype: torch.dtype | str | None = "auto",
    device: torch.device | str = "cpu",
    max_shard_size: int | str | None = None,
    force: bool = False,
    restart: bool = False,
    max_memory: int | str | None = None,
    announce: Callable[[Forecast], bool] | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
    hub_options: Mapping[str, Any] | None = None,
) -> Plan:
    """Quantize the dense checkpoint `src` (a folder or hub id) to the new folder `dst`; returns what was done.

    Without `calibration`, memory stays at one weight, whatever the size of the model. With it (text, a list of texts, a .txt,
    .jsonl or .parquet file, or token ids [samples, length]; `samples` rows of `sequence_length` tokens are drawn with `seed`,
    128 of 512 unless the configuration says more), the method's calibrated `algorithm`, or the one named (several: "awq+gptq"),
    sees what each layer's inputs are; memory then is one decoder block and the samples' hidden states. A configuration with
    `dataset=[texts]` is calibrated with those.
    `algorithm_options`: arguments of the algorithm that rounds, e.g. {"mse": 2.4} of gptq. `rotate`: "r1+r2" (True) turns the
    weights by Hadamard matrices first, see `rotation`; NotRepresentable names a layer that cannot be turned. `dtype`: of what
    stays dense (default: as stored); `device`: where weights are quantized. `max_memory` ("8GB"): what the run may take beside
    the libraries. `lora_init` "loftq": DST/loftq_init gets a LoRA adapter of this `rank` that makes up for what is lost, found in
    `lora_iterations` turns where no calibration data rounds (see `lora_start`).
    `announce` is told first what the run will take, and may return False to leave it at that.
    The source is never touched; `dst` appears only when it is complete. What a broken run did lies in DST.partial, and the same
    call goes on from there, to the same bytes; `restart` drops it.
    Raises ConfigError (also for a source that is already quantized), CheckpointError, FileExistsError without `force`.
    """
    if quantization_config is None:
        raise ConfigError("quantize needs a configuration, e.g. BitsAndBytesConfig(load_in_4bit=True)")
    calibration, quantization_config, tokenizer = _asked_for(calibration, quantization_config)
    start = None if lora_init is None else Start.of(lora_init, rank, lora_iterations, algorithm)
    options: dict[str, Any] = {
        "dtype": dtype, "device_map": device, "allow_pickle": allow_pickle, "hub_options": hub_options,
    }  # fmt: skip
    wanted, seen = rotations(rotate), Rotated()
    if wanted:
        plain = prepare(src, **options)
        seen = rotated(plain, wanted)
        options |= {"through": seen.through, "config": untied(plain.model.config, seen)}
    ready = prepare(src, quantization_config, calibrated=calibration is not None, **options)
    assert ready.quantizer is not None
    if ready.quantizer.pre_quantized:
        raise ConfigError(
            f"{src} is already quantized with {ready.quantizer.method_name}; quantize starts from dense weights. "
            "Dequantize it first (anybit dequantize), or start from the original checkpoint"
        )
    ready.plan.notes += seen.notes
    if start is not None:
        start.check(ready.plan.entries)
    keep = dtype in ("auto", None)
    jobs: list[Job] = []
    done: set[str] = set()
    work = Work()
    tokens: Tensor | None = None
    name, rounding = algorithm, dict[str, Any]()
    source = source_identity(ready.checkpoint, ready.folder)
    cap = None if max_memory is None else parse_size(max_memory, "max_memory")
    if calibration is not None:
        from anybit.engine.calibrated import calibrated_jobs

        asked = ready.quantizer.calibration_size()
        tokens = calibration_tokens(
            calibration, ready.folder, samples=samples or asked[0] or SAMPLES, length=sequence_length or asked[1] or LENGTH,
            seed=seed, tokenizer=tokenizer,
        )  # fmt: skip
        name = algorithm or ready.quantizer.calibrated_algorithm
        rounding = rounding_options(ready.quantizer, name, algorithm_options)
        own = budget(ready, tokens, cap, name, rounding)
        jobs, done = calibrated_jobs(
            ready, tokens, algorithm, torch.device(device), None if keep else ready.plan.dtype, algorithm_options, work, own.batch
        )  # fmt: skip
    elif algorithm is not None or algorithm_options:
        raise ConfigError(f"algorithm={algorithm!r} is run on calibration data; pass calibration=")
    else:
        refuse_uncalibrated(ready.plan)
        own = budget(ready, None, cap)
    for entry in ready.plan.entries:
        if entry.slot.parameter in done:
            continue
        if entry.action == "quantize":
            jobs.append(_quantize_job(ready, entry, torch.device(device), start))
        else:
            jobs += [copy_job(ready.checkpoint, info, None if keep else ready.plan.dtype) for info in stored_of(entry)]
    for infos in ready.plan.plain.values():
        jobs += [copy_job(ready.checkpoint, info, None if keep else ready.plan.dtype) for info in infos]
    config = ready.quantizer.model_config({**source_config(ready), **seen.config})
    if not keep:
        config["dtype"] = str(ready.plan.dtype).removeprefix("torch.")
    jobs = _once(jobs)
    if announce is not None and not announce(forecast(ready, tokens, own, jobs, name, rounding, done)):
        ready.checkpoint.release()
        return ready.plan
    layouts = {
        part.prefix: part.layout for entry in ready.plan.entries for part in entry.parts if part.layout is not None
    }
    bundled = bundle_for(ready.quantizer, ready, jobs, src)
    settings = {
        "configuration": ready.quantizer.quantization_config.to_dict(), "dtype": str(dtype), "device": str(device),
        "max_shard_size": max_shard_size, "algorithm": algorithm, "batch": own.batch,
        "algorithm_options": dict(algorithm_options or {}), "rotate": "+".join(wanted),
        "lora_init": None if start is None else [start.rank, start.iterations],
        "calibration": None if tokens is None else [*tokens.shape, hashlib.sha256(tokens.numpy().tobytes()).hexdigest()],
    }  # fmt: skip
    resume = _resume(ready, source, settings, jobs, work, restart)
    if bundled is not None:
        write_bundle(dst, jobs, bundled, max_shard_size=max_shard_size, force=force, progress=progress, resume=resume)
        ready.checkpoint.release()
        _adapt(start, dst, src, options, wanted, force, progress)
        return ready.plan
    metadata = ready.quantizer.file_metadata(layouts, [name for job in jobs for name in job.specs])
    write_checkpoint(
        dst, jobs, config, metadata=metadata, max_shard_size=max_shard_size, copy_from=ready.side_files(),
        extra_files={**ready.extra_files(), **ready.quantizer.made_files(layouts)},
        force=force, progress=progress, resume=resume,
    )  # fmt: skip
    ready.checkpoint.release()
    _adapt(start, dst, src, options, wanted, force, progress)
    return ready.plan


def _adapt(
    start: Start | None,
    dst: Any,
    src: Any,
    options: Mapping[str, Any],
    turned: Sequence[str],
    force: bool,
    progress: Any,
) -> None:
    """The adapter beside the finished base. What is rotated at run time is not rotated for the adapter."""
    if start is None:
        return
    from anybit.engine.loftq import lora_init

    own = {name: options[name] for name in ("allow_pickle", "hub_options")}
    fused = tuple(step for step in turned if step in FUSED)
    through = rotated(prepare(src, **own), fused).through if fused else None
    lora_init(
        dst, src, rank=start.rank, device=options["device_map"], force=force, progress=progress, through=through, **own
    )


def _resume(
    ready: Prepared,
    source: Mapping[str, Any],
    settings: Mapping[str, Any],
    jobs: list[Job],
    work: Work,
    restart: bool,
) -> Resume:
    """What lets another run go on with this one."""
    entries = {entry.slot.parameter: entry for entry in ready.plan.entries}

    def begin(folder: Path) -> None:
        work.named = folder

    def take(notes: Mapping[str, Any]) -> None:
        for name, reason in notes.items():
            entries[name].reason = reason

    def check() -> None:
        found = difference(dict(source), source_identity(ready.checkpoint, ready.folder))
        if found:
            raise CheckpointError(
                f"the source {ready.folder} was changed while it was read: {found}. Quantize it again when it is at rest"
            )

    specs = [(name, spec) for job in jobs for name, spec in job.specs.items()]
    return Resume(
        identity_of(source, settings, specs), restart, begin, work.forget,
        lambda: {name: entry.reason for name, entry in entries.items() if entry.reason}, take, check,
    )  # fmt: skip


def _asked_for(calibration: Any, config: Any) -> tuple[Any, Any, Any]:
    """Calibration data, configuration and tokenizer: a configuration may carry its own texts, which no checkpoint keeps."""
    texts = getattr(config, "dataset", None)
    tokenizer = getattr(config, "tokenizer", None)
    if texts is None and tokenizer is None:
        return calibration, config, None
    if isinstance(texts, str):
        raise ConfigError(
            f"{type(config).__name__} asks for the data set {texts!r}, which would have to be downloaded; pass its text: "
            "calibration=FILE, or dataset=[texts]"
        )
    own = copy.copy(config)
    own.dataset = own.tokenizer = None
    if texts is not None and not texts:
        raise ConfigError(f"{type(config).__name__} has an empty dataset; give it texts, or leave it out")
    return (texts if calibration is None else calibration), own, tokenizer


def _quantize_job(ready: Prepared, entry: Entry, device: torch.device, start: Start | None = None) -> Job:
    specs: dict[str, Spec] = {}
    shrinking: set[str] = set()
    for part in entry.parts:
        assert part.layout is not None
        for own, spec in part.layout.specs().items():
            specs[join_name(part.prefix, own)] = spec
        shrinking |= {join_name(part.prefix, own) for own in part.layout.shrinking()}

    def make() -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        for part in entry.parts:
            assert part.layout is not None
            weight = (
                make_weight(ready.model, entry, part, ready.checkpoint, device)
                if start is None
                else start.base(ready, entry, part, device)
            )
            for own, tensor in part.layout.encode(weight).items():
                made[join_name(part.prefix, own)] = tensor.cpu()
        ready.checkpoint.release()
        return made

    return Job(entry.slot.module, specs, make, frozenset(shrinking))


# --- shared with dequantize ------------------------------------------------------------------------------------------------


def stored_of(entry: Entry) -> list[Any]:
    """Every stored tensor of a weight."""
    return [info for part in entry.parts for info in part.stored.values()]


def copy_job(checkpoint: Checkpoint, info: Any, dtype: torch.dtype | None, fold: Fold | None = None) -> Job:
    """A stored tensor under its own name; floating-point numbers become `dtype` unless it is None. `fold` changes them."""
    stored: torch.dtype = getattr(torch, info.dtype)
    target = dtype if dtype is not None and stored.is_floating_point and stored.itemsize > 1 else stored

    def make() -> dict[str, Tensor]:
        tensor = checkpoint.read(info.name)
        return {info.name: (tensor if fold is None else fold(tensor.to(torch.float32))).to(target)}

    return Job(info.name, {info.name: (str(target).removeprefix("torch."), tuple(info.shape))}, make)


def source_config(ready: Prepared) -> dict[str, Any]:
    """config.json of the source, as a dictionary; the model class's own when there is none."""
    stored = ready.stored_config()
    return stored if stored is not None else dict(ready.model.config.to_diff_dict())


def _once(jobs: list[Job]) -> list[Job]:
    """A stored tensor that several weights are made of is copied once."""
    seen: set[str] = set()
    kept = []
    for job in jobs:
        if not seen.issuperset(job.specs):
            kept.append(job)
        seen.update(job.specs)
    return kept
