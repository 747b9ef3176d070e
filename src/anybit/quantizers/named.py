"""The named schemes: data of the method files. Each configuration class may offer `schemes`, a mapping of name to options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anybit.errors import ConfigError, InvalidOption, did_you_mean
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


def from_scheme(name: str, options: Mapping[str, Any] | None = None) -> QuantizationConfigMixin:
    """The configuration of a named scheme, some options changed."""
    known = schemes()
    if name not in known:
        raise InvalidOption(
            f"no scheme {name!r}{did_you_mean(name, known) or '.'} `anybit methods` lists all {len(known)}"
        )
    cls, own = known[name]
    return build(cls, {**own, **(options or {})})


def build(cls: Config, options: Mapping[str, Any], cure: str = "Add them to the options") -> QuantizationConfigMixin:
    """A configuration object; InvalidOption where Python would complain about arguments."""
    try:
        config: QuantizationConfigMixin = cls(**options)
    except TypeError as error:
        if isinstance(error, ConfigError):
            raise
        raise InvalidOption(f"{cls.__name__}: {str(error).partition('() ')[2] or error}. {cure}") from error
    return config
