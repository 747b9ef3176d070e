"""What a stored weight becomes in another method: the same unit, one of each expert of a stack, or a stack of single experts.

A model class that holds all experts in one tensor (GPT-OSS, Llama 4) has them so in its own checkpoints. Methods that know only
matrices store each expert's gate, up and down apart, under the names that llm-compressor gives them and vLLM reads:

    mlp.experts.gate_up_proj [experts, 2 * inner, in]  <->  mlp.experts.3.gate_proj, mlp.experts.3.up_proj  [inner, in]

Where gate and up lie by turns in the rows of the stack they are taken apart by turns. Rows are only moved, so codes are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from anybit.engine.dequantize import stack_name
from anybit.engine.load import Prepared
from anybit.engine.materialize import assembled, dense_part, make_weight
from anybit.engine.names import CUT_EXPERTS, WHOLE, ExpertBiases
from anybit.engine.plan import Entry, PlannedPart, module_info
from anybit.engine.write import Job, Spec
from anybit.errors import NoKernel, NotRepresentable
from anybit.kernels import choose
from anybit.modules.packed import joined
from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.matching import matching_pattern
from anybit.weight import Layout, ModuleInfo, Weight
from anybit.weight.joining import Alternating, split_alternating, split_rows
from anybit.weight.layout import join_name

Rows = tuple[Weight | None, Tensor, str]  # a weight, its numbers in float32, and why there is no weight


@dataclass(frozen=True)
class Unit:
    """One weight of the result. `expert`: the one of a stored stack that it is, and `position`, which half of its rows.

    `layout` None: dense. `bare`: a stack, whose tensor has the unit's name with no ".weight" behind it.
    """

    name: str
    shape: tuple[int, ...]
    layout: Layout | None
    expert: int | None = None
    position: int | None = None
    bare: bool = False


@dataclass(frozen=True)
class Source:
    """Stored units that are read together, and what they become. `reason`: why they stay dense, if they do."""

    parts: tuple[PlannedPart, ...]
    units: tuple[Unit, ...]
    reason: str = ""

    def left_dense(self, reason: str) -> Source:
        """The same units, none of them packed."""
        return Source(self.parts, tuple(replace(unit, layout=None) for unit in self.units), reason)


def sources_of(ready: Prepared, entry: Entry, target: HfQuantizer) -> list[Source]:
    """What the stored units of a weight become. A stack is packed whole or not at all."""
    if not ready.names.stores_stack(entry.slot):
        found = [Source((part,), tuple(_units(ready, entry, part, target))) for part in entry.parts]
        refused = next((unit for source in found for unit in source.units if unit.layout is None), None)
        if refused is None:
            return found
        return [source.left_dense(_reason(target, refused.name, entry)) for source in found]
    stack = Source(tuple(entry.parts), (_stack(ready, entry, target),))
    if stack.units[0].layout is not None:
        return [stack]
    reason = _reason(target, stack.units[0].name, entry)
    if matching_pattern(entry.slot.module, target.modules_to_not_convert) is None:
        units = tuple(_experts(ready, entry, target))
        refused = next((unit for unit in units if unit.layout is None), None)
        reason = reason if refused is None else f"{reason}; one by one: {_reason(target, refused.name, entry)}"
        if units and refused is None:
            reason = _cannot_load(units) or ""
        if units and not reason:
            return [Source(tuple(entry.parts), units)]
    return [stack.left_dense(reason)]


def _reason(target: HfQuantizer, name: str, entry: Entry) -> str:
    """Why the target leaves a unit dense, in its own words."""
    found = target.skip_reasons.get(name) or target.skip_reasons.get(entry.slot.module)
    return found or f"the configuration of {target.method_name} leaves {entry.slot.module} dense"


def _cannot_load(units: Sequence[Unit]) -> str | None:
    """Why an expert's layers could not be one weight of the model again; decided on the meta device."""
    own = [unit for unit in units if unit.expert == units[0].expert]
    try:
        schemes = [unit.layout.scheme() for unit in own if unit.layout is not None]
        choose(joined([(unit.expert, unit.position) for unit in own], schemes), "cpu")
    except (NotRepresentable, NoKernel) as refusal:
        return f"gate and up of this model have their rows by turns, which layers stored apart cannot be put back to: {refusal}"
    return None


def _units(ready: Prepared, entry: Entry, part: PlannedPart, target: HfQuantizer) -> Iterator[Unit]:
    """A unit of the same name in transformers' checkpoints, or one of each expert of a stack under a name of the format's own."""
    name = part.prefix if entry.action == "dense" else part.dense_prefix
    if "*" not in name:
        info = module_info(entry.slot, part, entry.parts, ready.plan.dtype)
        info = replace(info, name=name) if info.name == part.prefix else info
        yield Unit(name, info.shape, target.layout_for(info), bare=entry.slot.kind == "experts" and part.index == WHOLE)
        return
    assert part.layout is not None
    experts, *shape = part.layout.shape
    for expert in range(experts):
        info = _linear(ready, name.replace("*", str(expert)), tuple(shape))
        yield Unit(info.name, info.shape, target.layout_for(info), expert)


def _linear(ready: Prepared, name: str, shape: tuple[int, ...], has_bias: bool = False) -> ModuleInfo:
    return ModuleInfo(name, "linear", shape, str(ready.plan.dtype).removeprefix("torch."), has_bias)


def _stack(ready: Prepared, entry: Entry, target: HfQuantizer) -> Unit:
    """All experts in one unit, as transformers' checkpoints of the class have them."""
    whole = entry.parts[0].index == WHOLE
    name = (entry.parts[0].dense_prefix if whole else stack_name(entry)) if entry.parts else entry.slot.module
    dtype = str(ready.plan.dtype).removeprefix("torch.")
    info = ModuleInfo(name, "experts", entry.slot.shape, dtype, False, entry.slot.class_name, entry.slot.transposed)
    return Unit(name, info.shape, target.layout_for(info), bare=True)


def _experts(ready: Prepared, entry: Entry, target: HfQuantizer) -> Iterator[Unit]:
    """The layers of single experts that a stack is taken apart to; none if it is of no known form."""
    whole = entry.parts[0].index == WHOLE
    start, _, own = (entry.parts[0].dense_prefix if whole else stack_name(entry)).rpartition(".")
    experts, rows, columns = entry.slot.shape
    layers = [(name, position) for name, (stack, position) in CUT_EXPERTS.items() if stack == own]
    if not start.endswith(".experts") or rows % max(len(layers), 1):
        return
    has_bias = f"{entry.slot.parameter}_bias" in ready.names.state
    for expert in range(experts):
        for name, position in layers:
            info = _linear(ready, f"{start}.{expert}.{name}", (rows // len(layers), columns), has_bias)
            place = ready.names.position(entry.slot, position)
            yield Unit(info.name, info.shape, target.layout_for(info), expert, place)


def unit_specs(ready: Prepared, entry: Entry, source: Source) -> tuple[dict[str, Spec], frozenset[str]]:
    """(dtype, shape) of every tensor that a source's units are stored as, and those whose sizes only data tells."""
    specs: dict[str, Spec] = {}
    shrinking: set[str] = set()
    for unit in source.units:
        if unit.layout is not None:
            specs |= {join_name(unit.name, own): spec for own, spec in unit.layout.specs().items()}
            shrinking |= {join_name(unit.name, own) for own in unit.layout.shrinking()}
        else:
            *lead, rows, columns = unit.shape
            shape = (*lead, columns, rows) if turned(entry, source) else unit.shape
            specs[dense_name(unit)] = str(ready.plan.dtype).removeprefix("torch."), shape
    return specs, frozenset(shrinking)


def dense_name(unit: Unit) -> str:
    """What a unit's only tensor is called where it stays dense."""
    return unit.name if unit.bare else join_name(unit.name, "weight")


def turned(entry: Entry, source: Source) -> bool:
    """Whether dense checkpoints store a source's units input first."""
    return entry.slot.transposed and (source.parts[0].index == WHOLE or source.units[0].bare) and (
        source.units[0].expert is None
    )  # fmt: skip


def read(ready: Prepared, entry: Entry, source: Source, device: torch.device) -> Iterator[tuple[Unit, Rows]]:
    """Every unit of a source with its weight, None where it was dense or its rows cannot be taken out as they are."""
    fold = ready.quantizer.folds.get(entry.slot.parameter) if ready.quantizer is not None else None
    if entry.action == "dense":
        parts = [(part, dense_part(ready.model, entry, part, ready.checkpoint)) for part in source.parts]
        dense = (parts[0][1] if len(parts) == 1 else assembled(parts)).to(device)
        for unit in source.units:
            yield unit, (None, _numbers(unit, dense), "it was stored dense")
        return
    weights = [make_weight(ready.model, entry, part, ready.checkpoint, device) for part in source.parts]
    whole = weights[0] if len(weights) == 1 else joined([part.index for part in source.parts], weights)
    del weights
    for unit in source.units:
        matrix = whole if unit.expert is None else whole.select(unit.expert)
        if fold is not None:
            yield unit, (None, fold(_numbers(unit, matrix.to_dense(torch.float32), one=True)), FOLDED)
            continue
        try:
            own = _own_rows(unit, matrix)
        except NotRepresentable as refusal:
            dense = _numbers(unit, matrix.to_dense(torch.float32), one=True)
            yield unit, (None, dense, f"its rows cannot be taken out of the stack: {refusal}")
            continue
        yield unit, (own, own.to_dense(torch.float32), "")


FOLDED = "it is stored together with scales or a rotation of its input, which only the source's method knows"


def _own_rows(unit: Unit, matrix: Weight) -> Weight:
    if unit.position is None:
        return matrix
    if isinstance(unit.position, Alternating):
        return split_alternating(matrix, 2)[int(unit.position)]
    return split_rows(matrix, [unit.shape[0], matrix.shape[0] - unit.shape[0]])[unit.position]


def _numbers(unit: Unit, dense: Tensor, one: bool = False) -> Tensor:
    """A unit's rows of a dense matrix, or of a stack of them."""
    own = dense if one or unit.expert is None else dense[unit.expert]
    if unit.position is None:
        return own
    if isinstance(unit.position, Alternating):
        return own[int(unit.position) :: 2]
    return own[unit.position * unit.shape[0] :][: unit.shape[0]]


# --- biases -------------------------------------------------------------------------------------------------------------------


def bias_job(ready: Prepared, entry: Entry, source: Source) -> Job | None:
    """Biases of a stack that is taken apart, each beside its layer; None where they are stored so, or there are none."""
    key = f"{entry.slot.parameter}_bias"
    infos = ready.plan.plain.get(key, ())
    if len(infos) != 1 or isinstance(ready.plan.conversions.get(key), ExpertBiases):
        return None
    (info,) = infos
    names: Mapping[str, Unit] = {join_name(unit.name, "bias"): unit for unit in source.units}

    def make() -> dict[str, Tensor]:
        stored = ready.checkpoint.read(info.name)
        return {name: _numbers(unit, stored).contiguous() for name, unit in names.items()}

    return Job(info.name, {name: (info.dtype, unit.shape[:1]) for name, unit in names.items()}, make)
