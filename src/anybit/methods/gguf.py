"""GGUF. llama.cpp's files: blocks of 32, 64, 128 or 256 weights, each block with its own scales; about thirty types.

Stored in a .gguf file: a tensor has a type, and rows of blocks. Names, row order of q and k (llama) and the configuration of the
model follow llama.cpp's conventions, not transformers'; `unbundle` puts them into transformers' words, `bundled` back.
`anybit.quantize` writes such a file, which llama.cpp loads. A model that was loaded from one, or quantized while loading, is
saved as safetensors: the same blocks, each tensor named for its type (`q_proj.q4_k`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from anybit.errors import CalibrationNeeded, ConfigError, ShapeMismatch, did_you_mean
from anybit.methods._gguf_mixes import MIXES, needs_importance
from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.config import QuantizationConfigMixin
from anybit.quantizers.matching import SafePattern
from anybit.quantizers.options import check_choice, check_flags, check_type
from anybit.quantizers.registry import register_quantization_config, register_quantizer

if TYPE_CHECKING:
    from anybit.methods._gguf_mixes import Facts
    from anybit.quantizers.bundle import Bundle, Bundled
    from anybit.weight.layout import Layout, ModuleInfo

SUFFIX = ".gguf"
LATER_SHARD = re.compile(r"-(?!00001)\d{5}-of-\d{5}$")
OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pt")
# types that are made from the weight alone, or with an importance matrix
CREATED = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0",
    "MXFP4", "NVFP4", "Q1_0", "Q2_0", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S",
)  # fmt: skip
DEFAULT = "Q4_K_M"


@register_quantization_config("gguf")
@dataclass(eq=False, repr=False)
class GgufConfig(QuantizationConfigMixin):
    """The file says everything else. `gguf_file` is its name; of several shards, the first one's.

    The rest counts when a dense model is quantized. `mix`: one of llama.cpp's mixes by name (default Q4_K_M); a type for every
    tensor by its place. `block_type` instead: that type for all linear layers; embeddings and head stay dense. `tensor_types`:
    pattern -> type, searched in GGUF names (`blk.3.ffn_down.weight`); the first that matches counts, before the mix.
    `module_settings`: another mix or block_type ({"mix": "Q6_K"}) for a module by its name in the model, None to leave it dense;
    after `tensor_types`, before the rest. `imatrix`: a file of llama.cpp's tool of that name, .gguf or .dat; some types are made
    only with one, or with calibration data. `big_endian`: numbers of the file lie as on IBM z.
    """

    gguf_file: str | None = None
    dequantize: bool = False
    mix: str | None = None
    block_type: str | None = None
    tensor_types: dict[str, str] | None = None
    module_settings: dict[str, dict[str, str] | None] | None = None
    imatrix: str | None = None
    big_endian: bool | None = None
    modules_to_not_convert: list[str] | None = None

    method: ClassVar[str] = "gguf"
    targets: ClassVar[tuple[str, ...]] = ("transformers", "vllm", "llama.cpp")
    loading_attributes: ClassVar[tuple[str, ...]] = ("dequantize",)
    importance_options: ClassVar[Mapping[str, Any] | None] = {"mix": "Q8_0"}
    optional: ClassVar[tuple[str, ...]] = (
        "mix", "block_type", "tensor_types", "module_settings", "imatrix", "big_endian", "modules_to_not_convert",
    )  # fmt: skip
    schemes: ClassVar[Mapping[str, Mapping[str, Any]]] = {f"gguf-{name.lower()}": {"mix": name} for name in MIXES}

    def post_init(self) -> None:
        check_type(self, "gguf_file", str, None)
        check_flags(self, "dequantize")
        check_type(self, "big_endian", bool, None)
        if self.mix is not None:
            check_choice(self, "mix", tuple(MIXES))
        if self.block_type is not None:
            check_choice(self, "block_type", CREATED)
            if self.mix is not None:
                raise ConfigError(
                    f"block_type={self.block_type!r} gives every layer that type, mix={self.mix!r} chooses one for each; set one"
                )
        check_type(self, "imatrix", str, None)
        check_type(self, "tensor_types", dict, None)
        for pattern, kind in (self.tensor_types or {}).items():
            SafePattern(pattern)
            if kind not in CREATED:
                raise ConfigError(
                    f"tensor_types gives {pattern!r} the type {kind!r}{did_you_mean(str(kind), CREATED)}; one of "
                    f"{', '.join(CREATED)}"
                )
        check_type(self, "module_settings", dict, None)
        for module, own in (self.module_settings or {}).items():
            if own is not None and (not isinstance(own, dict) or len(own) != 1 or set(own) - {"mix", "block_type"}):
                raise ConfigError(
                    f"module_settings gives {module!r} {own!r}; it must be {{'mix': NAME}}, {{'block_type': NAME}} or None"
                )
            if own is not None:
                type(self)(mix=own.get("mix"), block_type=own.get("block_type"))  # says what is wrong with the name

    def per_module(self, settings: Mapping[str, QuantizationConfigMixin | None]) -> QuantizationConfigMixin:
        found = dict(self.module_settings or {})
        for module, other in settings.items():
            kind: str | None = getattr(other, "block_type", None)
            mix = getattr(other, "mix", None) or DEFAULT
            found[module] = None if other is None else {"block_type": kind} if kind else {"mix": mix}
        made = type(self).from_dict(self.to_dict())
        made.module_settings = found or None
        made.post_init()
        return made

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
    calibrated_algorithm = "ggml"

    def __init__(self, quantization_config: Any, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self._facts: Facts | None = None
        self._names: Any = None
        self._importance: dict[str, Any] | None = None
        given = quantization_config.tensor_types or {}
        self._given = [(SafePattern(pattern), kind) for pattern, kind in given.items()]

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

    # --- making ---

    def skipped_modules(self) -> Sequence[str] | None:
        """A mix has an opinion about every tensor, so nothing is left out by default."""
        config = self.quantization_config
        if config.modules_to_not_convert is None and config.block_type is None:
            return []
        skipped: Sequence[str] | None = config.modules_to_not_convert
        return skipped

    def attach(self, model: Any, checkpoint: Any, path_of: Callable[[str], str | None]) -> None:
        if not self.pre_quantized and self.quantization_config.imatrix is not None:
            from anybit.methods._gguf_imatrix import read

            self._importance = read(self.quantization_config.imatrix, checkpoint.another)

    def begin(self, model: Any, slots: Sequence[Any]) -> None:
        super().begin(model, slots)
        self._facts = None
        if self.pre_quantized:
            return
        from anybit.methods._gguf_file import architecture_of, standard
        from anybit.methods._gguf_mixes import Facts
        from anybit.methods._gguf_places import Names, experts_of

        if self.quantization_config.imatrix is not None and self._importance is None:
            raise ConfigError("an imatrix counts when a dense model is quantized; leave it out of a conversion")
        settings = model.config.to_dict()
        found = architecture_of(settings)
        if found is None:  # such a model is never written to a file, but its layers may have blocks
            return
        settings = standard(settings)
        heads = int(settings.get("num_attention_heads") or 1)
        self._names = Names(found[1])
        self._facts = Facts(
            self.quantization_config.mix or DEFAULT, found[0], int(settings["num_hidden_layers"]),
            heads // int(settings.get("num_key_value_heads") or heads),
            experts_of(settings),
            bool(settings.get("tie_word_embeddings")), self._importance is not None or self.calibrated,
        )  # fmt: skip

    def _type_of(self, module: ModuleInfo, name: str | None, stacked: bool) -> str | None:
        """The block type of a module; None (with the reason) for one that stays dense."""
        columns = module.shape[-1]
        kind = next((kind for pattern, kind in self._given if name is not None and pattern.searches(name)), None)
        if kind is not None:
            return self._fitting(kind, module)
        mix, block_type = self._wanted(module)
        if block_type is not None:
            if module.kind == "embedding":
                self.skip_reasons[module.name] = "embeddings stay dense"
                return None
            return self._fitting(block_type, module)
        if mix is None:
            self.skip_reasons[module.name] = "module_settings leaves it dense"
            return None
        if self._facts is not None and name is not None:
            kind = replace(self._facts, mix=mix).type_of(name, columns, stacked)
            if kind is None and columns % 32 == 0:
                self.skip_reasons[module.name] = f"{mix} leaves {name} dense"
                return None
        else:
            base = MIXES[mix][1]
            kind = base if base and module.kind != "embedding" else None
        return self._fitting(kind, module)

    def _fitting(self, kind: str | None, module: ModuleInfo) -> str | None:
        from anybit.methods._gguf_mixes import fitting

        found = fitting(kind, module.shape[-1]) if kind is not None else None
        if found is None:
            self.skip_reasons[module.name] = f"its rows of {module.shape[-1]} weights are not whole blocks"
        return found

    def _wanted(self, module: ModuleInfo) -> tuple[str | None, str | None]:
        """Mix and block type, one of them None; both for a module that stays dense."""
        config = self.quantization_config
        for given, own in (config.module_settings or {}).items():
            if module.name == given or module.name.startswith(f"{given}."):
                return (None, None) if own is None else (own.get("mix"), own.get("block_type"))
        return (None, config.block_type) if config.block_type is not None else (config.mix or DEFAULT, None)

    def layout_for(self, module: ModuleInfo) -> Layout | None:
        from anybit.methods._gguf_layout import GgufLayout

        if not self.should_convert(module):
            return None
        if self._facts is not None and (reason := self._names.dense(module.name)) is not None:
            self.skip_reasons[module.name] = reason
            return None
        where = self._names.find(module.name) if self._facts is not None else None
        name = f"{where[0]}.weight" if where is not None else None
        expert = where[1] if where is not None else None
        kind = self._type_of(module, name, expert is not None or len(module.shape) == 3)
        if kind is None:
            return None
        config, (mix, block_type) = self.quantization_config, self._wanted(module)
        importance = self._importance_of(name, expert, module)
        if importance is None and not self.calibrated and needs_importance(name or module.name, kind, mix or ""):
            raise CalibrationNeeded(
                f"{name or module.name} would be {kind}, which is made for what the layer's inputs weigh, and nothing says that. "
                "Pass calibration data (--calib), an imatrix of the model, or choose a mix that needs neither, e.g. Q2_K or IQ3_S"
            )
        if config.block_type is None and config.mix is None and mix is not None:
            self.decide(f"the configuration names no mix: {DEFAULT}", module.name)
        elif block_type is not None and kind != block_type:
            self.decide(f"{kind} instead of {block_type}, whose blocks are wider than its rows", module.name)
        return GgufLayout(module.shape, module.dtype, kind, importance=importance)

    def importance_names(self, modules: Sequence[str]) -> list[str]:
        if self._names is None:
            raise ConfigError(
                "the weights of this model have no names in a GGUF file, so neither has an importance matrix"
            )
        return list(dict.fromkeys(f"{name}.weight" for module in modules for name in self._names.everywhere(module)))

    def importance_file(self, file: str, found: Mapping[str, Any], chunks: int, length: int) -> tuple[Bundled, Any]:
        from anybit.methods._gguf_imatrix import bundled

        return bundled(file, found, chunks, length)

    def _importance_of(self, name: str | None, expert: int | None, module: ModuleInfo) -> Any:
        found = self._importance.get(name) if self._importance is not None and name is not None else None
        if found is None:
            return None
        columns = module.shape[-1]
        rows = found.reshape(-1, columns) if found.numel() % columns == 0 else found
        if rows.shape[-1] != columns or (expert is not None and expert >= rows.shape[0]):
            raise ConfigError(
                f"the importance matrix has {tuple(found.shape)} numbers for {name}, whose weight has {columns} inputs"
                f"{f' and is expert {expert}' if expert is not None else ''}; it was computed for another model"
            )
        return rows[expert or 0] if len(module.shape) == 2 else rows

    def bundled(
        self, settings: Mapping[str, Any], specs: Mapping[str, Any], read: Callable[[str], bytes | None], name: str
    ) -> Bundled:
        from anybit.methods._gguf_file import bundled

        config = self.quantization_config
        mix = config.mix or config.block_type or DEFAULT
        return bundled(settings, specs, read, name, mix, big_endian=bool(config.big_endian))
