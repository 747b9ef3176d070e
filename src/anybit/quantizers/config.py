"""What all configuration classes share: names of the methods, dictionaries in and out, and how a file is recognized."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

from anybit.errors import ConfigError, InvalidOption, NotRepresentable, did_you_mean

if TYPE_CHECKING:
    import os
    from pathlib import Path


class QuantizationMethod(str, Enum):
    """The values of `quant_method` that transformers 5.23 knows."""

    BITS_AND_BYTES = "bitsandbytes"
    GPTQ = "gptq"
    AWQ = "awq"
    AQLM = "aqlm"
    VPTQ = "vptq"
    QUANTO = "quanto"
    EETQ = "eetq"
    HIGGS = "higgs"
    HQQ = "hqq"
    COMPRESSED_TENSORS = "compressed-tensors"
    FBGEMM_FP8 = "fbgemm_fp8"
    TORCHAO = "torchao"
    GGUF = "gguf"
    BITNET = "bitnet"
    SPQR = "spqr"
    FP8 = "fp8"
    QUARK = "quark"
    FPQUANT = "fp_quant"
    AUTOROUND = "auto-round"
    MXFP4 = "mxfp4"
    NVFP4 = "nvfp4"
    MXFP8 = "mxfp8"
    METAL = "metal"
    FOUR_OVER_SIX = "fouroversix"
    SINQ = "sinq"
    GEMMA = "gemma"


def method_of(name: str) -> QuantizationMethod | str:
    """The member of that value; the text itself for dialects and plugins."""
    try:
        return QuantizationMethod(name)
    except ValueError:
        return name


class QuantizationConfigMixin:
    """Base of every configuration. Unknown arguments raise; unknown keys of a file are kept in `extra_fields`.

    A class says about itself, so that no shared file has to know it:
    method: its `quant_method`.
    aliases: legacy key of a file -> present argument.
    claims: keys that mean this method when they hold true or an object, whatever `quant_method` says.
    config_keys, side_files: keys of config.json, and files beside it, that may hold it.
    loading_attributes: options a user may change on a quantized checkpoint.
    optional: options that `to_dict` leaves out while they are None.
    schemes: short names for options to create a checkpoint with, e.g. "nf4".
    targets: programs that read the method's files; see `served_by`.
    importance_options: of a configuration whose quantizer writes files of importance; None: the method has none.
    """

    __slots__ = ("__dict__", "__weakref__", "_given")  # what the caller named lies beside the options, not among them

    method: ClassVar[str] = ""
    aliases: ClassVar[Mapping[str, str]] = {}
    claims: ClassVar[tuple[str, ...]] = ()
    config_keys: ClassVar[tuple[str, ...]] = ("quantization_config",)
    side_files: ClassVar[tuple[str, ...]] = ()
    loading_attributes: ClassVar[tuple[str, ...]] = ()
    schemes: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    targets: ClassVar[tuple[str, ...]] = ("transformers",)
    optional: ClassVar[tuple[str, ...]] = ()
    importance_options: ClassVar[Mapping[str, Any] | None] = None

    quant_method: QuantizationMethod | str
    extra_fields: dict[str, Any]
    _given: frozenset[str]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        known = parameters_of(cls)
        for name in kwargs:
            if known is not None and name not in known:
                raise cls.unknown_option(name)
        self = super().__new__(cls)
        self.extra_fields = {}
        self._given = frozenset((known or ())[: len(args)]).union(kwargs)
        return self

    def __post_init__(self) -> None:
        self.quant_method = method_of(type(self).method)
        self.post_init()

    def post_init(self) -> None:
        """Check the options; called after construction and after `update`. Raises InvalidOption."""

    @classmethod
    def unknown_option(cls, name: str) -> InvalidOption:
        """The error for an option this class does not have; names the closest and lists all."""
        known = parameters_of(cls) or ()
        return InvalidOption(
            f"{cls.__name__} has no option {name!r}{did_you_mean(name, known) or '.'} Options: {', '.join(known)}"
        )

    # --- which file, which quantizer ---

    @classmethod
    def recognizes(cls, config_dict: Mapping[str, Any]) -> bool:
        """Whether a dictionary whose `quant_method` is missing or unregistered is this method's."""
        return False

    @classmethod
    def found_in(cls, folder: Path, model_config: Mapping[str, Any]) -> dict[str, Any] | None:
        """This method's configuration in a folder whose config.json has no `quantization_config`, or None."""
        from anybit.quantizers.checkpoint_config import objects_under, read_json

        for key in cls.config_keys:
            for inside in objects_under(model_config, key):
                if cls._owns(inside):
                    return inside
        for name in cls.side_files:
            if (folder / name).is_file():
                inside = read_json(folder / name)
                if cls._owns(inside):
                    return inside
        return None

    @classmethod
    def of_file(cls, file: Path) -> dict[str, Any] | None:
        """The configuration of a file that is this method's by its name, whatever lies beside it; None when it is not."""
        return None

    @classmethod
    def found_among(cls, tensors: Mapping[str, Any]) -> dict[str, Any] | None:
        """This method's configuration for stored tensors (TensorInfo by name) that no file tells anything of, or None."""
        return None

    @classmethod
    def _owns(cls, config_dict: Mapping[str, Any]) -> bool:
        named = config_dict.get("quant_method")
        return named == cls.method if named is not None else cls.recognizes(config_dict)

    @classmethod
    def in_context(cls, config_dict: dict[str, Any], model_config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """The dictionary completed by the rest of config.json and files beside it; for formats that scatter their settings."""
        return config_dict

    def dispatch_key(self) -> str:
        """The name its quantizer is registered under. Raises ConfigError when the options do not name one."""
        method = getattr(self, "quant_method", None)
        if method is None:
            raise ConfigError(f"{type(self).__name__} sets no quant_method, so no quantizer can be found for it")
        return method.value if isinstance(method, Enum) else str(method)

    def adopt(self, stored: QuantizationConfigMixin) -> QuantizationConfigMixin | None:
        """A configuration of this class for a checkpoint of another method that shares its tensors, or None."""
        return None

    # --- choosing ---

    def served_by(self) -> tuple[str, ...]:
        """Programs besides this one that load what this configuration makes: transformers, vllm, llama.cpp, mlx."""
        return type(self).targets

    def per_module(self, settings: Mapping[str, QuantizationConfigMixin | None]) -> QuantizationConfigMixin:
        """A new configuration: this one, with another of its class for the modules named (None: left dense).

        Raises NotRepresentable where the method's files have one setting for all modules.
        """
        raise NotRepresentable(
            f"{type(self).__name__} has one setting for the whole model; its files cannot say another for "
            f"{next(iter(settings), 'a module')}. Methods that can: {', '.join(_carriers())}"
        )

    # --- dictionaries ---

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From a checkpoint's dictionary; `kwargs` override its options. Others raise InvalidOption, or are handed back."""
        if not isinstance(config_dict, Mapping):
            raise ConfigError(
                f"{cls.__name__} is built from a dictionary, not from {type(config_dict).__name__} {config_dict!r}"
            )
        given = cls.modernize(copy.deepcopy(dict(config_dict)))
        for old, new in cls.aliases.items():
            if given.get(old) is not None and given.get(new) is None:
                given[new] = given.pop(old)
        known = parameters_of(cls)
        options = {name: value for name, value in given.items() if known is None or name in known}
        try:
            config = cls(**options)
        except TypeError as error:
            if isinstance(error, ConfigError) or "required" not in str(error):
                raise
            raise InvalidOption(
                f"{cls.__name__}: the configuration lacks {str(error).partition(': ')[2]}; it has {sorted(given)}"
            ) from error
        own = config.to_dict()
        config.extra_fields = {
            name: value for name, value in given.items() if name not in own and (name not in options or value is None)
        }
        unused = config.update(**kwargs)
        if return_unused_kwargs:
            return config, unused
        for name in unused:
            raise config.unknown_option(name)
        return config

    @classmethod
    def modernize(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        """A file's dictionary (a copy) with legacy spellings replaced; what cannot be an option stays an extra field."""
        return config_dict

    def own_dict(self) -> dict[str, Any]:
        """What `to_dict` writes, without the unknown keys of the file."""
        return {
            name: _plain(value)
            for name, value in self.__dict__.items()
            if name != "extra_fields" and not (value is None and name in self.optional)
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain data for config.json, unknown keys of the original file included."""
        return {**copy.deepcopy(self.extra_fields), **self.own_dict()}

    def to_diff_dict(self) -> dict[str, Any]:
        """`to_dict`, or for some classes only what differs from the defaults."""
        return self.to_dict()

    def to_json_string(self, use_diff: bool = True) -> str:
        """Indented JSON of `to_diff_dict` or `to_dict`, keys sorted."""
        import json

        return json.dumps(self.to_diff_dict() if use_diff else self.to_dict(), indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write the full dictionary as JSON."""
        with open(json_file_path, "w", encoding="utf-8") as file:
            file.write(self.to_json_string(use_diff=False))

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Set the options among `kwargs`, check them, return the rest. Nothing changes when the check fails."""
        before = dict(self.__dict__)
        names = [name for name in kwargs if name in self.__dict__ and name not in ("extra_fields", "quant_method")]
        try:
            for name in names:
                setattr(self, name, kwargs[name])
            if names:
                self.post_init()
        except Exception:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise
        return {name: value for name, value in kwargs.items() if name not in names}

    def get_loading_attributes(self) -> dict[str, Any]:
        """Options that may be changed when a quantized checkpoint is loaded."""
        return {name: copy.deepcopy(getattr(self, name)) for name in self.loading_attributes}

    def changed_options(self) -> set[str]:
        """Options that the caller named, or that have another value than they would have without the caller."""
        parameters = inspect.signature(type(self).__init__).parameters
        required = [name for name, item in parameters.items() if item.default is item.empty and name in self.__dict__]
        untouched = type(self)(**{name: self.__dict__[name] for name in required}).__dict__
        names = self.__dict__.keys() - {"extra_fields", "quant_method"}
        return {name for name in names if name in self._given or self.__dict__[name] != untouched.get(name)}

    def forget_given(self) -> None:
        """Treat no option as named by the caller."""
        self._given = frozenset()

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string(use_diff=False)}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and _listed(self.to_dict()) == _listed(other.to_dict())


def _carriers() -> list[str]:
    """Methods whose configurations may differ by module."""
    from anybit.quantizers import registry

    classes = dict.fromkeys(registry.config_classes())
    return sorted(cls.method for cls in classes if cls.per_module is not QuantizationConfigMixin.per_module)


def difference(config: QuantizationConfigMixin, default: QuantizationConfigMixin) -> dict[str, Any]:
    """The entries of `to_dict` that the default does not have."""
    plain = default.to_dict()
    return {name: value for name, value in config.to_dict().items() if name not in plain or value != plain[name]}


_parameters: dict[type, tuple[str, ...] | None] = {}


def parameters_of(cls: type) -> tuple[str, ...] | None:
    """Names a constructor takes, through `**kwargs` to the base class; None when it takes any."""
    if cls not in _parameters:
        _parameters[cls] = _read_parameters(cls)
    return _parameters[cls]


def _read_parameters(cls: type) -> tuple[str, ...] | None:
    names: list[str] = []
    for owner in cls.__mro__:
        if "__init__" not in owner.__dict__ or owner is object:
            continue
        parameters = list(inspect.signature(owner.__init__).parameters.values())[1:]  # type: ignore[misc]
        names += [item.name for item in parameters if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY)]
        if not any(item.kind is item.VAR_KEYWORD for item in parameters):
            return tuple(dict.fromkeys(names))
    return None if names else ()


def _listed(value: Any) -> Any:
    """Tuples as lists: JSON does not tell them apart."""
    if isinstance(value, dict):
        return {key: _listed(inside) for key, inside in value.items()}
    return [_listed(inside) for inside in value] if isinstance(value, (list, tuple)) else value


def _plain(value: Any) -> Any:
    """Plain data: enum members become their values, objects are copied."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {key: _plain(inside) for key, inside in value.items()}
    if isinstance(value, list):
        return [_plain(inside) for inside in value]
    return copy.deepcopy(value)
