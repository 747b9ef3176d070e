"""LoRA adapters merged into a base of any method, file to file: dequantize, add, quantize again in the base's own layout.

Weights that the adapter does not touch keep their bytes. The others are rounded anew, and the error of that is stated, module by
module: relative to the merged weight, and relative to what the adapter changed, which says how much of it survives.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anybit import algorithms
from anybit.containers import Checkpoint
from anybit.engine.dequantize import dequantize as write_dense
from anybit.engine.load import Prepared, Progress, prepare
from anybit.engine.materialize import make_weight
from anybit.engine.names import WHOLE
from anybit.engine.plan import Entry
from anybit.engine.quantize import Fold, copy_job, source_config, stored_of
from anybit.engine.write import Job, Spec, write_checkpoint
from anybit.errors import (
    AnybitError,
    CalibrationNeeded,
    CheckpointError,
    ConfigError,
    UnexpectedTensor,
    did_you_mean,
    located,
)
from anybit.quantizers.checkpoint_config import read_json
from anybit.weight.layout import join_name

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PARTS = re.compile(r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?:\.weight)?")
# what an adapter's configuration may ask for beyond this, with the values that ask for nothing
NEUTRAL: Mapping[str, Any] = {
    "bias": "none", "modules_to_save": None, "layer_replication": None, "lora_bias": False, "target_parameters": None,
    "alora_invocation_tokens": None, "use_qalora": False, "trainable_token_indices": None,
}  # fmt: skip


@dataclass(frozen=True)
class MergedModule:
    """`error`: of the stored weight to the merged one, relative; `share`: the same relative to what the adapter changed."""

    name: str
    error: float
    share: float


@dataclass
class Merge:
    """What a merge did."""

    method: str
    modules: list[MergedModule] = field(default_factory=list)

    @property
    def largest_error(self) -> float:
        return max((module.error for module in self.modules), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "largest_error": self.largest_error}


def merge(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    dequantize: bool = False,
    device: torch.device | str = "cpu",
    max_shard_size: int | str | None = None,
    force: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
    hub_options: Mapping[str, Any] | None = None,
) -> Merge:
    """Write the checkpoint `base` with the PEFT adapter in the folder `adapter` merged into it to the new folder `dst`.

    LoRA, rsLoRA and DoRA of linear layers, with alpha and rank patterns. The result has the base's method and layout; with
    `dequantize` it is dense, in the model's dtype. Raises ConfigError for what an adapter asks beyond that, CheckpointError for
    tensors that do not fit the base, CalibrationNeeded where the method cannot round without calibration data.
    """
    deltas = read_adapter(Path(adapter))
    ready = prepare(base, device_map=device, allow_pickle=allow_pickle, hub_options=hub_options)
    entries = {entry.slot.module: entry for entry in ready.plan.entries}
    for name, delta in deltas.items():
        _check(name, delta, entries, ready)
    method = ready.quantizer.method_name if ready.quantizer is not None else "dense"
    report = Merge(method)
    if dequantize and ready.quantizer is not None:
        changes = {
            entries[name].slot.parameter: _fold(report, entries[name], delta, ready) for name, delta in deltas.items()
        }
        ready.checkpoint.release()
        write_dense(
            base, dst, device=device, max_shard_size=max_shard_size, force=force, allow_pickle=allow_pickle,
            progress=progress, hub_options=hub_options, changes=changes,
        )  # fmt: skip
        return report
    jobs: list[Job] = []
    for entry in ready.plan.entries:
        found = deltas.get(entry.slot.module)
        if found is None:
            jobs += [copy_job(ready.checkpoint, info, None) for info in stored_of(entry)]
        elif entry.action == "dense":
            jobs += [
                copy_job(ready.checkpoint, info, None, _fold(report, entry, found, ready)) for info in stored_of(entry)
            ]
        else:
            jobs.append(_job(ready, entry, found, report, torch.device(device)))
    for infos in ready.plan.plain.values():
        jobs += [copy_job(ready.checkpoint, info, None) for info in infos]
    write_checkpoint(
        dst, jobs, source_config(ready), metadata=ready.checkpoint.metadata or {"format": "pt"}, max_shard_size=max_shard_size,
        copy_from=ready.side_files(), extra_files=ready.extra_files(), force=force, progress=progress,
    )  # fmt: skip
    ready.checkpoint.release()
    return report


# --- the adapter ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Delta:
    """What an adapter adds to one weight: scaling * up @ down, float32 [out, in]; DoRA then sets the length of each row."""

    down: Tensor
    up: Tensor
    scaling: float
    magnitude: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    def merged(self, dense: Tensor) -> Tensor:
        """The float32 weight with the adapter in it."""
        changed = dense + (self.up @ self.down).to(dense.device) * self.scaling
        if self.magnitude is None:
            return changed
        length = changed.norm(dim=1, keepdim=True)
        return changed * (self.magnitude.to(dense.device).reshape(-1, 1) / length)


def read_adapter(folder: Path) -> dict[str, Delta]:
    """Module path -> what the adapter does to its weight."""
    file = folder / CONFIG
    if not file.is_file():
        raise CheckpointError(
            f"{folder} has no {CONFIG}, so it is no PEFT adapter; name the folder that save_pretrained wrote"
        )
    config = read_json(file)
    if config.get("peft_type") != "LORA":
        raise ConfigError(f"{file}: peft_type is {config.get('peft_type')!r}; only LORA adapters are merged")
    for key, neutral in NEUTRAL.items():
        if config.get(key) not in (neutral, None, [], {}):
            raise ConfigError(
                f"{file}: {key} is {config[key]!r}, which is not merged. Merge with PEFT into the dense base, then quantize"
            )
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder} has no {WEIGHTS}; save the adapter with safe_serialization=True")
    parts: dict[str, dict[str, Tensor]] = {}
    with Checkpoint.open(folder / WEIGHTS) as checkpoint:
        for name in checkpoint.tensors:
            match = PARTS.fullmatch(name)
            if match is None or not name.startswith(PREFIX):
                raise UnexpectedTensor(f"{folder / WEIGHTS}: {name} is no part of a LoRA adapter")
            if "embedding" in match[2]:
                raise ConfigError(
                    f"{folder / WEIGHTS}: {name} adapts an embedding, which is not merged; merge with PEFT"
                )
            tensor = checkpoint.read(name).to(torch.float32).clone()
            if not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(f"{folder / WEIGHTS}: {name} has NaN or infinite numbers; the adapter is damaged")
            parts.setdefault(match[1].removeprefix(PREFIX), {})[match[2]] = tensor
    if not parts:
        raise CheckpointError(f"{folder / WEIGHTS} holds no tensors")
    return {module: _delta(file, config, module, own) for module, own in parts.items()}


def _delta(file: Path, config: Mapping[str, Any], module: str, own: Mapping[str, Tensor]) -> Delta:
    down, up, magnitude = own.get("lora_A"), own.get("lora_B"), own.get("lora_magnitude_vector")
    if down is None or up is None or down.dim() != 2 or up.dim() != 2 or down.shape[0] != up.shape[1]:
        raise CheckpointError(f"{file.parent / WEIGHTS}: {module} needs lora_A [r, in] and lora_B [out, r]")
    if bool(config.get("use_dora")) != (magnitude is not None):
        raise CheckpointError(f"{file}: use_dora is {config.get('use_dora')}, but {module} says otherwise")
    rank = _by_pattern(config.get("rank_pattern"), module, config.get("r"))
    alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    if rank != down.shape[0] or not isinstance(alpha, (int, float)):
        raise CheckpointError(
            f"{file}: {module} has rank {down.shape[0]}; the configuration says rank {rank}, alpha {alpha}"
        )
    return Delta(down, up, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), magnitude)


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that is the end of the path, at a dot."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


# --- base and adapter ---------------------------------------------------------------------------------------------------------


def _check(name: str, delta: Delta, entries: Mapping[str, Entry], ready: Prepared) -> None:
    entry = entries.get(name)
    if entry is None:
        raise CheckpointError(
            f"the adapter changes {name}, which the base does not have{did_you_mean(name, entries) or '.'} It was trained for "
            "another model"
        )
    if entry.slot.kind in ("experts", "embedding") or len(entry.parts) != 1 or entry.parts[0].index != WHOLE:
        raise ConfigError(
            f"the adapter changes {name}, which the base stores in several units; merge with PEFT, then quantize"
        )
    if entry.parts[0].conversion is not None:
        raise ConfigError(
            f"the adapter changes {name}, which transformers converts as it reads; merge with PEFT, then quantize"
        )
    out, columns = entry.slot.shape[-2:]
    if delta.shape not in ((out, columns),):
        raise CheckpointError(
            f"the adapter's {name} is {list(delta.shape)}, the base's is {[out, columns]}: another model"
        )
    if entry.slot.parameter in ready.plan.tied.values() or entry.slot.parameter in ready.plan.tied:
        raise ConfigError(
            f"the adapter changes {name}, which is tied to another weight; merge with PEFT, then quantize"
        )
    if ready.quantizer is not None and entry.slot.parameter in ready.quantizer.folds:
        raise ConfigError(f"{name} is stored rotated together with others; dequantize the base, then merge")


def _fold(report: Merge, entry: Entry, delta: Delta, ready: Prepared) -> Fold:
    """The change of a weight that is written dense, as it is stored."""
    turned = entry.slot.transposed and entry.action == "dense"
    dtype = ready.plan.dtype

    def fold(dense: Tensor) -> Tensor:
        own = dense.T if turned else dense
        merged = delta.merged(own)
        _note(report, entry.slot.module, merged.to(dtype).float(), merged, own)
        return merged.T.contiguous() if turned else merged

    return fold


def _job(ready: Prepared, entry: Entry, delta: Delta, report: Merge, device: torch.device) -> Job:
    """One weight of the base, merged and rounded by its layout's own rule."""
    (part,) = entry.parts
    layout = part.layout
    assert layout is not None
    specs: dict[str, Spec] = {join_name(part.prefix, own): spec for own, spec in layout.specs().items()}

    def make() -> dict[str, Tensor]:
        weight = make_weight(ready.model, entry, part, ready.checkpoint, device)
        dense = weight.to_dense(torch.float32)
        merged = delta.merged(dense)
        if layout.algorithm is None:
            raise CalibrationNeeded(
                f"{part.prefix}: {type(layout).__name__} cannot be rounded from weights alone. Merge with --dequantize, then "
                "quantize with calibration data"
            )
        try:
            made = algorithms.get(layout.algorithm)(merged, layout.scheme(), **layout.algorithm_options())
        except AnybitError as error:
            raise located(error, f"{part.prefix} (use --dequantize, then quantize)") from error.__cause__
        made = replace(made, activation=weight.activation, extras=weight.extras)
        stored = layout.encode(made)
        _note(report, entry.slot.module, layout.decode(stored).to_dense(torch.float32), merged, dense)
        ready.checkpoint.release()
        return {join_name(part.prefix, own): tensor.cpu() for own, tensor in stored.items()}

    return Job(part.prefix, specs, make, frozenset(join_name(part.prefix, own) for own in layout.shrinking()))


def _note(report: Merge, name: str, values: Tensor, merged: Tensor, before: Tensor) -> None:
    wrong = float((values - merged).norm())
    report.modules.append(
        MergedModule(
            name, wrong / max(float(merged.norm()), 1e-30), wrong / max(float((merged - before).norm()), 1e-30)
        )
    )
