"""`AutoTokenizer.from_pretrained` for files that carry their tokenizer inside; everything else is transformers' own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from anybit.engine.source import locate, read_tokenizer
from anybit.errors import UnsafeFile
from anybit.quantizers.auto import HUB_OPTIONS


class AutoTokenizer:
    """Not instantiated; use `AutoTokenizer.from_pretrained`."""

    def __init__(self) -> None:
        raise TypeError("AutoTokenizer is not instantiated; use AutoTokenizer.from_pretrained(path)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *inputs: Any,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> Any:
        """transformers' tokenizer of a folder, of a single file, or of a hub id; code of a checkpoint is never run."""
        if trust_remote_code:
            raise UnsafeFile(
                f"{pretrained_model_name_or_path}: trust_remote_code would run code of the checkpoint, which anybit never does"
            )
        file = kwargs.pop("gguf_file", None)
        local = Path(pretrained_model_name_or_path).expanduser()
        if file is None and not local.exists():
            from transformers import AutoTokenizer as Theirs

            return Theirs.from_pretrained(
                str(pretrained_model_name_or_path), *inputs, trust_remote_code=False, **kwargs
            )
        path = locate(
            pretrained_model_name_or_path, **{name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
        )
        return read_tokenizer(path / file if file is not None and path.is_dir() else path, **kwargs)
