"""Dense checkpoint -> quantized checkpoint, file to file: one weight in memory at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from anybit import algorithms
from anybit.containers import Checkpoint
from anybit.engine.calibration import LENGTH, SAMPLES, SEED, Calibrator, Observed, calibration_tokens
from anybit.engine.load import Prepared, Progress, prepare
from anybit.engine.materialize import dense_part, make_weight
from anybit.engine.plan import Entry, Plan
from anybit.engine.write import Job, Spec, write_checkpoint
from anybit.errors import ConfigError
from anybit.weight import Layout, Weight
from anybit.weight.layout import join_name

Fold = Callable[[Tensor], Tensor]  # float32 -> float32 of one shape


def quantize(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    quantization_config: Any,
    *,
    calibration: Any = None,
    algorithm: str | None = None,
    samples: int = SAMPLES,
    sequence_length: int = LENGTH,
    seed: int = SEED,
    dtype: torch.dtype | str | None = "auto",
    device: torch.device | str = "cpu",
    max_shard_size: int | str | None = None,
    force: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
    hub_options: Mapping[str, Any] | None = None,
) -> Plan:
    """Quantize the dense checkpoint `src` (a folder or hub id) to the new folder `dst`; returns what was done.

    Without `calibration`, memory stays at one weight, whatever the size of the model. With it (text, a list of texts, a .txt,
    .jsonl or .parquet file, or token ids [samples, length]; `samples` rows of `sequence_length` tokens are drawn with `seed`),
    the method's calibrated `algorithm`, or the one named, sees what each layer's inputs are; memory then is one decoder block
    and the samples' hidden states. `dtype`: of what stays dense (default: as stored);
    `device`: where weights are quantized. The source is never touched; `dst` appears only when it is complete.
    Raises ConfigError (also for a source that is already quantized), CheckpointError, FileExistsError without `force`.
    """
    if quantization_config is None:
        raise ConfigError("quantize needs a configuration, e.g. BitsAndBytesConfig(load_in_4bit=True)")
    ready = prepare(
        src, quantization_config, dtype=dtype, device_map=device, allow_pickle=allow_pickle, hub_options=hub_options
    )
    assert ready.quantizer is not None
    if ready.quantizer.pre_quantized:
        raise ConfigError(
            f"{src} is already quantized with {ready.quantizer.method_name}; quantize starts from dense weights. "
            "Dequantize it first (anybit dequantize), or start from the original checkpoint"
        )
    keep = dtype in ("auto", None)
    jobs: list[Job] = []
    done: set[str] = set()
    if calibration is not None:
        tokens = calibration_tokens(calibration, ready.folder, samples=samples, length=sequence_length, seed=seed)
        jobs, done = calibrated_jobs(ready, tokens, algorithm, torch.device(device))
    elif algorithm is not None:
        raise ConfigError(f"algorithm={algorithm!r} is run on calibration data; pass calibration=")
    for entry in ready.plan.entries:
        if entry.slot.parameter in done:
            continue
        if entry.action == "quantize":
            jobs.append(_quantize_job(ready, entry, torch.device(device)))
        else:
            jobs += [copy_job(ready.checkpoint, info, None if keep else ready.plan.dtype) for info in stored_of(entry)]
    for infos in ready.plan.plain.values():
        jobs += [copy_job(ready.checkpoint, info, None if keep else ready.plan.dtype) for info in infos]
    config = ready.quantizer.model_config(source_config(ready))
    if not keep:
        config["dtype"] = str(ready.plan.dtype).removeprefix("torch.")
    jobs = _once(jobs)
    layouts = {
        part.prefix: part.layout for entry in ready.plan.entries for part in entry.parts if part.layout is not None
    }
    metadata = ready.quantizer.file_metadata(layouts, [name for job in jobs for name in job.specs])
    write_checkpoint(
        dst, jobs, config, metadata=metadata, max_shard_size=max_shard_size, copy_from=ready.side_files(),
        extra_files={**ready.extra_files(), **ready.quantizer.made_files(layouts)}, force=force, progress=progress,
    )  # fmt: skip
    ready.checkpoint.release()
    return ready.plan


def _quantize_job(ready: Prepared, entry: Entry, device: torch.device) -> Job:
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
            weight = make_weight(ready.model, entry, part, ready.checkpoint, device)
            for own, tensor in part.layout.encode(weight).items():
                made[join_name(part.prefix, own)] = tensor.cpu()
        ready.checkpoint.release()
        return made

    return Job(entry.slot.module, specs, make, frozenset(shrinking))


# --- calibrated ------------------------------------------------------------------------------------------------------------


def calibrated_jobs(
    ready: Prepared, tokens: Tensor, algorithm: str | None, device: torch.device
) -> tuple[list[Job], set[str]]:
    """One job for each decoder block, and the weights they make; others are quantized without calibration."""
    assert ready.quantizer is not None
    name = algorithm or ready.quantizer.calibrated_algorithm
    if name is None:
        raise ConfigError(
            f"{ready.quantizer.method_name} has no calibrated algorithm of its own; name one, e.g. algorithm='gptq', or leave "
            "out calibration"
        )
    run = algorithms.get(name)
    options = ready.quantizer.calibration_options() if name == ready.quantizer.calibrated_algorithm else {}
    calibrator = Calibrator(ready, tokens, device)
    jobs: list[Job] = []
    covered: set[str] = set()
    for number in range(len(calibrator.blocks)):
        entries = [entry for entry in calibrator.entries(number) if entry.action == "quantize"]
        if options.get("order") == "columns":
            for entry in entries:
                entry.parts = [replace(part, layout=_ordered(part.layout)) for part in entry.parts]
        specs: dict[str, Spec] = {}
        for entry in entries:
            for part in entry.parts:
                assert part.layout is not None
                specs |= {join_name(part.prefix, own): spec for own, spec in part.layout.specs().items()}
        covered |= {entry.slot.parameter for entry in entries}
        jobs.append(Job(calibrator.names(number), specs, _block(ready, calibrator, number, run, options)))
    return jobs, covered


def _ordered(layout: Layout | None) -> Layout:
    found = layout.ordered() if layout is not None else None
    if found is None:
        raise ConfigError(f"{type(layout).__name__} cannot store columns in another order; leave out desc_act")
    return found


def _block(
    ready: Prepared, calibrator: Calibrator, number: int, run: Callable[..., Weight], options: Mapping[str, Any]
) -> Callable[[], dict[str, Tensor]]:
    enough = max(1, calibrator.tokens.numel() // 200)  # fewer tokens say too little, as in gptqmodel: half a percent

    def make() -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}

        def quantize_entry(entry: Entry, observed: list[Observed]) -> Tensor:
            rows: dict[int | None, list[Tensor]] = {}
            few = sum(seen.tokens < enough for seen in observed)
            for part, seen in zip(entry.parts, observed, strict=True):
                layout = part.layout
                assert layout is not None
                dense = dense_part(ready.model, entry, part, ready.checkpoint).to(calibrator.device, torch.float32)
                if seen.tokens < enough and layout.algorithm is not None:
                    weight = algorithms.get(layout.algorithm)(dense, layout.scheme(), **layout.algorithm_options())
                else:
                    own = algorithms.accepted(run, layout.algorithm_options())
                    weight = run(dense, layout.scheme(), hessian=seen.hessian, **own, **options)
                stored = layout.encode(weight)
                made.update({join_name(part.prefix, name): tensor.cpu() for name, tensor in stored.items()})
                rows.setdefault(part.index[0], []).append(layout.decode(stored).to_dense(torch.float32))
            entry.reason = f"calibrated with {observed[0].tokens} tokens" + (
                f"; {few} of {len(observed)} units saw fewer than {enough} and were rounded to nearest" if few else ""
            )
            experts = [torch.cat(own) if len(own) > 1 else own[0] for own in rows.values()]
            dense = experts[0] if None in rows else torch.stack(experts)
            return dense.transpose(-1, -2).contiguous() if entry.slot.transposed else dense

        if number == 0:
            calibrator.begin()
        calibrator.run(number, quantize_entry)
        ready.checkpoint.release()
        return made

    return make


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
