"""`from_pretrained` and `from_config` as transformers' auto classes have them."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any, ClassVar

import transformers

from anybit.engine.load import load
from anybit.engine.source import locate, read_quantizer
from anybit.errors import InvalidOption, UnsafeFile
from anybit.quantizers.auto import HUB_OPTIONS

# arguments of transformers' from_pretrained that change nothing in how we load
_HARMLESS = ("low_cpu_mem_usage", "use_safetensors", "weights_only", "_from_auto", "_commit_hash", "adapter_kwargs")
_OWN = ("device_map", "max_memory", "offload_folder", "progress", "strict", "allow_pickle", "calibration", "rotate")
_LEGACY = ("load_in_4bit", "load_in_8bit")


class AutoClass:
    """Base of the twins. `theirs` is transformers' class."""

    theirs: ClassVar[Any]

    def __init__(self) -> None:
        name = type(self).__name__
        raise TypeError(f"{name} is not instantiated; use {name}.from_pretrained(path) or {name}.from_config(config)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        quantization_config: Any = None,
        config: Any = None,
        dtype: Any = None,
        torch_dtype: Any = None,
        subfolder: str = "",
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> Any:
        """A model of a folder or hub id: packed if it is quantized or a `quantization_config` is given, else transformers' own.

        A GPTQConfig or AwqConfig with `dataset=[texts]` (and a `tokenizer`, if the folder has none), or `calibration=`, lets the
        weights be rounded with data. Takes `device_map`, `max_memory`, `offload_folder`, `dtype`, `attn_implementation` and the
        hub's options; other arguments override the model's configuration, as in transformers. Code of a checkpoint is never run.
        """
        if trust_remote_code:
            raise UnsafeFile(
                f"{pretrained_model_name_or_path}: trust_remote_code would run code of the checkpoint, which anybit never "
                "does. Use a model class that transformers has"
            )
        for name in _LEGACY:
            if name in kwargs:
                raise InvalidOption(
                    f"{name} is an option of BitsAndBytesConfig: quantization_config=BitsAndBytesConfig({name}=True)"
                )
        hub_options = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
        path = locate(pretrained_model_name_or_path, **hub_options)
        path = path / subfolder if subfolder else path
        file = kwargs.pop("gguf_file", None)
        path = path / file if file is not None and path.is_dir() else path
        wanted = dtype if dtype is not None else torch_dtype
        if quantization_config is None and read_quantizer(path) is None:
            return cls._dense(path, config, wanted, kwargs)
        for name in _HARMLESS:
            kwargs.pop(name, None)
        own = {name: kwargs.pop(name) for name in _OWN if name in kwargs}
        model_options = {
            name: kwargs.pop(name) for name in ("attn_implementation", "experts_implementation") if name in kwargs
        }
        folder = path if path.is_dir() else path.parent
        if config is None and kwargs:
            config, kwargs = transformers.AutoConfig.from_pretrained(
                str(folder), trust_remote_code=False, return_unused_kwargs=True, **kwargs
            )
        if kwargs:
            raise InvalidOption(f"{cls.__name__}.from_pretrained has no argument {', '.join(map(repr, kwargs))}")
        return load(
            path,
            quantization_config,
            auto_class=cls.theirs,
            config=config,
            dtype=wanted or "auto",
            **own,
            **model_options,
        )

    @classmethod
    def _dense(cls, path: Path, config: Any, dtype: Any, kwargs: dict[str, Any]) -> Any:
        options = {name: value for name, value in {"config": config, "dtype": dtype}.items() if value is not None}
        for name in ("progress", "strict", "allow_pickle"):
            kwargs.pop(name, None)
        return cls.theirs.from_pretrained(str(path), trust_remote_code=False, **options, **kwargs)

    @classmethod
    def from_config(cls, config: Any, **kwargs: Any) -> Any:
        """A dense model with random weights, as transformers makes it."""
        return cls.theirs.from_config(config, **kwargs)


@functools.lru_cache(maxsize=256)
def twin(name: str) -> type | None:
    """Our class of that name, or None."""
    theirs = getattr(transformers, name, None)
    if theirs is None or not hasattr(theirs, "_model_mapping"):
        return None
    return type(
        name, (AutoClass,), {"theirs": theirs, "__module__": "anybit", "__doc__": AutoClass.from_pretrained.__doc__}
    )
