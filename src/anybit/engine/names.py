"""Which weight of the model does a stored tensor belong to?

transformers renames modules between a checkpoint and its classes and fuses experts. Its own conversion mapping is written for
dense tensors (`experts.*.gate_proj.weight`), so a packed tensor is placed by the dense name it stands for:

    ...experts.3.gate_proj.qweight  ->  ask for ...experts.3.gate_proj.weight  ->  part (3, 0) of ...experts.gate_up_proj
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from anybit.engine.skeleton import Slot


@dataclass(frozen=True)
class Place:
    """Where a stored tensor goes: a weight slot, which part of it, and the tensor's name within the part.

    `prefix` is the checkpoint's name of the part (its module, or the 3-D parameter). `index`: (expert, row position).
    """

    slot: str
    prefix: str
    relative: str
    index: tuple[int | None, int | None] = (None, None)


class Names:
    """The names of one model class, looked up both ways."""

    def __init__(self, model: nn.Module, slots: dict[str, Slot]):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self.mapping = get_model_conversion_mapping(model)  # type: ignore[arg-type]
        self.renamings = [entry for entry in self.mapping if isinstance(entry, WeightRenaming)]
        self.converters = [entry for entry in self.mapping if isinstance(entry, WeightConverter)]
        self.state: dict[str, Any] = dict(model.state_dict())
        self.slots = slots
        self.base_model_prefix = model.base_model_prefix
        self._parts: dict[str, tuple[str, tuple[int | None, int | None]] | None] = {}
        self.converter_of: dict[str, Any] = {}  # state dict key -> converter that builds it from several stored tensors

    def rename(self, key: str) -> tuple[str, str | None]:
        """The model's name of a stored dense tensor, and the converter's pattern if several tensors become one."""
        from transformers.core_model_loading import rename_source_key

        renamed, pattern = rename_source_key(key, self.renamings, self.converters, self.base_model_prefix, self.state)
        if renamed not in self.state and key in self.state:
            return key, None
        if pattern is not None and renamed in self.state:
            for converter in self.converters:
                if pattern in converter.source_patterns:
                    self.converter_of[renamed] = converter
        return renamed, pattern

    def place(self, key: str) -> Place | None:
        """The weight slot a stored tensor belongs to, or None: an ordinary tensor, or one the model does not have."""
        renamed, _ = self.rename(key)
        if renamed in self.state and renamed not in self.slots:
            return None
        pieces = key.split(".")
        for cut in range(len(pieces), 0, -1):
            prefix, relative = ".".join(pieces[:cut]), ".".join(pieces[cut:])
            found = self._part(prefix) if cut < len(pieces) else None  # a module: its dense weight is prefix.weight
            if found is None and not prefix.endswith(".weight"):
                found = self._part(prefix, whole=True)  # a parameter of its own: 3-D experts
            if found is not None:
                return Place(found[0], prefix, relative, found[1])
        # names appended without a dot: gate_up_proj_blocks
        head, _, last = key.rpartition(".")
        for match in reversed(list(re.finditer("_", last))):
            prefix = f"{head}.{last[: match.start()]}" if head else last[: match.start()]
            found = self._part(prefix, whole=True)
            if found is not None:
                return Place(found[0], prefix, last[match.start() :], found[1])
        return None

    def _part(self, prefix: str, whole: bool = False) -> tuple[str, tuple[int | None, int | None]] | None:
        key = prefix if whole else f"{prefix}.weight"
        if key not in self._parts:
            self._parts[key] = self._find_part(key)
        return self._parts[key]

    def _find_part(self, key: str) -> tuple[str, tuple[int | None, int | None]] | None:
        renamed, pattern = self.rename(key)
        slot = self.slots.get(renamed)
        if slot is None:
            return None
        if pattern is None:
            return renamed, (None, None)
        converter = self.converter_of[renamed]
        expert = None
        if "*" in pattern:
            numbers = re.search(re.escape(pattern).replace(r"\*", r"(\d+)").replace(r"\\\.", r"\."), self._intermediate(key))
            expert = int(numbers.group(1)) if numbers else None
        position = converter.source_patterns.index(pattern) if len(converter.source_patterns) > 1 else None
        return renamed, (expert, position)

    def _intermediate(self, key: str) -> str:
        """The key after renamings and before a converter took it."""
        from transformers.core_model_loading import apply_renamings

        return apply_renamings(key, self.renamings)
