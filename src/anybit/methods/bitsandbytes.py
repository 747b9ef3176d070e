"""bitsandbytes: NF4 and FP4 in blocks of 64 with optional nested scales, and LLM.int8 rows with outlier activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from anybit.errors import ConfigError, InvalidOption
from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.config import QuantizationConfigMixin, difference
from anybit.quantizers.options import DtypeOption, check_names, check_type
from anybit.quantizers.registry import register_quantization_config, register_quantizer

STORAGE_DTYPES = ("float16", "float32", "int8", "uint8", "float64", "bfloat16")


@register_quantization_config("bitsandbytes_8bit")
@register_quantization_config("bitsandbytes_4bit")
@dataclass(eq=False, repr=False)
class BitsAndBytesConfig(QuantizationConfigMixin):
    """One class for both widths; exactly one of `load_in_4bit` and `load_in_8bit` selects the quantizer."""

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

    def __setattr__(self, name: str, value: Any) -> None:
        before = self.__dict__.get(name)
        super().__setattr__(name, value)
        if name in self.claims and self.__dict__.get("load_in_4bit") and self.__dict__.get("load_in_8bit"):
            self.__dict__[name] = before
            raise InvalidOption(
                "BitsAndBytesConfig: load_in_4bit and load_in_8bit are both true; a module has one width. Set one of them to False"
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
        """"llm_int8", "fp4", "nf4", or None when no width is selected."""
        if self.load_in_8bit:
            return "llm_int8"
        return self.bnb_4bit_quant_type if self.load_in_4bit and self.bnb_4bit_quant_type in ("fp4", "nf4") else None

    def own_dict(self) -> dict[str, Any]:
        own = super().own_dict()
        return {**own, "_load_in_4bit": own["load_in_4bit"], "_load_in_8bit": own["load_in_8bit"]}

    def to_diff_dict(self) -> dict[str, Any]:
        return difference(self, BitsAndBytesConfig())


class _BnbQuantizer(HfQuantizer):
    def skipped_modules(self) -> Sequence[str] | None:
        skipped: Sequence[str] | None = self.quantization_config.llm_int8_skip_modules
        return skipped


@register_quantizer("bitsandbytes_4bit")
class Bnb4BitHfQuantizer(_BnbQuantizer):
    """NF4 and FP4."""

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        super().validate_environment(*args, device_map=device_map, **kwargs)
        if self.quantization_config.bnb_4bit_quant_type not in ("nf4", "fp4"):
            raise InvalidOption(
                f"BitsAndBytesConfig: bnb_4bit_quant_type is {self.quantization_config.bnb_4bit_quant_type!r}; it must be 'nf4' or 'fp4'"
            )


@register_quantizer("bitsandbytes_8bit")
class Bnb8BitHfQuantizer(_BnbQuantizer):
    """LLM.int8."""
