"""GGUF. llama.cpp's files: blocks of 32, 64, 128 or 256 weights, each block with its own scales; about thirty types.

Stored in a .gguf file: a tensor has a type, and rows of blocks. Names, row order of q and k (llama) and the configuration of the
model follow llama.cpp's conventions, not transformers'.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from anybit.errors import ConfigError
from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.config import QuantizationConfigMixin
from anybit.quantizers.options import check_flags, check_type
from anybit.quantizers.registry import register_quantization_config, register_quantizer

SUFFIX = ".gguf"
LATER_SHARD = re.compile(r"-(?!00001)\d{5}-of-\d{5}$")
OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pt")


@register_quantization_config("gguf")
@dataclass(eq=False, repr=False)
class GgufConfig(QuantizationConfigMixin):
    """The file says everything else. `gguf_file` is its name; of several shards, the first one's."""

    gguf_file: str | None = None
    dequantize: bool = False

    method: ClassVar[str] = "gguf"
    loading_attributes: ClassVar[tuple[str, ...]] = ("dequantize",)

    def post_init(self) -> None:
        check_type(self, "gguf_file", str, None)
        check_flags(self, "dequantize")

    @classmethod
    def of_file(cls, file: Path) -> dict[str, Any] | None:
        return {"gguf_file": file.name} if file.suffix.lower() == SUFFIX else None

    @classmethod
    def found_in(cls, folder: Path, model_config: Mapping[str, Any]) -> dict[str, Any] | None:
        files = sorted(file.name for file in folder.glob(f"*{SUFFIX}") if not LATER_SHARD.search(file.stem))
        if not files or any(next(folder.glob(pattern), None) for pattern in OTHER_WEIGHTS):
            return None
        if len(files) > 1:
            raise ConfigError(
                f"{folder} holds {len(files)} models: {', '.join(files)}. Name the file instead of the folder"
            )
        return {"gguf_file": files[0]}


@register_quantizer("gguf")
class GgufHfQuantizer(HfQuantizer):
    """GGUF's block types."""
