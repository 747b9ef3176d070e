"""The dispatch API, under the names users know from `transformers.quantizers`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anybit._names import lazy

if TYPE_CHECKING:
    from anybit.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig
    from anybit.quantizers.base import HfQuantizer
    from anybit.quantizers.config import QuantizationConfigMixin, QuantizationMethod
    from anybit.quantizers.matching import should_convert_module
    from anybit.quantizers.registry import (
        AUTO_QUANTIZATION_CONFIG_MAPPING,
        AUTO_QUANTIZER_MAPPING,
        register_quantization_config,
        register_quantizer,
    )

__all__ = [
    "AUTO_QUANTIZATION_CONFIG_MAPPING",
    "AUTO_QUANTIZER_MAPPING",
    "AutoHfQuantizer",
    "AutoQuantizationConfig",
    "HfQuantizer",
    "QuantizationConfigMixin",
    "QuantizationMethod",
    "register_quantization_config",
    "register_quantizer",
    "should_convert_module",
]

_HOME = "anybit.quantizers."
__getattr__, __dir__ = lazy(
    __name__,
    {
        "AUTO_QUANTIZATION_CONFIG_MAPPING": f"{_HOME}registry",
        "AUTO_QUANTIZER_MAPPING": f"{_HOME}registry",
        "AutoHfQuantizer": f"{_HOME}auto",
        "AutoQuantizationConfig": f"{_HOME}auto",
        "HfQuantizer": f"{_HOME}base",
        "QuantizationConfigMixin": f"{_HOME}config",
        "QuantizationMethod": f"{_HOME}config",
        "register_quantization_config": f"{_HOME}registry",
        "register_quantizer": f"{_HOME}registry",
        "should_convert_module": f"{_HOME}matching",
    },
)
