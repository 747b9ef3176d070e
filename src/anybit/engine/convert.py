"""From one method to another, file to file: through the weight tree, without a model's dense weights in memory.

Each stored unit ends in one of four ways: `exact` (the same values, compared), `rescaled` (the same codes; scales and offsets
rounded to the nearest number of the target's dtype, products perhaps rounded in another one; error stated, and never above
MOST_RESCALED), `requantized` (codes chosen anew, only when allowed; error stated) or `dense` (the target leaves it dense; rounded
to the model's dtype). A target that quantizes inputs in another way keeps the weight, but that too must be allowed and is stated.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
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
from anybit.weight.elements import without_codes
from anybit.weight.layout import join_name
from anybit.weight.rewriting import rewrite

EXACT, RESCALED, REQUANTIZED, DENSE = "exact", "rescaled", "requantized", "dense"
# Relative error of a weight that rounding its scale and its offset to bfloat16 explains: 2^-9 each, where both may be twice as
# large as what they add up to. More than that is another weight.
MOST_RESCALED = 2.0**-7
ROUNDED = "the target stores its scales or offsets in fewer bits, or multiplies them in another dtype"
# A weight stored as floats that were made of codes (FP-Quant's pseudo form) and rounded to bfloat16: half a step of it is 2^-9 of
# a number. Codes that explain the floats up to that are the ones they were made of.
ROUNDED_ONCE = 2.0**-9
FOUND_AGAIN = "the source stores floats rounded to 16 bits, made of codes that were found again"
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
            stored_as = source.parts[0].layout
            made = _converted(weight, dense, unit.name, unit.layout, report, allow_requantize, reason, stored_as)
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
    stored_as: Layout | None = None,
) -> Weight:
    """One unit in the layout, its fate noted in the report. `weight` None: only its numbers are there, for a `reason`."""

    inputs = ""
    if weight is not None:
        try:
            weight, note = with_inputs(weight, stored_as, layout)
            found, fate = kept(weight, dense, name, layout, allow_requantize)
            report.modules.append(replace(fate, inputs=fate.inputs or note))
            return found
        except NotRepresentable as refusal:
            reason = str(refusal)
    floats = weight is not None and without_codes(weight.tree)
    made = _rounded(weight, dense, layout) if allow_requantize or floats else None
    error = 0.0 if made is None else _error(_read_back(layout, made), dense.float())
    if weight is not None:
        inputs, alike = _inputs(weight, layout.scheme(), refuse=False)
        if made is not None and (alike or allow_requantize) and (error == 0 or (floats and error < ROUNDED_ONCE)):
            kind, why = (RESCALED, FOUND_AGAIN) if error else (EXACT, "")
            report.modules.append(ConvertedModule(name, kind, error, why, inputs))
            return made
    if not allow_requantize:
        raise NotRepresentable(
            f"{name} cannot be written as {report.target} with its codes kept: {reason}. Allow requantization "
            "(allow_requantize=True, --allow-requantize), or convert to a method whose groups and range fit"
        )
    if made is None:
        what = (
            f"{type(layout).__name__} stores scales of its inputs, which only data tell"
            if layout.algorithm is not None
            else f"{type(layout).__name__} has its codes fitted to data"
        )
        raise CalibrationNeeded(
            f"{name} cannot be requantized from its weights alone: {what}, and its own cannot be kept: {reason}. Dequantize the "
            "source, then quantize it with calibration data"
        )
    report.modules.append(ConvertedModule(name, REQUANTIZED, error, reason, inputs))
    return made


def _rounded(weight: Weight | None, dense: Tensor, layout: Layout) -> Weight | None:
    """Codes chosen by the layout's own rule. None where data would have to tell something."""
    wanted, given = layout.scheme().activation, None if weight is None else weight.activation
    static = layout.static_inputs()
    same = given is not None and wanted is not None and given.rule == wanted.rule
    if layout.algorithm is None or (static and not same):
        return None
    scheme = replace(layout.scheme(), activation=None) if static else layout.scheme()
    made = algorithms.get(layout.algorithm)(dense, scheme, **layout.algorithm_options())
    return replace(made, activation=given) if same else made


def with_inputs(weight: Weight, stored_as: Layout | None, layout: Layout) -> tuple[Weight, str]:
    """The weight with the static scale of its inputs as the target stores it, where both have one for codes of the same kind;
    and what was done to it.

    What the largest code stands for is asked of both layouts, in which scales are proportional to it or inversely so.
    """
    mine, theirs = weight.activation, layout.scheme().activation
    if stored_as is None or mine is None or theirs is None or mine.rule == theirs.rule:
        return weight, ""
    if len(mine.tensors) != 1 or len(theirs.tensors) != 1 or _kind(mine, True) != _kind(theirs, True):
        return weight, ""
    (own,), (wanted,) = mine.tensors, theirs.tensors
    if mine.names == theirs.names and own.shape == wanted.shape:  # two rules of one format
        return replace(weight, activation=replace(theirs, tensors=mine.tensors)), ""
    source, target = _probed(stored_as), _probed(layout)
    if source is None or target is None or own.numel() != 1 or wanted.numel() != 1:
        return weight, ""
    number = own.double().cpu().reshape(())
    largest = number / source[0] if source[1] else source[0] / number
    exact = largest * target[0] if target[1] else target[0] / largest
    found = exact.to(wanted.dtype)
    off = float((found.double() - exact).abs() / exact)
    note = f"the static scale of its inputs is kept, {off:.0e} off where it is stored as {str(wanted.dtype)[6:]}"
    made = replace(theirs, tensors=(found.reshape(wanted.shape).to(own.device),))
    return replace(weight, activation=made), note if off > 2.0**-22 else ""


def _probed(layout: Layout) -> tuple[Tensor, bool] | None:
    """The static scale that a layout stores for inputs up to 1, float64, and whether it grows with them; None without a rule."""
    found = []
    for largest in (1.0, 2.0):
        numbers = torch.tensor([largest], dtype=torch.float64)
        try:
            (scale,) = layout.measured_inputs(-numbers, numbers).tensors
        except (NotImplementedError, NotRepresentable):
            return None
        found.append(scale.double().reshape(-1))
    one, two = found
    return (one.reshape(()), bool(two > one)) if one.numel() == 1 and bool(one > 0) else None


def kept(
    weight: Weight, dense: Tensor, name: str, layout: Layout, other_inputs: bool = False
) -> tuple[Weight, ConvertedModule]:
    """The weight in another layout with its codes kept, and how exactly. `dense`: its numbers, float32.

    Raises NotRepresentable where the layout has no such weight, or quantizes inputs otherwise and `other_inputs` is False.
    """
    target = layout.target()
    inputs, alike = _inputs(weight, target)
    found = rewrite(weight, target)
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


def _inputs(weight: Weight, scheme: Weight, refuse: bool = True) -> tuple[str, bool]:
    """How the target quantizes inputs if that is not as the source does ("" if it is), and whether it is of the same kind.

    Of one kind are rules with the same numbers in the same groups, chosen while the model runs: they differ in rounding only.
    """
    mine, theirs = weight.activation, scheme.activation
    rules = [own.rule if own else "no rule" for own in (mine, theirs)]
    if rules[0] == rules[1]:
        return "", True
    if refuse and theirs is not None and any(tensor.is_meta for tensor in theirs.tensors):
        raise NotRepresentable(
            f"the target stores scales of its inputs ({rules[1]!r}), which the source ({rules[0]!r}) does not have"
        )
    alike = _kind(mine) == _kind(theirs)
    return f"the source quantizes its inputs by {rules[0]!r}, the target by {rules[1]!r}", alike


def _kind(activation: Activation | None, static: bool = False) -> tuple[object, ...] | None:
    """What is quantized to what, without the arithmetic; static scales are no kind but one of their own, unless `static`."""
    if activation is None:
        return None
    one = activation
    dtype = SAME_NUMBERS.get(one.dtype, one.dtype)
    own = one.rule if one.tensors and not static else None
    return dtype, one.granularity, one.group_size, one.symmetric, one.threshold, own


def _error(values: Tensor, wanted: Tensor) -> float:
    return float((values - wanted).norm() / wanted.norm().clamp(min=1e-30))
