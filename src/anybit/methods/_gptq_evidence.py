"""What a GPTQ checkpoint's tensors tell that its configuration does not say. No method of its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from anybit._lazy import torch
from anybit.errors import CheckpointError, CorruptFile, MissingTensor
from anybit.methods._per_module import Settings
from anybit.methods._words import read_codes
from anybit.weight.layout import ModuleInfo

if TYPE_CHECKING:
    from torch import Tensor

Peek = Callable[[str], "Tensor"]


def index_kind(
    config: Any, module: ModuleInfo, settings: Settings, stored: Mapping[str, Any], peek: Peek, group_size: int
) -> str:
    """What g_idx says: "absent", "plain" (runs of group_size), "unused" (all zero), "columns" (act-order)."""
    columns = module.shape[1]
    static = config.extra_fields.get("static_groups", (config.meta or {}).get("static_groups"))
    reordered = settings.desc_act and not static and columns > group_size
    if "g_idx" not in stored:
        if reordered:
            raise MissingTensor(
                f"tensor '{module.name}.g_idx' is not in the checkpoint; with desc_act it tells the groups of the columns"
            )
        return "absent"
    if (stored["g_idx"].dtype, tuple(stored["g_idx"].shape)) != ("int32", (columns,)):
        return "plain"  # the plan names what is wrong with it
    index = peek("g_idx")
    if torch.equal(index, torch.arange(columns, dtype=torch.int32, device=index.device) // group_size):
        return "plain"
    if bool(index.any()):
        return "columns"
    if reordered:
        raise CorruptFile(
            f"tensor '{module.name}.g_idx' is all zero, but with desc_act it tells the groups of the columns"
        )
    return "unused"


def zero_convention(config: Any, module: ModuleInfo, settings: Settings, peek: Peek) -> str:
    """How qzeros are meant (`GptqLayout`). Where the maker is unknown, the stored words are the evidence."""
    if settings.format != "gptq":
        return "v2"
    makers = makers_of(config)
    if "anybit" in makers or makers.get("gptqmodel", (0,)) >= (0, 9):
        return "v1"
    if settings.symmetric:
        return "v1_agreed"
    bits, words = settings.bits, peek("qzeros")
    top = (1 << bits) - 1
    fields = read_codes(words, bits, module.shape[0], f"{module.name}.qzeros", is_planar(settings)).integers()
    if not bool((fields == top).any()):
        return "v1_agreed"
    if {"auto_gptq", "autogptq"} & set(makers) or _ones_reach_the_top(words, bits):
        return "v1_unmasked"
    raise CheckpointError(
        f"tensor '{module.name}.qzeros' stores {top} for some zero points. gptqmodel from 0.9.0 means 0 by it, AutoGPTQ "
        f"{top + 1}; meta.quantizer names neither, and AutoGPTQ would have filled these words with ones to their top. "
        'Write the maker into the configuration: "meta": {"quantizer": ["gptqmodel:0.9.0"]} or ["auto_gptq:0.7.1"]'
    )


def is_planar(settings: Settings) -> bool:
    """Whether codes are cut into planes: widths that gptqmodel stores no other way, and 3 bits of format gptq_p."""
    return settings.bits in (5, 6, 7) or (settings.bits == 3 and settings.format == "gptq_p")


def resemblance(stored: Mapping[str, Any], rows: int, columns: int) -> str:
    """Width and group size that the tensors themselves show, for a message."""
    shapes = {name: tuple(stored[name].shape) for name in ("qweight", "scales") if name in stored}
    shown = []
    for name, (words, _) in ((name, shape) for name, shape in shapes.items() if len(shape) == 2 and shape[1] == rows):
        if name == "qweight" and words * 32 % columns == 0:
            shown.append(f"qweight holds {words * 32 // columns} bits")
        if name == "scales" and words and columns % words == 0:
            shown.append(f"scales are of groups of {columns // words}")
    return ", ".join(shown)


def makers_of(config: Any) -> dict[str, tuple[int, ...]]:
    """Tools that meta.quantizer ("tool:version", or a list of them) names, with their versions."""
    named = (config.meta or {}).get("quantizer") if isinstance(config.meta, Mapping) else None
    makers = {}
    for entry in named if isinstance(named, list) else [named]:
        tool, _, version = str(entry).lower().partition(":")
        makers[tool] = tuple(int(number) for number in re.findall(r"\d+", version)[:3])
    return makers


def _ones_reach_the_top(words: Any, bits: int) -> bool:
    """Whether every field of ones has ones above it in its word: AutoGPTQ ORs a zero point of -1 in as 32 ones."""
    top = (1 << bits) - 1
    for place in range(0, 32 * bits, bits):
        word, shift = divmod(place, 32)
        above = words[:, word::bits] >> shift  # arithmetic: -1 when all are ones
        if shift + bits <= 32 and bool((((above & top) == top) & (above != -1)).any()):
            return False
    return True
