"""Checks for the options of configuration classes. Each failure names the class, the option, its value and what is allowed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from anybit._lazy import torch
from anybit.errors import InvalidOption, did_you_mean

if TYPE_CHECKING:
    from anybit.quantizers.config import QuantizationConfigMixin

# names of torch.dtype members, so that a wrong one is noticed without loading torch
DTYPE_NAMES = frozenset({
    "float16", "float32", "float64", "bfloat16", "half", "float", "double", "bool",
    *(f"int{bits}" for bits in (1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 64)),
    *(f"uint{bits}" for bits in (1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 64)),
    "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2",
})  # fmt: skip
_SAME_DTYPE = {"half": "float16", "float": "float32", "double": "float64"}


class InvalidOptionType(InvalidOption, TypeError):
    """An option has a value of the wrong type; also a TypeError, as one expects."""


def listed(values: Iterable[Any]) -> str:
    """`a, b or c`."""
    words = [str(value) if isinstance(value, int) else repr(value) for value in values]
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def refuse(config: QuantizationConfigMixin, name: str, cure: str) -> InvalidOption:
    """The error for an option that cannot be used; `cure` says what can."""
    return InvalidOption(f"{type(config).__name__}: {name} is {getattr(config, name)!r}; {cure}")


def check_type(config: QuantizationConfigMixin, name: str, *types: type | None) -> None:
    """InvalidOptionType unless the option is one of `types` (None stands for itself; a bool is no int)."""
    value = getattr(config, name)
    for kind in types:
        if kind is None:
            if value is None:
                return
        elif isinstance(value, kind) and not (isinstance(value, bool) and kind in (int, float)):
            return
    names = " or ".join("null" if kind is None else kind.__name__ for kind in types)
    raise InvalidOptionType(
        f"{type(config).__name__}: {name} is {value!r} ({type(value).__name__}); it must be of type {names}"
    )


def check_choice(config: QuantizationConfigMixin, name: str, allowed: Iterable[Any]) -> None:
    """InvalidOption unless the option's value is one of `allowed`; names the closest."""
    value, allowed = getattr(config, name), list(allowed)
    if any(type(value) is type(choice) and value == choice for choice in allowed):
        return
    if isinstance(value, str) and any(str(choice) == value and not isinstance(choice, str) for choice in allowed):
        raise refuse(config, name, f"that is text, write the number {value}")
    hint = (
        did_you_mean(value, [choice for choice in allowed if isinstance(choice, str)]) if isinstance(value, str) else ""
    )
    raise refuse(config, name, f"it must be {listed(allowed)}{hint}")


def check_group_size(config: QuantizationConfigMixin, name: str = "group_size") -> None:
    """A positive number of inputs, or -1 for one group per row."""
    check_type(config, name, int)
    if getattr(config, name) != -1 and getattr(config, name) <= 0:
        raise refuse(config, name, "it must be a positive number of inputs, or -1 for one group per row")


def check_positive(config: QuantizationConfigMixin, *names: str) -> None:
    """Whole numbers above zero."""
    for name in names:
        check_type(config, name, int)
        if getattr(config, name) <= 0:
            raise refuse(config, name, "it must be a positive whole number")


def check_flags(config: QuantizationConfigMixin, *names: str) -> None:
    """True or False, not a number and not text."""
    for name in names:
        check_type(config, name, bool)


def check_objects(config: QuantizationConfigMixin, *names: str) -> None:
    """JSON objects, or None."""
    for name in names:
        check_type(config, name, dict, None)


def check_names(config: QuantizationConfigMixin, name: str) -> None:
    """A list of module names or patterns, or None."""
    check_type(config, name, list, tuple, None)
    for entry in getattr(config, name) or ():
        if not isinstance(entry, str):
            raise InvalidOptionType(
                f"{type(config).__name__}: {name} holds {entry!r}; it must be a list of module names"
            )


def parameter_owners(names: Iterable[str] | None) -> list[str] | None:
    """Module names from a list that names their weights; others are kept."""
    return None if names is None else [name.removesuffix(".weight") for name in names]


def dtype_name(value: Any, option: str = "dtype") -> str:
    """`torch.bfloat16`, "torch.bfloat16" or "bfloat16" -> "bfloat16", without loading torch. InvalidOption names the closest."""
    if type(value).__module__ == "torch" and type(value).__name__ == "dtype":
        return str(value).removeprefix("torch.")
    if not isinstance(value, str):
        raise InvalidOptionType(f"{option} is {value!r}; it must be a torch.dtype or its name, e.g. 'bfloat16'")
    name = value.removeprefix("torch.")
    if name not in DTYPE_NAMES:
        raise InvalidOption(f"{option} is {value!r}, which is no torch dtype{did_you_mean(name, sorted(DTYPE_NAMES))}")
    return _SAME_DTYPE.get(name, name)


class DtypeOption:
    """A dataclass field that takes a torch.dtype or its name, is kept as the name, and reads as a torch.dtype.

    Reading loads torch; setting, comparing and serializing do not. None means the default.
    """

    def __init__(self, default: str, allowed: tuple[str, ...] | None = None):
        self.default, self.allowed = default, allowed

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, config: Any, owner: type | None = None) -> Any:
        if config is None:
            return self.default
        return getattr(torch, config.__dict__[self.name])

    def __set__(self, config: Any, value: Any) -> None:
        option = f"{type(config).__name__}: {self.name}"
        name = self.default if value is None else dtype_name(value, option)
        if self.allowed is not None and name not in self.allowed:
            raise InvalidOption(f"{option} is {name!r}; it must be {listed(self.allowed)}")
        config.__dict__[self.name] = name
