"""LoRA adapters merged into a base of any method, file to file: dequantize, add, quantize again in the base's own layout.

Weights that the adapter does not touch keep their bytes. The others are rounded anew, and the error of that is stated, module by
module: relative to the merged weight, and relative to what the adapter changed, which says how much of it survives.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anybit import algorithms
from anybit.engine.adapter import Delta, Replaced, read_adapter
from anybit.engine.dequantize import dequantize as write_dense
from anybit.engine.load import Prepared, Progress, prepare
from anybit.engine.materialize import make_weight
from anybit.engine.plan import Entry, PlannedPart
from anybit.engine.quantize import Fold, copy_job, source_config, stored_of
from anybit.engine.write import Job, Spec, write_checkpoint
from anybit.errors import AnybitError, CalibrationNeeded, CheckpointError, ConfigError, did_you_mean, located
from anybit.weight import Layout, Weight
from anybit.weight.layout import join_name
from anybit.weight.regridding import on_same_grid

KEPT, ANEW, STORED = "its grid kept", "a grid found anew", "stored dense"


@dataclass(frozen=True)
class MergedModule:
    """`error`: of the stored weight to the merged one, relative; `share`: the same relative to what the adapter changed.

    `grid`: how it was rounded, the better of the two ways there are; `other_error`: that of the other, None where there is none.
    """

    name: str
    error: float
    share: float
    grid: str = STORED
    other_error: float | None = None


@dataclass
class Merge:
    """What a merge did. `plain`: tensors beside weights (biases, norms) that the adapter changed."""

    method: str
    modules: list[MergedModule] = field(default_factory=list)
    plain: list[str] = field(default_factory=list)

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

    LoRA, rsLoRA and DoRA of linear layers and embeddings, with alpha and rank patterns, trained biases and modules that were
    saved whole. The result has the base's method and layout: each weight is rounded on the grid it had and on one found anew,
    and the better one is stored. With `dequantize` it is dense, in the model's dtype. Raises ConfigError for what an adapter asks
    beyond that, CheckpointError for tensors that do not fit the base, CalibrationNeeded where the method has neither a grid nor a
    rule for rounding without calibration data.
    """
    given = read_adapter(Path(adapter))
    ready = prepare(base, device_map=device, allow_pickle=allow_pickle, hub_options=hub_options)
    entries = {entry.slot.module: entry for entry in ready.plan.entries}
    for name, delta in given.weights.items():
        _check(name, delta, entries, ready)
    method = ready.quantizer.method_name if ready.quantizer is not None else "dense"
    report = Merge(method)
    plain = {key: _plain(report, ready, key, *change) for key, change in given.plain.items()}
    if dequantize and ready.quantizer is not None:
        changes = {
            entries[name].slot.parameter: _fold(report, entries[name], delta, ready)
            for name, delta in given.weights.items()
        }
        ready.checkpoint.release()
        write_dense(
            base, dst, device=device, max_shard_size=max_shard_size, force=force, allow_pickle=allow_pickle,
            progress=progress, hub_options=hub_options, changes={**changes, **plain},
        )  # fmt: skip
        return report
    jobs: list[Job] = []
    for entry in ready.plan.entries:
        found = given.weights.get(entry.slot.module)
        if found is None:
            jobs += [copy_job(ready.checkpoint, info, None) for info in stored_of(entry)]
        elif entry.action == "dense":
            jobs += [
                copy_job(ready.checkpoint, info, None, _fold(report, entry, found, ready)) for info in stored_of(entry)
            ]
        else:
            jobs.append(_job(ready, entry, found, report, torch.device(device)))
    for key, infos in ready.plan.plain.items():
        jobs += [copy_job(ready.checkpoint, info, None, plain.get(key)) for info in infos]
    write_checkpoint(
        dst, jobs, source_config(ready), metadata=ready.checkpoint.metadata or {"format": "pt"}, max_shard_size=max_shard_size,
        copy_from=ready.side_files(), extra_files=ready.extra_files(), force=force, progress=progress,
    )  # fmt: skip
    ready.checkpoint.release()
    return report


def _check(name: str, delta: Delta | Replaced, entries: Mapping[str, Entry], ready: Prepared) -> None:
    entry = entries.get(name)
    if entry is None:
        tied = f"{name}.weight"
        if tied in ready.plan.tied:
            raise ConfigError(
                f"the adapter changes {name}, which is tied to {ready.plan.tied[tied]}; merge with PEFT, then quantize"
            )
        raise CheckpointError(
            f"the adapter changes {name}, which the base does not have{did_you_mean(name, entries) or '.'} It was trained for "
            "another model"
        )
    parts = entry.parts
    if entry.slot.kind == "experts":
        raise ConfigError(f"the adapter changes {name}, a stack of experts; merge with PEFT, then quantize")
    if parts[0].conversion is not None:
        raise ConfigError(
            f"the adapter changes {name}, which transformers converts as it reads; merge with PEFT, then quantize"
        )
    if any(part.cut is not None for part in parts):
        raise ConfigError(
            f"the adapter changes {name}, which the base stores in one unit with other layers; merge with --dequantize, then "
            "quantize"
        )
    if len(parts) > 1 and entry.action == "dense":
        raise ConfigError(
            f"the adapter changes {name}, which the base stores dense in several tensors; merge with PEFT"
        )
    shape = tuple(entry.slot.shape[-2:])
    own = [delta.shape] + ([tuple(delta.base.shape)] if isinstance(delta, Delta) and delta.base is not None else [])
    if any(found != shape for found in own):
        raise CheckpointError(
            f"the adapter's {name} is {list(next(found for found in own if found != shape))}, the base's is {list(shape)}: "
            "another model, or a vocabulary that grew"
        )
    if entry.slot.parameter in ready.plan.tied.values() or entry.slot.parameter in ready.plan.tied:
        raise ConfigError(
            f"the adapter changes {name}, which is tied to another weight; merge with PEFT, then quantize"
        )
    if ready.quantizer is not None and entry.slot.parameter in ready.quantizer.folds:
        raise ConfigError(f"{name} is stored rotated together with others; dequantize the base, then merge")


def _plain(report: Merge, ready: Prepared, key: str, tensor: Tensor, added: bool) -> Fold:
    """The change of a bias or norm. Raises ConfigError where the base has none: then the model would not be the adapter's."""
    infos = ready.plan.plain.get(key, ())
    if len(infos) != 1 or key in ready.plan.conversions:
        raise ConfigError(
            f"the adapter has a {key}, which the base does not store as one tensor; merge with PEFT into the dense base, then "
            "quantize"
        )
    if tuple(infos[0].shape) != tuple(tensor.shape):
        raise CheckpointError(
            f"the adapter's {key} is {list(tensor.shape)}, the base's is {list(infos[0].shape)}: another model"
        )
    if ready.quantizer is not None and key in (*ready.quantizer.folds, *ready.quantizer.attached):
        raise ConfigError(f"{key} is stored in a form of the method's own; dequantize the base, then merge")
    report.plain.append(key)
    return lambda stored: stored + tensor.to(stored.device) if added else tensor.to(stored.device)


def _fold(report: Merge, entry: Entry, delta: Delta | Replaced, ready: Prepared) -> Fold:
    """The change of a weight that is written dense, as it is stored."""
    turned = entry.slot.transposed and entry.action == "dense"
    dtype = ready.plan.dtype

    def fold(dense: Tensor) -> Tensor:
        own = dense.T if turned else dense
        merged = delta.merged(own)
        error = float((merged.to(dtype).float() - merged).norm())
        report.modules.append(_merged(entry.slot.module, error, merged, own, STORED))
        return merged.T.contiguous() if turned else merged

    return fold


def _job(ready: Prepared, entry: Entry, delta: Delta | Replaced, report: Merge, device: torch.device) -> Job:
    """One weight of the base, merged and rounded; of several units those of a layer that was taken apart by its rows."""
    specs: dict[str, Spec] = {}
    shrinking: set[str] = set()
    for part in entry.parts:
        assert part.layout is not None
        specs |= {join_name(part.prefix, own): spec for own, spec in part.layout.specs().items()}
        shrinking |= {join_name(part.prefix, own) for own in part.layout.shrinking()}

    def make() -> dict[str, Tensor]:
        weights = [make_weight(ready.model, entry, part, ready.checkpoint, device) for part in entry.parts]
        dense = torch.cat([weight.to_dense(torch.float32) for weight in weights])
        merged = delta.merged(dense)
        rows = merged.split([weight.shape[0] for weight in weights])
        found: dict[str, Tensor] = {}
        ways: list[Rounding] = []
        for part, weight, own in zip(entry.parts, weights, rows, strict=True):
            way = _rounded(part, weight, own)
            ways.append(way)
            found |= {join_name(part.prefix, name): tensor.cpu() for name, tensor in way.stored.items()}
        error = math.sqrt(sum(way.error**2 for way in ways))
        others = [way.other for way in ways if way.other is not None]
        other = math.sqrt(sum(one**2 for one in others)) if len(others) == len(ways) else None
        grid = ways[0].grid if len({way.grid for way in ways}) == 1 else f"{KEPT} or {ANEW}, part by part"
        report.modules.append(_merged(entry.slot.module, error, merged, dense, grid, other))
        ready.checkpoint.release()
        return found

    return Job(entry.parts[0].prefix, specs, make, frozenset(shrinking))


@dataclass(frozen=True)
class Rounding:
    """One unit's new numbers as they are stored. `error`: absolute; `other`: that of the way not taken, None if it fails."""

    stored: dict[str, Tensor]
    error: float
    grid: str
    other: float | None


def _rounded(part: PlannedPart, weight: Weight, merged: Tensor) -> Rounding:
    """The better of the grid there is and one found anew."""
    layout = part.layout
    assert layout is not None
    tried: list[tuple[float, str, dict[str, Tensor]]] = []
    reasons: list[AnybitError] = []
    for grid, make in ((KEPT, lambda: on_same_grid(weight, merged)), (ANEW, lambda: _anew(layout, merged))):
        try:
            made = replace(make(), activation=weight.activation, extras=weight.extras)
            stored = layout.encode(made)
            error = float((layout.decode(stored).to_dense(torch.float32) - merged).norm())
        except AnybitError as refusal:
            reasons.append(refusal)
            continue
        tried.append((error, grid, stored))
    if not tried:
        cure = f"{part.prefix} (use --dequantize, then quantize)"
        raise located(reasons[-1], cure) from reasons[-1].__cause__
    tried.sort(key=lambda one: one[0])
    error, grid, stored = tried[0]
    return Rounding(stored, error, grid, tried[1][0] if len(tried) > 1 else None)


def _anew(layout: Layout, merged: Tensor) -> Weight:
    if layout.algorithm is None:
        raise CalibrationNeeded(
            f"{type(layout).__name__} has codes fitted to data, and no rule that rounds weights alone. Merge with --dequantize, "
            "then quantize with calibration data"
        )
    scheme = replace(layout.scheme(), activation=None) if layout.static_inputs() else layout.scheme()
    made: Weight = algorithms.get(layout.algorithm)(merged, scheme, **layout.algorithm_options())
    return made


def _merged(
    name: str, wrong: float, merged: Tensor, before: Tensor, grid: str, other: float | None = None
) -> MergedModule:
    size, moved = max(float(merged.norm()), 1e-30), max(float((merged - before).norm()), 1e-30)
    return MergedModule(name, wrong / size, wrong / moved, grid, None if other is None else other / size)
