"""What the configurations of GPTQ and AWQ say of one module, and whether its stored tensors agree. No method of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from anybit.errors import InvalidOption, MissingTensor, ShapeMismatch
from anybit.quantizers.matching import compiled
from anybit.weight.layout import ModuleInfo


@dataclass(frozen=True)
class Settings:
    """What the configuration, `dynamic` included, says of one module."""

    bits: int
    group_size: int
    symmetric: bool
    format: str
    desc_act: bool


def settings_of(config: Any, module: str) -> Settings | None:
    """The module's settings: the first `dynamic` pattern that matches from the name's start wins. None: left dense."""
    dynamic = config.extra_fields.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise InvalidOption(
            f"{type(config).__name__}: dynamic is {dynamic!r}; it must map patterns of module names to options"
        )
    changed: dict[str, Any] = {}
    for pattern, values in dynamic.items():
        if compiled(pattern.removeprefix("-:").removeprefix("+:")).starts(module):
            if pattern.startswith("-:"):
                return None
            changed = dict(values or {})
            break
    else:
        pattern = ""
    own = {name: getattr(config, name) for name in ("bits", "group_size", "sym", "desc_act", "format")}
    if "checkpoint_format" in changed:
        changed["format"] = changed["checkpoint_format"]
    own.update({name: value for name, value in changed.items() if name in own and value is not None})
    if changed:
        try:
            own["format"] = type(config)(**own).format
        except InvalidOption as error:
            raise InvalidOption(f"dynamic {pattern!r}, which is {module}'s: {error}") from error
    return Settings(own["bits"], own["group_size"], bool(own["sym"]), own["format"], bool(own["desc_act"]))


def stays_dense(module: ModuleInfo) -> str | None:
    """Why a module is not among those that GPTQ and AWQ quantize, or None: their layouts hold the linears of the blocks."""
    if module.kind not in ("linear", "conv1d"):
        return f"the format stores linear layers, one by one; this is of kind {module.kind!r}"
    parts = module.name.split(".")
    if not any(part.isdigit() for part in parts):
        return "it lies outside the repeated blocks of the model"
    return "it is a router" if parts[-1] in ("gate", "router") else None


def check_stored(module: ModuleInfo, stored: Mapping[str, Any], settings: Settings, **shapes: tuple[int, ...]) -> None:
    """Tensors and configuration agree; otherwise say what the tensors look like instead."""
    rows, columns = module.shape
    for name, shape in shapes.items():
        full = f"{module.name}.{name}"
        if name not in stored:
            raise MissingTensor(
                f"tensor {full!r} is not in the checkpoint; of {module.name} there are {', '.join(sorted(stored))}"
            )
        found, dtype = tuple(stored[name].shape), stored[name].dtype
        allowed = ("float16", "bfloat16", "float32") if name == "scales" else ("int32",)
        if found == shape and dtype in allowed:
            continue
        hint = ""
        if name == "qweight" and len(found) == 2 and found[1] == rows and found[0] * 32 % columns == 0:
            hint = f"; that is {found[0] * 32 // columns} bits"
        if name == "scales" and len(found) == 2 and found[1] == rows and found[0] and columns % found[0] == 0:
            hint = f"; that is group_size {columns // found[0]}"
        raise ShapeMismatch(
            f"tensor {full!r} is {dtype} {found}{hint}. A weight {module.shape} of {settings.bits} bits in groups of "
            f"{settings.group_size}, as the configuration has it, needs {' or '.join(allowed)} {shape}"
        )


def makers_of(config: Any) -> dict[str, tuple[int, ...]]:
    """Tools that meta.quantizer ("tool:version", or a list of them) names, with their versions."""
    named = (config.meta or {}).get("quantizer") if isinstance(config.meta, Mapping) else None
    makers = {}
    for entry in named if isinstance(named, list) else [named]:
        tool, _, version = str(entry).lower().partition(":")
        makers[tool] = tuple(int(number) for number in re.findall(r"\d+", version)[:3])
    return makers
