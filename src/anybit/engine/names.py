"""Which weight of the model does a stored tensor belong to?

transformers renames modules between a checkpoint and its classes and fuses experts. Its own conversion mapping is written for
dense tensors (`experts.*.gate_proj.weight`), so a packed tensor is placed by the dense name it stands for:

    ...experts.3.gate_proj.qweight  ->  ask for ...experts.3.gate_proj.weight  ->  part (3, 0) of ...experts.gate_up_proj

Conversions that only stack experts and concatenate rows keep their parts apart, packed or dense. One that gives the rows of a
matrix to several layers gives them the rows of a packed one. Any other conversion (transposes, rotary permutations) is applied
to dense tensors by transformers' own operations.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from anybit.engine.skeleton import Slot
from anybit.errors import CorruptFile
from anybit.weight.joining import Alternating

if TYPE_CHECKING:
    from torch import Tensor

Index = tuple["int | None", "int | None"]  # (expert, position among the rows); None where a weight is not cut that way
WHOLE: Index = (None, None)
Cut = tuple[str, int, int]  # (name of a stored unit, first row, rows of the unit)
# llmcompressor on transformers 5 takes experts apart under the class's new names, where the checkpoint's own are these
OLDER_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
# an expert's own layers -> (the stack that they are cut from, which of its rows)
CUT_EXPERTS: Mapping[str, tuple[str, int | None]] = {
    "gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1), "down_proj": ("down_proj", None),
}  # fmt: skip
_CUT_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
_EXPERT = re.compile(r"(\.experts\.\d+)\.(gate_proj|up_proj|down_proj)\.weight$")
# gptqmodel takes fused layers apart before it quantizes them (Phi-3) and saves the parts: part -> (layer, which of its rows)
FUSED = {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}


@dataclass
class Conversion:
    """Several stored dense tensors that become one or several tensors of the model by transformers' operations."""

    converter: Any
    renamed: str
    sources: list[tuple[str, str]] = field(default_factory=list)  # (stored name, the converter's pattern)

    @property
    def targets(self) -> list[str]:
        """Model keys this conversion makes."""
        first, *others = self.converter.target_patterns
        return [self.renamed, *(self.renamed.replace(first, other) for other in others)]

    @property
    def operations(self) -> Sequence[Any]:
        """What transformers does to the stored tensors."""
        return self.converter.operations if self.converter is not None else ()

    def run(self, read: Callable[[str], Tensor], model: nn.Module) -> dict[str, Tensor]:
        """Model key -> tensor."""
        converter = copy.deepcopy(self.converter)
        for name, pattern in sorted(self.sources, key=lambda source: _natural(source[0])):
            converter.add_tensor(self.renamed, name, pattern, read(name))
        made: dict[str, Any] = converter.convert(self.renamed, model=model, config=model.config)
        found = {key: value[0] if isinstance(value, list) else value for key, value in made.items()}
        missing = [target for target in self.targets if target not in found]
        if missing:
            raise CorruptFile(
                f"{[name for name, _ in self.sources][:4]} could not be converted to {missing[0]!r}: they gave {sorted(found)}"
            )
        return found


@dataclass
class ExpertBiases(Conversion):
    """Biases of experts' own layers that become one tensor [experts, out]. `places`: stored name -> index of its weight."""

    places: dict[str, Index] = field(default_factory=dict)

    @property
    def targets(self) -> list[str]:
        return [self.renamed]

    def run(self, read: Callable[[str], Tensor], model: nn.Module) -> dict[str, Tensor]:
        rows: dict[int | None, dict[int, Tensor]] = {}
        for name, (expert, position) in self.places.items():
            rows.setdefault(expert, {})[int(position or 0)] = read(name)
        experts = sorted(rows, key=lambda expert: expert or 0)
        turns = any(isinstance(position, Alternating) for _, position in self.places.values())
        made = [[rows[expert][position] for position in sorted(rows[expert])] for expert in experts]
        joined = [torch.stack(own, 1).flatten() if turns else torch.cat(own) for own in made]
        wanted = model.state_dict()[self.renamed].shape
        if len({tensor.shape for tensor in joined}) != 1 or (len(joined), *joined[0].shape) != tuple(wanted):
            raise CorruptFile(
                f"{self.renamed} [{', '.join(map(str, wanted))}] cannot be made of {len(self.places)} stored biases, e.g. "
                f"{self.sources[0][0]}: some are missing"
            )
        return {self.renamed: torch.stack(joined)}

    def split(self, joined: Tensor) -> dict[str, Tensor]:
        """Inverse of `run`: the tensor [experts, out] as it is stored."""
        experts = sorted({expert or 0 for expert, _ in self.places.values()})
        found = {}
        for name, (expert, position) in self.places.items():
            own = joined[experts.index(expert or 0)]
            if isinstance(position, Alternating):
                own = own[int(position) :: 2]
            elif position is not None:
                own = own.chunk(2)[position]
            found[name] = own.contiguous()
        return found


@dataclass(slots=True)
class Part:
    """Stored tensors of one unit of a weight: relative name -> stored name. `prefix`: the unit's checkpoint name.

    `dense`: what checkpoints of transformers call the unit, where that is another name; with "*" it is all experts of a stack.
    `cut`: the stored unit that the weight is some rows of, the first of them, and how many the unit has.
    """

    prefix: str
    stored: dict[str, str] = field(default_factory=dict)
    dense: str | None = None
    cut: Cut | None = None


@dataclass
class Sorted:
    """Every stored tensor in its place. `parts`: slot -> index -> part; `plain` and `conversions`: by model key."""

    parts: dict[str, dict[Index, Part]] = field(default_factory=dict)
    plain: dict[str, str] = field(default_factory=dict)
    conversions: dict[str, Conversion] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


class Names:
    """The names of one model class. `other_names`: a stored name -> names it may be placed by (see `HfQuantizer`)."""

    def __init__(
        self, model: nn.Module, slots: dict[str, Slot], other_names: Callable[[str], Sequence[str]] = lambda stored: ()
    ):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        mapping = get_model_conversion_mapping(model)
        self.renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self.converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._model = model
        self.state: dict[str, Any] = dict(model.state_dict())
        self.slots = slots
        self.other_names = other_names
        self.base_model_prefix = model.base_model_prefix
        self._modules = {name for name, _ in model.named_modules()}
        self._parts: dict[str, tuple[str, Index] | None] = {}
        # what `_beside` knows of a prefix: (model's name up to its last piece, slot, index)
        self._units: dict[str, tuple[str, str, Index] | None] = {}

    def sort(self, keys: Iterable[str]) -> Sorted:
        """Place every stored tensor."""
        found, keys = Sorted(), list(keys)
        shared = self._shared_units(keys)
        for key in keys:
            if self._in_biases(key, found) or self._beside(key, found):
                continue
            if shared and self._in_shared(key, shared, found):
                continue
            renamed, converter, pattern = self.rename(key)
            if converter is not None and not _keeps_parts(converter):
                conversion = Conversion(converter, renamed)
                targets = conversion.targets
                if all(target in self.state for target in targets):
                    conversion = found.conversions.setdefault(targets[0], conversion)
                    conversion.sources.append((key, pattern))
                    found.conversions.update(dict.fromkeys(targets[1:], conversion))
                    continue
            place = self._place(key, renamed)
            if place is not None:
                slot, index, prefix, relative, dense = place
                found.parts.setdefault(slot, {}).setdefault(index, Part(prefix, dense=dense)).stored[relative] = key
            elif renamed in self.state and converter is None:
                found.plain[renamed] = key
            elif renamed in self.state:
                conversion = found.conversions.setdefault(renamed, Conversion(converter, renamed))
                conversion.sources.append((key, pattern))
            else:
                found.unknown.append(key)
        return found

    def _beside(self, key: str, found: Sorted) -> bool:
        """Place a tensor that lies where a unit's dense weight would: nearly all of a packed checkpoint, and quickly."""
        prefix, _, relative = key.rpartition(".")
        if not prefix or relative == "weight":
            return False
        if prefix not in self._units:
            place = self._part(f"{prefix}.weight")
            self._units[prefix] = None if place is None else (place[0].removesuffix("weight"), *place)
        unit = self._units[prefix]
        if unit is None or unit[0] + relative in self.state:
            return False
        _, slot, index = unit
        parts = found.parts.setdefault(slot, {})
        part = parts.get(index)
        if part is None:  # a part belongs to one sorting: files are sorted again, with other tensors
            part = parts[index] = Part(prefix)
        part.stored[_relative(relative)] = key
        return True

    def _in_biases(self, key: str, found: Sorted) -> bool:
        """Place the bias of an expert's layer that was cut from a stack: the model has one tensor for those of all experts."""
        if not key.endswith(".bias") or ".experts." not in key:
            return False
        place = self._part(f"{key.removesuffix('bias')}weight")
        own = "" if place is None else f"{place[0]}_bias"
        if place is None or place[1][0] is None or own not in self.state:
            return False
        biases = found.conversions.setdefault(own, ExpertBiases(None, own))
        biases.sources.append((key, ""))
        biases.places[key] = place[1]  # type: ignore[attr-defined]
        return True

    def _shared_units(self, keys: Sequence[str]) -> dict[str, list[str]]:
        """Packed units whose rows belong to several layers, and the weights of those, in the order of their rows."""
        if not any(_gives_rows_away(converter) for converter in self.converters):
            return {}
        found: dict[str, list[str]] = {}
        known: dict[str, list[str]] = {}
        for key in keys:
            pieces = key.split(".")
            for cut in range(len(pieces) - 1, 0, -1):
                unit = ".".join(pieces[:cut])
                if unit not in known:
                    known[unit] = self._owners(unit)
                if known[unit] and pieces[cut:] not in (["weight"], ["bias"]):
                    found[unit] = known[unit]
                    break
        return found

    def _owners(self, unit: str) -> list[str]:
        """Weights of the linear layers that share the rows of a unit; none if it is no such unit."""
        renamed, converter, _ = self.rename(f"{unit}.weight")
        if converter is None or not _gives_rows_away(converter):
            return []
        targets = Conversion(converter, renamed).targets
        return targets if all(name in self.slots and self.slots[name].kind == "linear" for name in targets) else []

    def _in_shared(self, key: str, shared: Mapping[str, list[str]], found: Sorted) -> bool:
        """Place a tensor of a packed unit whose rows belong to several layers with each of them."""
        pieces = key.split(".")
        unit = next((name for cut in range(1, len(pieces)) if (name := ".".join(pieces[:cut])) in shared), None)
        if unit is None or key == f"{unit}.bias":
            return False
        heights = [self.slots[name].shape[0] for name in shared[unit]]
        for number, name in enumerate(shared[unit]):
            cut = (unit, sum(heights[:number]), sum(heights))
            part = found.parts.setdefault(name, {}).setdefault(WHOLE, Part(self.slots[name].module, cut=cut))
            part.stored[_relative(key[len(unit) + 1 :])] = key
        return True

    def rename(self, key: str) -> tuple[str, Any, str]:
        """The model's name of a stored dense tensor; with the converter and its pattern if several become one."""
        return self._rename(key, self._renamed(key))

    def _renamed(self, key: str) -> str:
        """A stored name after the renamings, before any converter."""
        from transformers.core_model_loading import apply_renamings

        return apply_renamings(key, self.renamings)

    def _rename(self, key: str, own: str) -> tuple[str, Any, str]:
        """See `rename`; `own`: the key after the renamings, which cost the most and are applied once."""
        from transformers.core_model_loading import rename_source_key

        renamed, pattern = rename_source_key(own, [], self.converters, self.base_model_prefix, self.state)
        if renamed not in self.state and key in self.state:
            return key, None, ""
        if pattern is None:
            return renamed, None, ""
        possible = [one for one in self.converters if pattern in one.source_patterns]
        if len(possible) == 1:
            return renamed, possible[0], pattern
        return renamed, next(one for one in possible if one.rename_source_key(own)[1] is not None), pattern

    def path_of(self, module: str) -> str | None:
        """The model's path of a module that the checkpoint calls `module`; None if the model has no such module."""
        from transformers.core_model_loading import apply_renamings

        path = apply_renamings(f"{module}.weight", self.renamings).removesuffix(".weight")
        base = f"{self.base_model_prefix}."
        for candidate in (path, base + path, path.removeprefix(base), module):
            if candidate in self._modules:
                return candidate
        return None

    def _place(self, key: str, renamed: str) -> tuple[str, Index, str, str, str | None] | None:
        """(slot, index, prefix, relative name, name of the dense unit if it has another one).

        None: an ordinary tensor, or one the model does not have.
        """
        if renamed in self.state and renamed not in self.slots:
            return None
        place = self._place_as(key)
        if place is not None:
            return *place, None
        for other in self.other_names(key):
            place = self._place_as(other)
            if place is not None:
                slot, index, dense, relative = place
                return slot, index, key.removesuffix(relative).rstrip("."), relative, dense
        return None

    def _place_as(self, key: str) -> tuple[str, Index, str, str] | None:
        """(slot, index, prefix, relative name) of a name that checkpoints of transformers could have."""
        pieces = key.split(".")
        names = [".".join(pieces[:cut]) for cut in range(len(pieces) + 1)]
        for cut in range(len(pieces), 0, -1):
            found = self._part(f"{names[cut - 1]}.weight") if cut > 1 else None  # a module
            if found is not None:
                return *found, names[cut - 1], _relative(".".join(pieces[cut - 1 :]))
            found = self._part(names[cut]) if not names[cut].endswith(".weight") else None  # of its own: 3-D experts
            if found is not None:
                return *found, names[cut], _relative(".".join(pieces[cut:]))
        # names appended without a dot: gate_up_proj_blocks; or beside the parameter: _gate_up_proj_scale
        head, _, last = key.rpartition(".")
        own = last.removeprefix("_")
        for match in reversed(list(re.finditer("_", own))):
            prefix = f"{head}.{own[: match.start()]}" if head else own[: match.start()]
            found = self._part(prefix)
            if found is not None:
                return *found, prefix, own[match.start() :] if own == last else f"/{last}"
        return None

    def _part(self, key: str) -> tuple[str, Index] | None:
        try:
            return self._parts[key]
        except KeyError:
            found = self._parts[key] = self._find_part(key)
            return found

    def _part_of_fused(self, renamed: str) -> tuple[str, Index] | None:
        """Place a layer that a quantizer cut from a fused one, known by its own name."""
        parent, _, last = renamed.removesuffix(".weight").rpartition(".")
        fused, position = FUSED.get(last, ("", 0))
        slot = f"{parent}.{fused}.weight"
        return (slot, (None, position)) if slot in self.slots and self.slots[slot].kind == "linear" else None

    def _expert_of_stack(self, renamed: str) -> tuple[str, Index] | None:
        """Place an expert's layer that a quantizer cut from a stack which the model class stores whole (GPT-OSS, Llama 4)."""
        match = _CUT_EXPERT.fullmatch(renamed)
        own, position = CUT_EXPERTS[match[3]] if match is not None else ("", None)
        slot = self.slots.get(f"{match[1]}.{own}") if match is not None else None
        if match is None or slot is None or slot.kind != "experts":
            return None
        return slot.parameter, (int(match[2]), self.position(slot, position))

    def position(self, slot: Slot, number: int | None) -> int | None:
        """Where an expert's gate (0) or up (1) lies in its rows: one above the other, or by turns as GPT-OSS has them."""
        turns = getattr(self.owner(slot), "is_concatenated", True) is False
        return Alternating(number) if turns and number is not None else number

    def owner(self, slot: Slot) -> Any:
        """The module of the model that a stack of experts is a parameter of."""
        return self._model.get_submodule(slot.parameter.rpartition(".")[0])

    def stores_stack(self, slot: Slot) -> bool:
        """Whether transformers' own checkpoints have all experts in one tensor, as the class holds them."""
        makes = [pattern.strip("^$.") for one in self.converters for pattern in one.target_patterns]
        return slot.kind == "experts" and not any(pattern in slot.parameter for pattern in makes)

    def _find_part(self, key: str) -> tuple[str, Index] | None:
        own = self._renamed(key)
        renamed, converter, pattern = self._rename(key, own)
        if renamed not in self.slots:
            older = _EXPERT.sub(lambda match: f"{match[1]}.{OLDER_NAMES[match[2]]}.weight", key)
            found = self._find_part(older) if older != key else self._part_of_fused(renamed)
            return found or self._expert_of_stack(renamed)
        if converter is None:
            return renamed, WHOLE
        if not _keeps_parts(converter):
            return None
        expert = None
        if "*" in pattern:
            numbers = _numbers_in(pattern).search(own)
            if numbers is None:
                return None
            expert = int(numbers.group(1)) if numbers.group(1) != "*" else None
        position = converter.source_patterns.index(pattern) if len(converter.source_patterns) > 1 else None
        return renamed, (expert, position)


def _relative(name: str) -> str:
    """As layouts name it: a leading underscore would mean that no dot comes before."""
    return f".{name}" if name.startswith("_") else name


def restored_names(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Dense tensors under model keys -> under checkpoint names, conversions undone by transformers."""
    from transformers.core_model_loading import revert_weight_conversion

    result: dict[str, Tensor] = revert_weight_conversion(model, dict(tensors))
    return result


def _keeps_parts(converter: Any) -> bool:
    """Whether the converter only stacks experts and concatenates along the rows of each."""
    kinds = [type(operation).__name__ for operation in converter.operations]
    if len(converter.target_patterns) != 1 or not set(kinds) <= {"MergeModulelist", "Concatenate"}:
        return False
    rows = 1 if "MergeModulelist" in kinds else 0
    return all(
        operation.dim == (0 if kind == "MergeModulelist" else rows)
        for operation, kind in zip(converter.operations, kinds)
    )


def _gives_rows_away(converter: Any) -> bool:
    """Whether the converter only gives the rows of one matrix to several layers, one after the other."""
    kinds = [type(operation).__name__ for operation in converter.operations]
    if kinds not in (["Chunk"], ["Split"]) or len(converter.source_patterns) != 1 or len(converter.target_patterns) < 2:
        return False
    return bool(converter.operations[0].dim == 0)


@functools.lru_cache(maxsize=256)
def _numbers_in(pattern: str) -> re.Pattern[str]:
    """What finds the number of an expert in a name that a converter's pattern matches."""
    return re.compile(re.escape(pattern.replace("\\", "")).replace(r"\*", r"(\d+|\*)"))


def _natural(key: str) -> list[tuple[int, str]]:
    """Sort key with numbers by value."""
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in key.split(".")]
