"""What the configurations of GPTQ and AWQ say of one module, and whether its stored tensors agree. No method of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from anybit.errors import CalibrationNeeded, InvalidOption, MissingTensor, ShapeMismatch
from anybit.quantizers.options import check_type, refuse

if TYPE_CHECKING:
    from anybit.quantizers.matching import SafePattern
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
    for pattern, values in (config.dynamic or {}).items():
        if _pattern(pattern).starts(module):
            return None if pattern.startswith("-:") else _changed(config, pattern, values)
    return _changed(config, "", None)


def with_dynamic(config: Any, settings: Mapping[str, Any]) -> Any:
    """A copy of the configuration whose `dynamic` gives each named module another configuration's options, or leaves it dense."""
    found: dict[str, Any] = {}
    for module, other in settings.items():
        if other is None:
            found[f"-:^{re.escape(module)}$"] = {}
        else:
            found[f"+:^{re.escape(module)}$"] = {
                "bits": other.bits,
                "group_size": other.group_size,
                "sym": other.symmetric,
                "desc_act": bool(other.desc_act),
            }
    made = type(config).from_dict(config.to_dict())
    made.dynamic = {**found, **(config.dynamic or {})} or None
    made.post_init()
    return made


def check_dynamic(config: Any) -> None:
    """InvalidOption unless `dynamic` maps patterns to options that the configuration could have itself."""
    check_type(config, "dynamic", dict, None)
    for pattern, values in (config.dynamic or {}).items():
        if not isinstance(pattern, str) or not isinstance(values, (dict, type(None))):
            raise refuse(
                config,
                "dynamic",
                "it must map patterns of module names to options, e.g. {'+:.*down_proj': {'bits': 8}}",
            )
        _pattern(pattern)
        _changed(config, pattern, values)


def _pattern(pattern: str) -> SafePattern:
    from anybit.quantizers.matching import compiled

    return compiled(pattern.removeprefix("-:").removeprefix("+:"))


def _changed(config: Any, pattern: str, values: Mapping[str, Any] | None) -> Settings:
    own = {name: getattr(config, name) for name in ("bits", "group_size", "desc_act", "format")}
    changed = {name: value for name, value in (values or {}).items() if value is not None}
    changed.setdefault("format", changed.get("checkpoint_format", own["format"]))
    symmetric = changed.get("sym", config.symmetric)
    if values:
        try:
            config = type(config)(**{**own, **{name: changed[name] for name in own if name in changed}})
        except InvalidOption as error:
            raise InvalidOption(f"dynamic {pattern!r}: {error}") from error
    return Settings(config.bits, config.group_size, bool(symmetric), config.format, bool(config.desc_act))


def stays_dense(module: ModuleInfo) -> str | None:
    """Why a module is not among those that GPTQ and AWQ quantize, or None: their layouts hold the linears of the blocks."""
    if module.kind not in ("linear", "conv1d"):
        return f"the format stores linear layers, one by one; this is of kind {module.kind!r}"
    parts = module.name.split(".")
    if not any(part.isdigit() for part in parts):
        return "it lies outside the repeated blocks of the model"
    return "it is a router" if parts[-1] in ("gate", "router") else None


def refuse_calibration(config: Any) -> None:
    """CalibrationNeeded when a configuration asks for data; nothing is rounded to nearest behind the user's back."""
    asked = [name for name in ("dataset", "tokenizer") if getattr(config, name) is not None]
    if asked:
        raise CalibrationNeeded(
            f"{type(config).__name__} asks for calibration ({', '.join(asked)}), which quantizing at load does not run. Leave "
            f"out {' and '.join(asked)} to round to nearest, or load a checkpoint that was calibrated"
        )


def check_stored(
    module: ModuleInfo,
    stored: Mapping[str, Any],
    settings: Settings,
    specs: Mapping[str, tuple[str, tuple[int, ...]]],
    hint: str = "",
) -> None:
    """Tensors and configuration agree; otherwise name the tensor and say what it looks like instead (`hint`)."""
    for name, (dtype, shape) in specs.items():
        full = f"{module.name}.{name}"
        if name not in stored:
            raise MissingTensor(
                f"tensor {full!r} is not in the checkpoint; of {module.name} there are {', '.join(sorted(stored))}"
                f"{f' ({hint})' if hint else ''}"
            )
        found = tuple(stored[name].shape)
        if found != shape or stored[name].dtype != dtype:
            raise ShapeMismatch(
                f"tensor {full!r} is {stored[name].dtype} {found}{f'; {hint}' if hint else ''}. A weight {module.shape} of "
                f"{settings.bits} bits in groups of {settings.group_size} and format {settings.format!r}, as the "
                f"configuration has it, needs {dtype} {shape}"
            )
