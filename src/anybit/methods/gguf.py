"""GGUF. llama.cpp's files: blocks of 32, 64, 128 or 256 weights, each block with its own scales; about thirty types.

Stored in a .gguf file: a tensor has a type, and rows of blocks. Names, row order of q and k (llama) and the configuration of the
model follow llama.cpp's conventions, not transformers'; `unbundle` puts them into transformers' words. A model that was loaded
from such a file is saved as safetensors: the same blocks, each tensor named for its type (`q_proj.q4_k`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from anybit.errors import ConfigError, ShapeMismatch
from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.config import QuantizationConfigMixin
from anybit.quantizers.options import check_choice, check_flags, check_type
from anybit.quantizers.registry import register_quantization_config, register_quantizer

if TYPE_CHECKING:
    from anybit.quantizers.bundle import Bundle
    from anybit.weight.layout import Layout, ModuleInfo

SUFFIX = ".gguf"
LATER_SHARD = re.compile(r"-(?!00001)\d{5}-of-\d{5}$")
OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pt")
# types with a rule of rounding that needs nothing but the weight
CREATED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
DEFAULT = "Q8_0"


@register_quantization_config("gguf")
@dataclass(eq=False, repr=False)
class GgufConfig(QuantizationConfigMixin):
    """The file says everything else. `gguf_file` is its name; of several shards, the first one's.

    `block_type` and `modules_to_not_convert` count when a dense model is quantized: all its linear layers get that type
    (default Q8_0).
    """

    gguf_file: str | None = None
    dequantize: bool = False
    block_type: str | None = None
    modules_to_not_convert: list[str] | None = None

    method: ClassVar[str] = "gguf"
    loading_attributes: ClassVar[tuple[str, ...]] = ("dequantize",)
    optional: ClassVar[tuple[str, ...]] = ("block_type", "modules_to_not_convert")
    schemes: ClassVar[Mapping[str, Mapping[str, Any]]] = {name.lower(): {"block_type": name} for name in CREATED}

    def post_init(self) -> None:
        check_type(self, "gguf_file", str, None)
        check_flags(self, "dequantize")
        if self.block_type is not None:
            check_choice(self, "block_type", CREATED)

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

    layouts_available = True
    reads_bundles = True

    def unbundle(self, checkpoint: Any) -> Bundle | None:
        if "general.architecture" not in checkpoint.values:
            if self.quantization_config.gguf_file is not None and not self._in_safetensors(checkpoint):
                raise ConfigError(
                    f"{checkpoint.path} does not say what model it holds: its metadata has no general.architecture"
                )
            return None
        from anybit.methods._gguf_bundle import bundle_of

        bundle = bundle_of(checkpoint)
        self._ignored = bundle.ignored
        self.quantization_config.gguf_file = None  # what is made of the file from here on is no such file
        return bundle

    @staticmethod
    def _in_safetensors(checkpoint: Any) -> bool:
        return not any(info.file.lower().endswith(SUFFIX) for info in checkpoint.tensors.values())

    def claims(self, tensor_name: str) -> str | None:
        ignored: Mapping[str, str] = getattr(self, "_ignored", {})
        return ignored.get(tensor_name)

    def layout_of(self, module: ModuleInfo, stored: Mapping[str, Any], peek: Callable[[str], Any]) -> Layout | None:
        from anybit.methods._gguf_layout import GgufLayout, encoding_of
        from anybit.weight.block_types import BY_NAME

        found = [(name, encoding) for name in stored if (encoding := encoding_of(name)) is not None]
        if not found:
            return None
        if len(found) > 1:
            raise ShapeMismatch(f"{module.name} is stored as {' and as '.join(name for name, _ in found)}")
        name, encoding = found[0]
        width = BY_NAME[encoding].elements
        if module.shape[-1] % width:
            raise ShapeMismatch(
                f"{module.name} has rows of {module.shape[-1]} weights, which are not whole blocks of {width} ({encoding}); "
                f"its tensor is {stored[name].name!r} {tuple(stored[name].shape)}"
            )
        beside = tuple(
            (other, tuple(stored[other].shape))
            for other in sorted(stored)
            if encoding == "NVFP4" and other in ("scale", "input_scale")
        )
        return GgufLayout(module.shape, module.dtype, encoding, beside)

    def layout_for(self, module: ModuleInfo) -> Layout | None:
        from anybit.methods._gguf_layout import GgufLayout
        from anybit.weight.block_types import BY_NAME

        encoding = self.quantization_config.block_type or DEFAULT
        if not self.should_convert(module):
            return None
        if module.kind == "embedding":
            self.skip_reasons[module.name] = "embeddings stay dense"
            return None
        if self.quantization_config.block_type is None:
            self.decide(f"the configuration names no block_type: {DEFAULT}", module.name)
        if module.shape[-1] % BY_NAME[encoding].elements:
            self.skip_reasons[module.name] = (
                f"its rows of {module.shape[-1]} weights are not whole blocks of {BY_NAME[encoding].elements}"
            )
            return None
        return GgufLayout(module.shape, module.dtype, encoding)
