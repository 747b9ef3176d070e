"""From what a user types (--scheme, --method and --set, --config) to a configuration object.

The named schemes are data of the method files: each configuration class may offer `schemes`, a mapping of name to options.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anybit.cli.errors import UsageMistake
from anybit.errors import ConfigError, InvalidOption, UnknownMethod, did_you_mean
from anybit.quantizers import registry
from anybit.quantizers.config import QuantizationConfigMixin

Config = type[QuantizationConfigMixin]


def schemes() -> dict[str, tuple[Config, dict[str, Any]]]:
    """Every named scheme: the configuration class that offers it, and its options."""
    found: dict[str, tuple[Config, dict[str, Any]]] = {}
    for cls in dict.fromkeys(registry.config_classes()):
        for name, options in getattr(cls, "schemes", {}).items():
            if name in found:
                raise ConfigError(
                    f"the scheme {name!r} is offered by both {found[name][0].__name__} and {cls.__name__}"
                )
            found[name] = (cls, dict(options))
    return found


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
        return _build(cls, options)
    if file is not None:
        return _from_file(file, options)
    if options:
        raise UsageMistake("--set changes options of a --scheme, a --method or a --config; name one of them")
    if required:
        raise UsageMistake(
            "say how to quantize: --scheme NAME (e.g. nf4), --method NAME --set ..., or --config FILE.json"
        )
    return None


def from_scheme(name: str, options: dict[str, Any] | None = None) -> QuantizationConfigMixin:
    """The configuration of a named scheme, some options changed."""
    known = schemes()
    if name not in known:
        raise InvalidOption(f"no scheme {name!r}{did_you_mean(name, known) or '.'} Schemes: {', '.join(known)}")
    cls, own = known[name]
    return _build(cls, {**own, **(options or {})})


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


def _build(cls: Config, options: dict[str, Any]) -> QuantizationConfigMixin:
    try:
        config: QuantizationConfigMixin = cls(**options)
    except TypeError as error:
        if isinstance(error, ConfigError):
            raise
        raise InvalidOption(
            f"{cls.__name__}: {str(error).partition('() ')[2] or error}. Add them with --set NAME=VALUE"
        ) from error
    return config


def _from_file(file: Path, options: dict[str, Any]) -> QuantizationConfigMixin:
    from anybit.quantizers.auto import AutoQuantizationConfig
    from anybit.quantizers.checkpoint_config import read_json

    if not file.is_file():
        raise UsageMistake(f"--config {file}: there is no such file")
    data = read_json(file)
    inside = data.get("quantization_config", data)
    config = AutoQuantizationConfig.from_dict({**inside, **options} if isinstance(inside, dict) else inside)
    for name in config.extra_fields:
        near = did_you_mean(name, config.own_dict()) or "."
        warnings.warn(
            f"{file}: {type(config).__name__} has no option {name!r}{near} It is kept and changes nothing", stacklevel=2
        )
    return config
