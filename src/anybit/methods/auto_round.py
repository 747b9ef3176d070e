"""AutoRound (Intel). GPTQ or AWQ tensors with codes chosen by signed gradient descent; `packing_format` names the layout.

Stored: qweight, qzeros, scales, bias as in GPTQ (without g_idx; continuous bit streams also for 5, 6 and 7 bits) or as in AWQ
gemm. Symmetric files have negative scales. "auto_round:gptq" and "auto_round:auto_gptq" store zero - 1, "auto_round" and
"auto_round:gptqmodel" store the zero, "auto_round:awq" and "auto_round:auto_awq" are AWQ's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from anybit.errors import InvalidOption
from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.config import QuantizationConfigMixin
from anybit.quantizers.options import check_choice, check_flags, check_group_size, check_objects, check_type
from anybit.quantizers.registry import register_quantization_config, register_quantizer


@register_quantization_config("auto-round")
@dataclass(eq=False, repr=False)
class AutoRoundConfig(QuantizationConfigMixin):
    """`extra_config` overrides the options for single modules. Passed for a GPTQ or AWQ checkpoint, it takes that over."""

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    backend: str = "auto"
    packing_format: str = "auto_round:gptq"
    extra_config: dict[str, Any] | None = None
    data_type: str | None = None
    block_name_to_quantize: str | list[Any] | None = None

    method: ClassVar[str] = "auto-round"
    side_files: ClassVar[tuple[str, ...]] = ("quantization_config.json",)
    loading_attributes: ClassVar[tuple[str, ...]] = ("backend",)
    optional: ClassVar[tuple[str, ...]] = ("extra_config", "data_type", "block_name_to_quantize")

    def post_init(self) -> None:
        check_choice(self, "bits", range(2, 9))
        check_group_size(self)
        check_flags(self, "sym")
        check_type(self, "backend", str)
        check_type(self, "packing_format", str)
        check_objects(self, "extra_config")

    @classmethod
    def recognizes(cls, config_dict: Mapping[str, Any]) -> bool:
        return _is_own(config_dict.get("quant_method"))

    @classmethod
    def modernize(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        written_by = str(getattr(config_dict.get("quant_method"), "value", config_dict.get("quant_method", cls.method)))
        if _is_own(written_by):
            return config_dict
        if written_by not in ("gptq", "awq"):
            raise InvalidOption(
                f"AutoRoundConfig: it takes checkpoints of auto-round, gptq and awq, not of {written_by!r}"
            )
        version = str(config_dict.get("version", "gemm")).lower()
        if config_dict.get("meta") is not None or version != "gemm":
            raise InvalidOption(
                "AutoRoundConfig: it takes gptq checkpoints of version 1 and awq checkpoints of version 'gemm', but this is "
                f"another kind of {written_by}. Load it without a configuration: it is read as what it is"
            )
        return {**config_dict, "packing_format": f"auto_round:{written_by}"}

    def adopt(self, stored: QuantizationConfigMixin) -> QuantizationConfigMixin | None:
        made: QuantizationConfigMixin | None = (
            None if isinstance(stored, AutoRoundConfig) else self.from_dict(stored.to_dict())
        )
        return made


def _is_own(quant_method: Any) -> bool:
    """Also "intel/auto-round", of its first versions, and other spellings."""
    return "autoround" in str(quant_method).replace("-", "").replace("_", "")


@register_quantizer("auto-round")
class AutoRoundQuantizer(HfQuantizer):
    """AutoRound's layouts."""

    requires_calibration = True
