"""From what a user types (--scheme, --method and --set, --config) to a configuration object."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anybit.cli.errors import UsageMistake
from anybit.errors import UnknownMethod, did_you_mean, near_path
from anybit.quantizers import registry
from anybit.quantizers.config import QuantizationConfigMixin
from anybit.quantizers.named import build, from_scheme, schemes

__all__ = ["chosen", "from_scheme", "methods", "parse_setting", "schemes"]


def methods() -> list[str]:
    """Names that --method takes: each `quant_method`."""
    return sorted({cls.method for cls in registry.config_classes() if cls.method})


def chosen(
    scheme: str | None, method: str | None, settings: Sequence[str] | None, file: Path | None, required: bool = False
) -> QuantizationConfigMixin | None:
    """The configuration that the options describe, or None without any."""
    given = [
        name for name, value in (("--scheme", scheme), ("--method", method), ("--config", file)) if value is not None
    ]
    if len(given) > 1:
        raise UsageMistake(f"{' and '.join(given)} exclude each other; --set changes options of any of them")
    options = dict(map(parse_setting, settings or ()))
    if scheme is not None:
        return from_scheme(scheme, options)
    if method is not None:
        cls = registry.config_class(method)
        if cls is None:
            raise UnknownMethod(method, methods())
        return build(cls, options, "Add them with --set NAME=VALUE")
    if file is not None:
        return _from_file(file, options)
    if options:
        raise UsageMistake("--set changes options of a --scheme, a --method or a --config; name one of them")
    if required:
        raise UsageMistake(
            "say how to quantize: --scheme NAME (e.g. nf4), --method NAME --set ..., or --config FILE.json"
        )
    return None


def parse_setting(text: str) -> tuple[str, Any]:
    """ "group_size=64" -> ("group_size", 64). A value is JSON where it can be read so, else text."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise UsageMistake(f"--set {text!r} is not NAME=VALUE")
    try:
        parsed = json.loads(value)
    except ValueError:
        parsed = {"True": True, "False": False, "None": None}.get(value, value)
    return name.strip(), parsed


def _from_file(file: Path, options: dict[str, Any]) -> QuantizationConfigMixin:
    from anybit.quantizers.auto import AutoQuantizationConfig
    from anybit.quantizers.checkpoint_config import read_json

    if not file.is_file():
        raise UsageMistake(f"--config {file}: there is no such file{near_path(file)}")
    data = read_json(file)
    inside = data.get("quantization_config", data)
    config = AutoQuantizationConfig.from_dict({**inside, **options} if isinstance(inside, dict) else inside)
    for name in config.extra_fields:
        near = did_you_mean(name, config.own_dict()) or "."
        warnings.warn(
            f"{file}: {type(config).__name__} has no option {name!r}{near} It is kept and changes nothing", stacklevel=2
        )
    return config
