"""bitsandbytes: NF4 and FP4 in blocks of 64 with optional nested scales, and LLM.int8 rows with outlier activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from anybit._lazy import LazyModule
from anybit.errors import ConfigError, InvalidOption, MissingTensor, NotRepresentable, ShapeMismatch
from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.config import QuantizationConfigMixin, difference
from anybit.quantizers.options import DtypeOption, check_names, check_type
from anybit.quantizers.registry import register_quantization_config, register_quantizer

if TYPE_CHECKING:
    from anybit.methods import _bnb_4bit as bnb_4bit
    from anybit.methods import _llm_int8 as llm_int8
    from anybit.weight import layout as layouts
    from anybit.weight.layout import Layout, ModuleInfo
else:  # needed for tensors, not to select the backend
    bnb_4bit, llm_int8 = LazyModule("anybit.methods._bnb_4bit"), LazyModule("anybit.methods._llm_int8")
    layouts = LazyModule("anybit.weight.layout")

STORAGE_DTYPES = ("float16", "float32", "int8", "uint8", "float64", "bfloat16")


@register_quantization_config("bitsandbytes_8bit")
@register_quantization_config("bitsandbytes_4bit")
@dataclass(eq=False, repr=False)
class BitsAndBytesConfig(QuantizationConfigMixin):
    """One class for both widths; exactly one of `load_in_4bit` and `load_in_8bit` selects the quantizer.

    `bnb_4bit_compute_dtype` is the least precision asked for: products are no less exact than bitsandbytes' in that dtype.
    """

    load_in_8bit: bool = False
    load_in_4bit: bool = False
    llm_int8_threshold: float = 6.0
    llm_int8_skip_modules: list[str] | None = None
    llm_int8_enable_fp32_cpu_offload: bool = False
    llm_int8_has_fp16_weight: bool = False
    bnb_4bit_compute_dtype: Any = DtypeOption("float32")  # noqa: RUF009 - a descriptor
    bnb_4bit_quant_type: str = "fp4"
    bnb_4bit_use_double_quant: bool = False
    bnb_4bit_quant_storage: Any = DtypeOption("uint8", STORAGE_DTYPES)  # noqa: RUF009 - a descriptor

    method: ClassVar[str] = "bitsandbytes"
    claims: ClassVar[tuple[str, ...]] = ("load_in_4bit", "load_in_8bit")
    targets: ClassVar[tuple[str, ...]] = ("transformers", "vllm")
    schemes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "nf4-dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        "int8": {"load_in_8bit": True},
    }

    def __setattr__(self, name: str, value: Any) -> None:
        before = self.__dict__.get(name)
        super().__setattr__(name, value)
        if name in self.claims and self.__dict__.get("load_in_4bit") and self.__dict__.get("load_in_8bit"):
            self.__dict__[name] = before
            raise InvalidOption(
                "BitsAndBytesConfig: load_in_4bit and load_in_8bit are both true; a module has one width. "
                "Set one of them to False"
            )

    def post_init(self) -> None:
        for name in (
            "load_in_4bit", "load_in_8bit", "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight",
            "bnb_4bit_use_double_quant",
        ):  # fmt: skip
            check_type(self, name, bool)
        check_type(self, "llm_int8_threshold", float)
        check_type(self, "bnb_4bit_quant_type", str)
        check_type(self, "llm_int8_skip_modules", list, None)
        check_names(self, "llm_int8_skip_modules")

    @classmethod
    def modernize(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        for name in cls.claims:  # private copies that transformers leaks into files
            config_dict.pop(f"_{name}", None)
            if config_dict.get(name) is None:
                config_dict.pop(name, None)
        if type(config_dict.get("llm_int8_threshold")) is int:
            config_dict["llm_int8_threshold"] = float(config_dict["llm_int8_threshold"])
        return config_dict

    def dispatch_key(self) -> str:
        if self.load_in_4bit or self.load_in_8bit:
            return f"{self.method}_{'4bit' if self.load_in_4bit else '8bit'}"
        raise ConfigError(
            "BitsAndBytesConfig: neither load_in_4bit nor load_in_8bit is true, so the width is unknown. Set one of them, "
            "e.g. BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4')"
        )

    def is_quantizable(self) -> bool:
        """Whether a width is selected."""
        return self.load_in_8bit or self.load_in_4bit

    def quantization_method(self) -> str | None:
        """ "llm_int8", "fp4", "nf4", or None when no width is selected."""
        if self.load_in_8bit:
            return "llm_int8"
        return self.bnb_4bit_quant_type if self.load_in_4bit and self.bnb_4bit_quant_type in ("fp4", "nf4") else None

    def own_dict(self) -> dict[str, Any]:
        own = super().own_dict()
        return {**own, "_load_in_4bit": own["load_in_4bit"], "_load_in_8bit": own["load_in_8bit"]}

    def to_diff_dict(self) -> dict[str, Any]:
        return difference(self, BitsAndBytesConfig())


class _BnbQuantizer(HfQuantizer):
    layouts_available = True

    def skipped_modules(self) -> Sequence[str] | None:
        skipped: Sequence[str] | None = self.quantization_config.llm_int8_skip_modules
        return skipped

    def why_not(self, module: ModuleInfo) -> str | None:
        """Why a dense module is not quantized, or None."""
        from anybit.quantizers.matching import matching_pattern

        pattern = matching_pattern(module.name, self.modules_to_not_convert)
        if pattern is not None:
            return f"{pattern!r} is among the modules not to convert"
        if module.kind == "experts" or (module.kind != "embedding" and module.class_name in ("Linear", "Conv1D")):
            return None
        return f"bitsandbytes quantizes Linear and Conv1D layers and stacks of experts, not {module.class_name}"

    def layout_for(self, module: ModuleInfo) -> Layout | None:
        if not self.should_convert(module):
            return None
        reason = self.why_not(module)
        if reason is not None:
            self.skip_reasons[module.name] = reason
            return None
        return self.new_layout(
            replace(module, dtype=module.dtype if module.dtype in bnb_4bit.WEIGHT_DTYPES else "float32")
        )

    def new_layout(self, module: ModuleInfo) -> Layout:
        raise NotImplementedError


def _contradiction(module: ModuleInfo, stored: Mapping[str, Any], name: str, says: str, holds: str) -> ShapeMismatch:
    return ShapeMismatch(
        f"{module.name}: the configuration says {says}, but tensor {stored[name].name!r} in {stored[name].file} belongs to "
        f"a weight of {holds}. Set load_in_4bit or load_in_8bit in quantization_config as the file was written"
    )


def _held_turned(module: ModuleInfo) -> bool:
    return module.kind == "experts" and module.transposed  # a Conv1D is turned before it is quantized


@register_quantizer("bitsandbytes_4bit")
class Bnb4BitHfQuantizer(_BnbQuantizer):
    """NF4 and FP4."""

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        super().validate_environment(*args, device_map=device_map, **kwargs)
        kind = self.quantization_config.bnb_4bit_quant_type
        if kind not in bnb_4bit.QUANT_TYPES:
            raise InvalidOption(f"BitsAndBytesConfig: bnb_4bit_quant_type is {kind!r}; it must be 'nf4' or 'fp4'")

    def why_not(self, module: ModuleInfo) -> str | None:
        if module.kind == "experts" and math.prod(module.shape[-2:]) % bnb_4bit.BLOCKSIZE:
            return f"blocks of {bnb_4bit.BLOCKSIZE} would run from one expert {module.shape[-2:]} into the next"
        return super().why_not(module)

    def layout_of(self, module: ModuleInfo, stored: Mapping[str, Any], peek: Callable[[str], Any]) -> Layout | None:
        if "SCB" in stored:
            raise _contradiction(module, stored, "SCB", "load_in_4bit", "8 bits")
        own = "" if module.kind == "experts" else "weight"
        others = [name for name in stored if name != own and name.startswith(f"{own}." if own else "")]
        if not others:
            return None
        start = layouts.join_name(own, "quant_state.bitsandbytes__")
        states = [name for name in others if name in {start + kind for kind in bnb_4bit.QUANT_TYPES}]
        if len(states) != 1:
            wanted = layouts.join_name(module.name, start + self.quantization_config.bnb_4bit_quant_type)
            raise MissingTensor(
                f"tensor {wanted!r}, which tells how the 4-bit weight was quantized, is stored {len(states)} times, not once. "
                f"There are {', '.join(stored[name].name for name in others)}"
            )
        info = stored[states[0]]
        if info.nbytes > bnb_4bit.LIMIT_STATE or info.dtype != "uint8" or len(info.shape) != 1:
            raise ShapeMismatch(
                f"tensor {info.name!r} in {info.file} is {info.dtype} {info.shape}, expected a short JSON text as uint8"
            )
        raw = peek(states[0]).numpy().tobytes()
        state = bnb_4bit.QuantState.parse(raw, info.name)
        other = (*module.shape[:-2], module.shape[-1], module.shape[-2])
        # bitsandbytes quantizes a stack as the model class holds it, which decides where both readings fit
        turned = state.shape == other and (state.shape != module.shape or _held_turned(module))
        if state.shape not in (module.shape, other):
            raise ShapeMismatch(
                f"tensor {info.name!r} in {info.file} is of a weight {state.shape}, {module.name} is {module.shape}"
            )
        storage = stored[own].dtype if own in stored else "uint8"
        if storage not in STORAGE_DTYPES:
            raise ShapeMismatch(
                f"tensor {stored[own].name!r} in {stored[own].file} is {storage}; 4-bit codes are {', '.join(STORAGE_DTYPES)}"
            )
        return bnb_4bit.Bnb4BitLayout(
            module.shape, state.dtype, state.quant_type, state.blocksize, state.nested_blocksize, storage, own, turned,
            len(raw), verbatim=raw != state.to_bytes(),
        )  # fmt: skip

    def new_layout(self, module: ModuleInfo) -> Layout:
        config = self.quantization_config
        layout = bnb_4bit.Bnb4BitLayout(
            module.shape, module.dtype, config.bnb_4bit_quant_type,
            nested_blocksize=bnb_4bit.NESTED_BLOCKSIZE if config.bnb_4bit_use_double_quant else None,
            storage=str(config.bnb_4bit_quant_storage).removeprefix("torch."),
            own="" if module.kind == "experts" else "weight", turned=_held_turned(module),
        )  # fmt: skip
        try:
            layout.scheme()
        except NotRepresentable as error:
            raise InvalidOption(f"{module.name}: {error}") from error
        return layout


@register_quantizer("bitsandbytes_8bit")
class Bnb8BitHfQuantizer(_BnbQuantizer):
    """LLM.int8."""

    def why_not(self, module: ModuleInfo) -> str | None:
        if module.kind == "experts":
            return "LLM.int8 has no form for a stack of experts; load_in_4bit has one"
        if self.quantization_config.llm_int8_has_fp16_weight:
            return "llm_int8_has_fp16_weight keeps weights in 16 bit"
        return super().why_not(module)

    def layout_of(self, module: ModuleInfo, stored: Mapping[str, Any], peek: Callable[[str], Any]) -> Layout | None:
        for name in stored:
            if "quant_state.bitsandbytes__" in name:
                raise _contradiction(module, stored, name, "load_in_8bit", "4 bits")
        if not ({"SCB", "weight_format"} & set(stored) or ("weight" in stored and stored["weight"].dtype == "int8")):
            return None
        return llm_int8.LlmInt8Layout(
            module.shape, module.dtype, self.quantization_config.llm_int8_threshold, "weight_format" in stored
        )

    def new_layout(self, module: ModuleInfo) -> Layout:
        return llm_int8.LlmInt8Layout(module.shape, module.dtype, self.quantization_config.llm_int8_threshold)
