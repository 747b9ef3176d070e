"""What a method stores beside weights that only a run of the model can tell: scales of a cache, of a layer's output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class Measurement:
    """Of one module, while calibration data runs through it.

    `specs`: the stored tensors, named relative to the module as a layout names its own: (dtype, shape).
    """

    specs: Mapping[str, tuple[str, tuple[int, ...]]]

    def listen(self, module: Any) -> Any:
        """Start; the handle's `remove()` ends it. What flows is not changed."""
        raise NotImplementedError(type(self).__name__)

    def tensors(self) -> dict[str, Tensor]:
        """What is to be stored, after all data has passed. Raises CalibrationNeeded when none has."""
        raise NotImplementedError(type(self).__name__)
