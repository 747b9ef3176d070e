"""From one method to another, file to file: through the weight tree, without a model's dense weights in memory.

Each stored unit ends in one of four ways: `exact` (the same values, compared), `rescaled` (the same codes, scales rounded by a
narrower dtype; error stated), `requantized` (codes chosen anew, only when allowed; error stated) or `dense` (the target leaves it
dense; rounded to the model's dtype).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from anybit import algorithms
from anybit.engine.bundling import bundle_for, write_bundle
from anybit.engine.load import Prepared, Progress, prepare
from anybit.engine.materialize import dense_part, make_weight
from anybit.engine.names import WHOLE
from anybit.engine.plan import Entry, PlannedPart, module_info
from anybit.engine.quantize import copy_job, source_config, stored_of
from anybit.engine.write import Job, Spec, write_checkpoint
from anybit.errors import CalibrationNeeded, ConfigError, NotRepresentable
from anybit.quantizers.auto import AutoHfQuantizer
from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.checkpoint_config import KEY
from anybit.weight import Layout, Weight
from anybit.weight.layout import join_name
from anybit.weight.rewriting import rewrite

EXACT, RESCALED, REQUANTIZED, DENSE = "exact", "rescaled", "requantized", "dense"


@dataclass(frozen=True)
class ConvertedModule:
    """One stored unit. `error`: relative Frobenius error of its values; `reason`: why it is not exact."""

    name: str
    kind: str
    error: float = 0.0
    reason: str = ""


@dataclass
class Conversion:
    """What a conversion did, module by module."""

    source: str
    target: str
    modules: list[ConvertedModule] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """Modules of each kind."""
        kinds = [module.kind for module in self.modules]
        return {kind: kinds.count(kind) for kind in (EXACT, RESCALED, REQUANTIZED, DENSE) if kind in kinds}

    @property
    def largest_error(self) -> float:
        return max((module.error for module in self.modules), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "counts": self.counts, "largest_error": self.largest_error}


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    quantization_config: Any,
    *,
    allow_requantize: bool = False,
    dtype: torch.dtype | str | None = "auto",
    device: torch.device | str = "cpu",
    max_shard_size: int | str | None = None,
    force: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
    hub_options: Mapping[str, Any] | None = None,
) -> Conversion:
    """Write the quantized checkpoint `src` in the method of `quantization_config` to the new folder `dst`.

    Codes are kept where the target's grid can hold them. `allow_requantize`: choose codes anew, by the target's own rule,
    where it cannot; without it NotRepresentable names the module and the reason, and nothing is written.
    """
    ready = prepare(src, dtype=dtype, device_map=device, allow_pickle=allow_pickle, hub_options=hub_options)
    if ready.quantizer is None:
        raise ConfigError(f"{src} is not quantized; `quantize` makes a quantized checkpoint of dense weights")
    target = AutoHfQuantizer.from_config(quantization_config, pre_quantized=False)
    target.validate_environment(device_map=device)
    target.begin(ready.model, list(ready.names.slots.values()))
    report = Conversion(ready.quantizer.method_name, target.method_name)
    jobs: list[Job] = []
    made: dict[str, Layout] = {}
    for entry in ready.plan.entries:
        layouts = [_layout(target, entry, part, ready) for part in entry.parts]
        if entry.action == "dense" and not any(layouts):
            jobs += [copy_job(ready.checkpoint, info, None) for info in stored_of(entry)]
            continue
        if not all(layouts):  # a stack is packed whole or not at all
            layouts = [None] * len(layouts)
        for part, layout in zip(entry.parts, layouts, strict=True):
            if layout is not None:
                made[part.prefix] = layout
            jobs.append(_job(ready, entry, part, layout, report, allow_requantize, torch.device(device)))
    for infos in ready.plan.plain.values():
        jobs += [copy_job(ready.checkpoint, info, None) for info in infos]
    bundled = bundle_for(target, ready, jobs, src)
    if bundled is not None:
        write_bundle(dst, jobs, bundled, max_shard_size=max_shard_size, force=force, progress=progress)
        ready.checkpoint.release()
        return report
    config = source_config(ready)
    for key in (KEY, "compression_config", "quantization", *type(ready.quantizer.quantization_config).claims):
        config.pop(key, None)
    config = target.model_config(config)
    metadata = target.file_metadata(made, [name for job in jobs for name in job.specs])
    dropped = type(ready.quantizer.quantization_config).side_files
    write_checkpoint(
        dst, jobs, config, metadata=metadata, max_shard_size=max_shard_size, copy_from=ready.side_files(dropped),
        extra_files={**ready.extra_files(), **target.made_files(made)}, force=force, progress=progress,
    )  # fmt: skip
    ready.checkpoint.release()
    return report


def convert_unit(
    ready: Prepared,
    entry: Entry,
    part: PlannedPart,
    target: HfQuantizer,
    report: Conversion,
    allow_requantize: bool,
    device: torch.device | str = "cpu",
) -> None:
    """What becomes of one unit, noted in the report; nothing is written. Raises what `convert` would."""
    _job(ready, entry, part, _layout(target, entry, part, ready), report, allow_requantize, torch.device(device)).make()


def _layout(target: HfQuantizer, entry: Entry, part: PlannedPart, ready: Prepared) -> Layout | None:
    return target.layout_for(module_info(entry.slot, part, entry.parts, ready.plan.dtype))


def _job(
    ready: Prepared,
    entry: Entry,
    part: PlannedPart,
    layout: Layout | None,
    report: Conversion,
    allow_requantize: bool,
    device: torch.device,
) -> Job:
    if layout is None:
        return _dense_job(ready, entry, part, report, device)
    specs: dict[str, Spec] = {join_name(part.prefix, own): spec for own, spec in layout.specs().items()}

    def make() -> dict[str, Tensor]:
        weight = _converted(ready, entry, part, layout, report, allow_requantize, device)
        ready.checkpoint.release()
        return {join_name(part.prefix, own): tensor.cpu() for own, tensor in layout.encode(weight).items()}

    shrinking = frozenset(join_name(part.prefix, own) for own in layout.shrinking())
    return Job(part.prefix, specs, make, shrinking)


def _converted(
    ready: Prepared,
    entry: Entry,
    part: PlannedPart,
    layout: Layout,
    report: Conversion,
    allow_requantize: bool,
    device: torch.device,
) -> Weight:
    """One unit in the target's layout, its fate noted in the report."""
    if entry.action == "dense":
        dense = dense_part(ready.model, entry, part, ready.checkpoint).to(device)
        reason = "it was stored dense"
    else:
        weight = make_weight(ready.model, entry, part, ready.checkpoint, device)
        dense = weight.to_dense(torch.float32)
        try:
            if weight.activation is not None or layout.scheme().activation is not None:
                _same_activation(weight, layout.scheme())
            found = rewrite(weight, layout.scheme())
            kept = layout.decode(layout.encode(found))  # what a reader of the target will see
            values = kept.to_dense(torch.float32)
            if torch.equal(values, dense):
                report.modules.append(ConvertedModule(part.prefix, EXACT))
            else:
                reason = "the target stores its scales or offsets in fewer bits"
                report.modules.append(ConvertedModule(part.prefix, RESCALED, _error(values, dense), reason))
            return found
        except NotRepresentable as error:
            reason = str(error)
    if not allow_requantize:
        raise NotRepresentable(
            f"{part.prefix} cannot be written as {report.target} with its codes kept: {reason}. Allow requantization "
            "(allow_requantize=True, --allow-requantize), or convert to a method whose groups and range fit"
        )
    if layout.algorithm is None:
        raise CalibrationNeeded(
            f"{part.prefix} cannot be requantized to {type(layout).__name__} from its weights alone; the method needs calibration"
        )
    made = algorithms.get(layout.algorithm)(dense, layout.scheme(), **layout.algorithm_options())
    report.modules.append(
        ConvertedModule(part.prefix, REQUANTIZED, _error(made.to_dense(torch.float32), dense.float()), reason)
    )
    return made


def _same_activation(weight: Weight, scheme: Weight) -> None:
    mine, theirs = weight.activation, scheme.activation
    if (mine.rule if mine else None) != (theirs.rule if theirs else None):
        raise NotRepresentable(
            f"the source quantizes its inputs by {mine.rule if mine else 'no rule'!r}, the target by "
            f"{theirs.rule if theirs else 'no rule'!r}"
        )


def _error(values: Tensor, wanted: Tensor) -> float:
    return float((values - wanted).norm() / wanted.norm().clamp(min=1e-30))


def _dense_job(ready: Prepared, entry: Entry, part: PlannedPart, report: Conversion, device: torch.device) -> Job:
    """A unit that the target leaves dense, under the name and in the orientation it has in a dense checkpoint."""
    whole = part.index == WHOLE
    name = part.prefix if entry.slot.kind == "experts" and whole else join_name(part.prefix, "weight")
    turned = entry.slot.transposed and whole
    assert part.layout is not None
    *lead, rows, columns = part.layout.shape
    dtype = ready.plan.dtype

    def make() -> dict[str, Tensor]:
        exact = make_weight(ready.model, entry, part, ready.checkpoint, device).to_dense(torch.float32)
        dense = exact.to(dtype)
        error = _error(dense.float(), exact)
        report.modules.append(ConvertedModule(part.prefix, DENSE, error, "the target leaves it dense"))
        return {name: (dense.transpose(-1, -2).contiguous() if turned else dense).cpu()}

    shape = (*lead, columns, rows) if turned else (*lead, rows, columns)
    return Job(part.prefix, {name: (str(dtype).removeprefix("torch."), shape)}, make)
