"""From one method to another, file to file: through the weight tree, without a model's dense weights in memory.

Each stored unit ends in one of four ways: `exact` (the same values, compared), `rescaled` (the same codes; scales and offsets
rounded to the nearest number of the target's dtype, products perhaps rounded in another one; error stated, and never above
MOST_RESCALED), `requantized` (codes chosen anew, only when allowed; error stated) or `dense` (the target leaves it dense; rounded
to the model's dtype). A target that quantizes inputs in another way keeps the weight, but that too must be allowed and is stated.
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
from anybit.engine.convert_units import Source, bias_job, dense_name, read, sources_of, turned, unit_specs
from anybit.engine.dequantize import joined_biases
from anybit.engine.load import Prepared, Progress, prepare
from anybit.engine.names import ExpertBiases
from anybit.engine.plan import Entry, refuse_unmeasured
from anybit.engine.quantize import copy_job, source_config, stored_of
from anybit.engine.write import Job, write_checkpoint
from anybit.errors import CalibrationNeeded, ConfigError, NotRepresentable
from anybit.quantizers.auto import AutoHfQuantizer
from anybit.quantizers.checkpoint_config import KEY
from anybit.weight import Activation, Layout, Weight
from anybit.weight.layout import join_name
from anybit.weight.rewriting import rewrite

EXACT, RESCALED, REQUANTIZED, DENSE = "exact", "rescaled", "requantized", "dense"
# Relative error of a weight that rounding its scale and its offset to bfloat16 explains: 2^-9 each, where both may be twice as
# large as what they add up to. More than that is another weight.
MOST_RESCALED = 2.0**-7
ROUNDED = "the target stores its scales or offsets in fewer bits, or multiplies them in another dtype"
# what methods call the same numbers
SAME_NUMBERS = {"float8_e4m3fn": "e4m3", "nvfp4": "e2m1", "mxfp4": "e2m1"}


@dataclass(frozen=True)
class ConvertedModule:
    """One stored unit. `error`: relative Frobenius error of its values; `reason`: why it is not exact.

    `inputs`: how the target quantizes them, where that is not how the source does.
    """

    name: str
    kind: str
    error: float = 0.0
    reason: str = ""
    inputs: str = ""


@dataclass
class Conversion:
    """What a conversion did, module by module. `left_out`: stored tensors beside weights that only the source's method knows."""

    source: str
    target: str
    modules: list[ConvertedModule] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

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
    where it cannot, and let inputs be quantized in another way; without it NotRepresentable names the module and the reason,
    and nothing is written.
    """
    ready = prepare(src, dtype=dtype, device_map=device, allow_pickle=allow_pickle, hub_options=hub_options)
    if ready.quantizer is None:
        raise ConfigError(f"{src} is not quantized; `quantize` makes a quantized checkpoint of dense weights")
    target = AutoHfQuantizer.from_config(quantization_config, pre_quantized=False)
    target.validate_environment(device_map=device)
    target.begin(ready.model, list(ready.names.slots.values()))
    refuse_unmeasured((), target.measurements(ready.model))
    report = Conversion(ready.quantizer.method_name, target.method_name)
    folds = ready.quantizer.folds
    jobs: list[Job] = []
    made: dict[str, Layout] = {}
    apart: dict[str, Job | None] = {}  # biases of stacks that are taken apart
    for entry in ready.plan.entries:
        sources = sources_of(ready, entry, target)
        own = {unit.name: unit.layout for source in sources for unit in source.units if unit.layout is not None}
        if not own and entry.action == "dense":
            fold = folds.get(entry.slot.parameter)
            jobs += [copy_job(ready.checkpoint, info, None, fold) for info in stored_of(entry)]
            continue
        made |= own
        jobs += [unit_job(ready, entry, source, report, allow_requantize, torch.device(device)) for source in sources]
        if sources[0].units[0].expert is not None:
            apart[f"{entry.slot.parameter}_bias"] = bias_job(ready, entry, sources[0])
    for key, infos in ready.plan.plain.items():
        biases = ready.plan.conversions.get(key)
        if key in ready.quantizer.attached:
            report.left_out += [info.name for info in infos]
        elif (cut := apart.get(key)) is not None:
            jobs.append(cut)
        elif isinstance(biases, ExpertBiases) and key not in apart:
            jobs.append(joined_biases(ready, biases))
        else:
            jobs += [copy_job(ready.checkpoint, info, None, folds.get(key)) for info in infos]
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


def unit_job(
    ready: Prepared, entry: Entry, source: Source, report: Conversion, allow_requantize: bool, device: torch.device
) -> Job:
    """The job that reads stored units and makes what they become; its `make` notes that in the report, or raises."""
    specs, shrinking = unit_specs(ready, entry, source)
    flipped = turned(entry, source)

    def make() -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for unit, (weight, dense, reason) in read(ready, entry, source, device):
            if unit.layout is None:
                rounded = dense.to(ready.plan.dtype)
                error = _error(rounded.float(), dense.float())
                report.modules.append(ConvertedModule(unit.name, DENSE, error, source.reason))
                found[dense_name(unit)] = (rounded.transpose(-1, -2).contiguous() if flipped else rounded).cpu()
                continue
            made = _converted(weight, dense, unit.name, unit.layout, report, allow_requantize, reason)
            found |= {join_name(unit.name, own): tensor.cpu() for own, tensor in unit.layout.encode(made).items()}
        ready.checkpoint.release()
        return found

    return Job(source.parts[0].prefix, specs, make, shrinking)


def _converted(
    weight: Weight | None,
    dense: Tensor,
    name: str,
    layout: Layout,
    report: Conversion,
    allow_requantize: bool,
    reason: str,
) -> Weight:
    """One unit in the layout, its fate noted in the report. `weight` None: only its numbers are there, for a `reason`."""

    inputs = ""
    if weight is not None:
        try:
            inputs, _ = _inputs(weight, layout.scheme())
            found, fate = kept(weight, dense, name, layout, allow_requantize)
            report.modules.append(fate)
            return found
        except NotRepresentable as refusal:
            reason = str(refusal)
    if not allow_requantize:
        raise NotRepresentable(
            f"{name} cannot be written as {report.target} with its codes kept: {reason}. Allow requantization "
            "(allow_requantize=True, --allow-requantize), or convert to a method whose groups and range fit"
        )
    if layout.algorithm is None or layout.static_inputs():
        raise CalibrationNeeded(
            f"{name} cannot be requantized to {type(layout).__name__} from its weights alone; the method needs calibration"
        )
    made = algorithms.get(layout.algorithm)(dense, layout.scheme(), **layout.algorithm_options())
    error = _error(_read_back(layout, made), dense.float())
    report.modules.append(ConvertedModule(name, REQUANTIZED, error, reason, inputs))
    return made


def kept(
    weight: Weight, dense: Tensor, name: str, layout: Layout, other_inputs: bool = False
) -> tuple[Weight, ConvertedModule]:
    """The weight in another layout with its codes kept, and how exactly. `dense`: its numbers, float32.

    Raises NotRepresentable where the layout has no such weight, or quantizes inputs otherwise and `other_inputs` is False.
    """
    inputs, alike = _inputs(weight, layout.scheme())
    found = rewrite(weight, layout.scheme())
    if not alike and not other_inputs:
        raise NotRepresentable(inputs)
    values = _read_back(layout, found)
    if torch.equal(values, dense):
        return found, ConvertedModule(name, EXACT, inputs=inputs)
    error = _error(values, dense)
    if error > MOST_RESCALED:
        raise NotRepresentable(
            f"rounding its scales would change it by {error:.1e}, more than rounding to 16 bits explains"
        )
    return found, ConvertedModule(name, RESCALED, error, ROUNDED, inputs)


def _read_back(layout: Layout, weight: Weight) -> Tensor:
    """The values that a reader of the target will see, float32."""
    return layout.decode(layout.encode(weight)).to_dense(torch.float32)


def _inputs(weight: Weight, scheme: Weight) -> tuple[str, bool]:
    """How the target quantizes inputs if that is not as the source does ("" if it is), and whether it is of the same kind.

    Of one kind are rules with the same numbers in the same groups, chosen while the model runs: they differ in rounding only.
    """
    mine, theirs = weight.activation, scheme.activation
    rules = [own.rule if own else "no rule" for own in (mine, theirs)]
    if rules[0] == rules[1]:
        return "", True
    if theirs is not None and any(tensor.is_meta for tensor in theirs.tensors):
        raise NotRepresentable(
            f"the target stores scales of its inputs ({rules[1]!r}), which the source ({rules[0]!r}) does not have"
        )
    alike = _kind(mine) == _kind(theirs)
    return f"the source quantizes its inputs by {rules[0]!r}, the target by {rules[1]!r}", alike


def _kind(activation: Activation | None) -> tuple[object, ...] | None:
    """What is quantized to what, without the arithmetic; static scales are no kind but one of their own."""
    if activation is None:
        return None
    one = activation
    dtype = SAME_NUMBERS.get(one.dtype, one.dtype)
    own = one.rule if one.tensors else None
    return dtype, one.granularity, one.group_size, one.symmetric, one.threshold, own


def _error(values: Tensor, wanted: Tensor) -> float:
    return float((values - wanted).norm() / wanted.norm().clamp(min=1e-30))
