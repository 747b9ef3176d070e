"""Methods whose codes are fitted to calibration data. No method of its own: the name starts with an underscore."""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any

from anybit.quantizers.base import HfQuantizer

if TYPE_CHECKING:
    from anybit.quantizers.config import QuantizationConfigMixin
    from anybit.weight.layout import ModuleInfo


class CalibratedQuantizer(HfQuantizer):
    """Made with `quantize(..., calibration=...)`; their layouts have no algorithm that does without, so a load refuses."""

    requires_calibration = True

    def __init__(self, quantization_config: QuantizationConfigMixin, *, pre_quantized: bool = True, **kwargs: Any):
        # what is found out about a model is written into the configuration, and the caller's may be used for another one
        super().__init__(quantization_config if pre_quantized else copy.deepcopy(quantization_config), **kwargs)
        self.pre_quantized = pre_quantized  # only now: whether there is calibration data is the engine's to know

    def can_be_calibrated(self, module: ModuleInfo) -> bool:
        """Whether a module is converted; else `skip_reasons` says why not."""
        if not self.should_convert(module):
            return False
        if module.kind != "linear":
            self.skip_reasons[module.name] = f"{self.method_name} stores linear layers, this is a {module.kind}"
        elif re.search(r"\.\d+\.", module.name) is None:
            self.skip_reasons[module.name] = "it lies outside of the blocks that calibration runs"
        return module.name not in self.skip_reasons

    def left_dense(self) -> list[str]:
        """For the configuration of a new checkpoint: modules by name and, as the method's own files have it, by parameter."""
        return sorted(f"{name}{ending}" for name in self.skip_reasons for ending in ("", ".weight"))
