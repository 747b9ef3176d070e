"""From a configuration, a dictionary or a checkpoint to the classes that handle it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from anybit.errors import CheckpointError, ConfigError, UnknownMethod, located
from anybit.quantizers import registry
from anybit.quantizers.config import QuantizationConfigMixin, parameters_of

if TYPE_CHECKING:
    import os
    from pathlib import Path

    from anybit.quantizers.base import HfQuantizer

# options of huggingface_hub.snapshot_download; other keyword arguments of from_pretrained are options of the configuration
HUB_OPTIONS = (
    "revision", "token", "cache_dir", "local_files_only", "force_download", "proxies", "repo_type", "endpoint",
)  # fmt: skip


def class_of(config_dict: Mapping[str, Any]) -> type[QuantizationConfigMixin]:
    """The configuration class of a checkpoint's dictionary. ConfigError, or UnknownMethod, when no class takes it."""
    if not isinstance(config_dict, Mapping):
        raise ConfigError(
            f"a quantization configuration is a dictionary, not {type(config_dict).__name__} {config_dict!r}"
        )
    method = config_dict.get("quant_method")
    if method is not None and not isinstance(method, str):
        raise ConfigError(f"quant_method is {method!r}; it must be the name of a method, e.g. 'gptq'")
    name = str(getattr(method, "value", method))
    named = registry.config_class(name, plugins=False) if method is not None else None
    known = (parameters_of(named) if named is not None else None) or ()
    # a key that the named method does not know, and that holds true or an object, may say that another method is meant
    telling = {
        key for key, value in config_dict.items() if key not in known and (value is True or isinstance(value, dict))
    }
    if telling or named is None:
        for cls in registry.config_classes():
            if telling.intersection(cls.claims):
                return cls
    found = named or _recognized(config_dict)
    if found is not None:
        return found
    if method is not None:
        found = registry.config_class(name)
        if found is None:
            raise UnknownMethod(name, registry.method_names())
    else:
        registry.import_plugins("a configuration without quant_method")
        found = _recognized(config_dict)
        if found is None:
            raise ConfigError(
                "the quantization configuration has no quant_method, and no method recognizes its keys: "
                f"{sorted(map(str, config_dict))}. Add quant_method, one of: {', '.join(registry.method_names())}"
            )
    return found


def _recognized(config_dict: Mapping[str, Any]) -> type[QuantizationConfigMixin] | None:
    found = [cls for cls in registry.config_classes() if cls.recognizes(config_dict)]
    if len(found) > 1:
        raise ConfigError(
            f"the quantization configuration {dict(config_dict)} could be {' or '.join(cls.method for cls in found)}. "
            "Add its quant_method"
        )
    return found[0] if found else None


def as_config(config: Any) -> QuantizationConfigMixin:
    """A configuration object from one of ours, one of transformers', or a dictionary."""
    if isinstance(config, QuantizationConfigMixin):
        return config
    if isinstance(config, Mapping):
        return AutoQuantizationConfig.from_dict(config)
    if hasattr(config, "to_dict") and hasattr(config, "quant_method"):
        loading = config.get_loading_attributes() if hasattr(config, "get_loading_attributes") else {}
        made = AutoQuantizationConfig.from_dict({**config.to_dict(), **loading})
        made.forget_given()  # its dictionary names every option, whether its user did or not
        return made
    raise ConfigError(
        f"quantization_config is {type(config).__name__} {config!r}; pass a configuration such as GPTQConfig(bits=4) or a "
        "dictionary with a quant_method"
    )


class AutoQuantizationConfig:
    """Chooses the configuration class."""

    @classmethod
    def from_dict(cls, quantization_config_dict: Mapping[str, Any], **kwargs: Any) -> QuantizationConfigMixin:
        """From a checkpoint's dictionary, with or without `quant_method`. UnknownMethod names the closest and lists all."""
        config: QuantizationConfigMixin = class_of(quantization_config_dict).from_dict(
            quantization_config_dict, **kwargs
        )
        return config

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *, subfolder: str = "", **kwargs: Any
    ) -> QuantizationConfigMixin:
        """Of a local folder, a file in it, or a hub id; other `kwargs` override options. ConfigError when it has none."""
        from pathlib import Path

        name = str(pretrained_model_name_or_path)
        path = Path(name).expanduser()
        if not name or not path.exists():
            if name.count("/") > 1 or name.startswith((".", "/", "~")) or not name:
                raise CheckpointError(f"{name!r} is neither a folder or file here nor a hub id (owner/name)")
            hub_options = {option: kwargs.pop(option) for option in HUB_OPTIONS if option in kwargs}
            from anybit.quantizers.checkpoint_config import fetch

            path = fetch(name, **hub_options)
        path = path / subfolder if subfolder else path
        config = cls.find(path)
        if config is None:
            raise ConfigError(
                f"{pretrained_model_name_or_path} has no quantization configuration: neither config.json nor a file beside it "
                "holds one. It seems to be a dense checkpoint"
            )
        for name in config.update(**{name: value for name, value in kwargs.items() if name not in HUB_OPTIONS}):
            raise config.unknown_option(name)
        return config

    @classmethod
    def find(cls, path: str | os.PathLike[str]) -> QuantizationConfigMixin | None:
        """The configuration a local folder (or a file, or its folder) carries, None for a dense checkpoint."""
        from pathlib import Path

        from anybit.quantizers.checkpoint_config import model_config_of, stored_config

        path = Path(path)
        folder = path if path.is_dir() else path.parent
        if path != folder:
            for found_class in registry.config_classes():
                inside = found_class.of_file(path)
                if inside is not None:
                    return _built(found_class, inside, {}, path)
        model_config = model_config_of(folder)
        where = folder / "config.json"
        stored = stored_config(model_config, str(where))
        if stored is not None:
            try:
                found_class = class_of(stored)
            except ConfigError as error:
                raise located(error, where) from error.__cause__
            return _built(found_class, stored, model_config, where)
        for found_class in registry.config_classes():
            inside = found_class.found_in(folder, model_config)
            if inside is not None:
                return _built(found_class, inside, model_config, folder)
        return None

    @classmethod
    def find_among(cls, tensors: Mapping[str, Any], where: Path) -> QuantizationConfigMixin | None:
        """The configuration that stored tensors (TensorInfo by name) show by their own, None for dense ones."""
        for found_class in registry.config_classes():
            inside = found_class.found_among(tensors)
            if inside is not None:
                return _built(found_class, inside, {}, where)
        return None


def _built(
    cls: type[QuantizationConfigMixin], stored: dict[str, Any], model_config: Mapping[str, Any], where: Path
) -> QuantizationConfigMixin:
    folder = where if where.is_dir() else where.parent
    try:
        config: QuantizationConfigMixin = cls.from_dict(cls.in_context(stored, model_config, folder))
    except ConfigError as error:
        raise located(error, where) from error.__cause__
    return config


class AutoHfQuantizer:
    """Chooses the quantizer class."""

    @classmethod
    def from_config(
        cls, quantization_config: QuantizationConfigMixin | Mapping[str, Any], **kwargs: Any
    ) -> HfQuantizer:
        """The quantizer of a configuration; `pre_quantized=False` to quantize a dense checkpoint with it."""
        config = as_config(quantization_config)
        return registry.quantizer_class(config.dispatch_key())(config, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> HfQuantizer:
        """The quantizer of a checkpoint, from its own configuration."""
        return cls.from_config(AutoQuantizationConfig.from_pretrained(pretrained_model_name_or_path, **kwargs))

    @classmethod
    def merge_quantization_configs(
        cls,
        quantization_config: QuantizationConfigMixin | Mapping[str, Any],
        quantization_config_from_args: QuantizationConfigMixin | Mapping[str, Any] | None,
    ) -> QuantizationConfigMixin:
        """A checkpoint's configuration with the loading attributes of the one passed. ConfigError when the classes differ."""
        import copy
        import warnings

        stored = as_config(quantization_config)
        if quantization_config_from_args is None:
            return stored
        given = as_config(quantization_config_from_args)
        stored = given.adopt(stored) or copy.deepcopy(stored)
        if type(stored).__name__ != type(given).__name__:
            raise ConfigError(
                f"the checkpoint is quantized with {type(stored).__name__}, but a {type(given).__name__} was passed. Pass a "
                f"{type(stored).__name__} (its loading options: {', '.join(stored.get_loading_attributes()) or 'none'}), or "
                "no configuration"
            )
        changed, loading, before = given.changed_options(), given.get_loading_attributes(), stored.own_dict()
        ignored = [
            name
            for name, value in given.own_dict().items()
            if name in changed and name not in loading and name in before and value != before[name]
        ]
        if ignored:
            warnings.warn(
                f"the checkpoint is already quantized; its own configuration is used, and {', '.join(ignored)} of the passed "
                f"{type(given).__name__} is ignored. Only {', '.join(loading) or 'nothing'} can be changed at load",
                stacklevel=2,
            )
        stored.update(**{name: value for name, value in loading.items() if name in changed})
        return stored

    @staticmethod
    def supports_quant_method(quantization_config_dict: Mapping[str, Any]) -> bool:
        """Whether some class takes the dictionary. ConfigError when it has no `quant_method` and is not recognized."""
        try:
            class_of(quantization_config_dict)
        except UnknownMethod:
            return False
        return True
