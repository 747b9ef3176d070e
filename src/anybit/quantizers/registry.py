"""Names -> configuration and quantizer classes. Filled by the method files and plugins themselves, when they are imported.

A look-up imports the one file the name points to; on a miss every method file, then the plugins of the entry point group.
There is no list of methods anywhere: the folder `anybit/methods` is the list.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from anybit.errors import InvalidOption, PluginError, UnknownMethod
from anybit.quantizers.config import QuantizationConfigMixin

if TYPE_CHECKING:
    from anybit.quantizers.base import HfQuantizer

ENTRY_POINT_GROUP = "anybit.methods"
METHODS_PACKAGE = "anybit.methods"
Class = TypeVar("Class", bound=type)

_configs: dict[str, type[QuantizationConfigMixin]] = {}
_quantizers: dict[str, type[HfQuantizer]] = {}
_state = {"methods": False, "plugins": False}


def register_quantization_config(method: str) -> Callable[[Class], Class]:
    """Class decorator: make a QuantizationConfigMixin subclass the configuration of `quant_method` = `method`."""

    def register(cls: Class) -> Class:
        _register(_configs, "configuration", method, cls, QuantizationConfigMixin)
        return cls

    return register


def register_quantizer(name: str) -> Callable[[Class], Class]:
    """Class decorator: make an HfQuantizer subclass the quantizer of that name."""

    def register(cls: Class) -> Class:
        from anybit.quantizers.base import HfQuantizer

        _register(_quantizers, "quantizer", name, cls, HfQuantizer)
        return cls

    return register


def _register(table: dict[str, Any], what: str, name: str, cls: Any, base: type) -> None:
    if not isinstance(cls, type) or not issubclass(cls, base):
        raise TypeError(
            f"{cls!r} cannot be the {what} {name!r}: it must be a class derived from anybit's {base.__name__}"
        )
    find_module(name)  # a built-in method's file registers first, so that a plugin cannot take its name
    taken = table.get(name)
    if taken is not None:
        raise InvalidOption(
            f"the {what} {name!r} is already registered by {taken.__module__}.{taken.__qualname__}; "
            f"{cls.__module__}.{cls.__qualname__} needs another name"
        )
    table[name] = cls


# --- look-up -------------------------------------------------------------------------------------------------------------


@functools.cache
def module_names() -> tuple[str, ...]:
    """Method files, by name."""
    import pkgutil

    package = importlib.import_module(METHODS_PACKAGE)
    return tuple(sorted(item.name for item in pkgutil.iter_modules(package.__path__) if not item.name.startswith("_")))


def find_module(name: str) -> None:
    """Import the method file that `name` points to: its own spelling, or the part before a `_suffix`."""
    known = module_names()
    stem = name.replace("-", "_")
    while stem:
        if stem in known:
            importlib.import_module(f"{METHODS_PACKAGE}.{stem}")
            return
        stem = stem.rpartition("_")[0]


def import_methods() -> None:
    """Import every method file."""
    if not _state["methods"]:
        for name in module_names():
            importlib.import_module(f"{METHODS_PACKAGE}.{name}")
        _state["methods"] = True


def import_plugins(wanted: str) -> None:
    """Import the plugin of that name, or else every plugin once. PluginError names the first that fails.

    A plugin that fails is tried again at the next miss; what it had registered before it failed is forgotten.
    """
    if _state["plugins"]:
        return
    from importlib.metadata import entry_points

    found = sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda point: point.name != wanted)
    failures: list[tuple[Any, Exception]] = []
    tables: tuple[dict[str, Any], ...] = (_configs, _quantizers)
    for point in found:
        before = [set(table) for table in tables]
        try:
            point.load()
        except Exception as error:
            failures.append((point, error))
            for table, registered in zip(tables, before, strict=True):
                for name in set(table) - registered:
                    del table[name]
        if wanted in _configs or wanted in _quantizers:
            return
    for point, failure in failures:
        package = point.dist.name if point.dist is not None else "an unknown package"
        raise PluginError(
            f"plugin {point.name!r} ({point.value}, installed by {package}) failed while {wanted!r} was looked for: "
            f"{type(failure).__name__}: {failure}. Repair it or uninstall {package}"
        ) from failure
    _state["plugins"] = True


def _find(look: Callable[[], Any], name: str, plugins: bool = True) -> Any:
    """`look()` after each step, cheapest step first; None when the last one changes nothing."""
    steps: list[Callable[[], None]] = [lambda: find_module(name), import_methods]
    if plugins:
        steps.append(lambda: import_plugins(name))
    for step in steps:
        found = look()
        if found is not None:
            return found
        step()
    return look()


def quantizer_class(name: str) -> type[HfQuantizer]:
    """The quantizer class of that name. UnknownMethod names the closest and lists all."""
    found: type[HfQuantizer] | None = _find(lambda: _quantizers.get(name), name)
    if found is None:
        raise UnknownMethod(name, _quantizers)
    return found


def config_class(name: str, plugins: bool = True) -> type[QuantizationConfigMixin] | None:
    """The configuration class of that registered name or `quant_method`; None when there is none."""

    def look() -> type[QuantizationConfigMixin] | None:
        return _configs.get(name) or next((cls for cls in _configs.values() if cls.method == name), None)

    found: type[QuantizationConfigMixin] | None = _find(look, name, plugins)
    return found


def config_classes() -> Iterator[type[QuantizationConfigMixin]]:
    """Every configuration class, each once; method files are imported as far as the caller goes."""
    yield from _each(_configs, module_names())


def _each(table: Mapping[str, Any], modules: Iterable[str]) -> Iterator[Any]:
    """The different classes of a registry: those already in it, then those that each further file adds."""
    seen: dict[Any, None] = {}
    for module in (None, *modules):
        if module is not None:
            importlib.import_module(f"{METHODS_PACKAGE}.{module}")
        for cls in [cls for cls in dict.fromkeys(table.values()) if cls not in seen]:
            seen[cls] = None
            yield cls


def method_names() -> list[str]:
    """Every name a quantizer is registered under."""
    import_methods()
    return sorted(_quantizers)


Value = TypeVar("Value")


class LiveMapping(Mapping[str, Value], Generic[Value]):
    """A view of a registry: a look-up imports what it needs, iteration imports every method file."""

    def __init__(self, table: dict[str, Value]):
        self._table = table

    def __getitem__(self, name: str) -> Value:
        found: Value | None = _find(lambda: self._table.get(name), name) if isinstance(name, str) else None
        if found is None:
            raise KeyError(name)
        return found

    def __iter__(self) -> Iterator[str]:
        import_methods()
        return iter(list(self._table))

    def __len__(self) -> int:
        import_methods()
        return len(self._table)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(sorted(self))})"


AUTO_QUANTIZER_MAPPING: LiveMapping[type[HfQuantizer]] = LiveMapping(_quantizers)
AUTO_QUANTIZATION_CONFIG_MAPPING: LiveMapping[type[QuantizationConfigMixin]] = LiveMapping(_configs)


def class_named(name: str) -> type | None:
    """A configuration or quantizer class by its own name, e.g. "GPTQConfig"; None when no method file has it."""
    # files whose name occurs in the class's name come first: usually no other one is imported
    near = sorted(module_names(), key=lambda module: module.replace("_", "") not in name.lower())
    table: Mapping[str, Any] = _quantizers if name.endswith("Quantizer") else _configs
    return next((cls for cls in _each(table, near) if cls.__name__ == name), None)
