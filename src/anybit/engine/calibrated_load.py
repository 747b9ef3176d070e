"""Loading a dense model quantized with calibration data: made in a folder that lives as long as the model, then loaded."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anybit.engine import devices
from anybit.engine.load import Progress, load
from anybit.engine.quantize import quantize
from anybit.errors import ConfigError
from anybit.quantizers.auto import AutoQuantizationConfig


def wants_data(location: Path, quantization_config: Any, calibration: Any) -> bool:
    """Whether a load is to be calibrated: data is given, or a configuration for a dense checkpoint carries it."""
    own = quantization_config
    texts = own.get("dataset") if isinstance(own, Mapping) else getattr(own, "dataset", None)
    if calibration is None and texts is None:
        return False
    if AutoQuantizationConfig.find(location) is None:
        return True
    if calibration is not None:
        raise ConfigError(f"{location} is already quantized; calibration data is for quantizing dense weights")
    return False


def load_calibrated(
    path: str | os.PathLike[str],
    quantization_config: Any,
    calibration: Any = None,
    *,
    dtype: torch.dtype | str | None = "auto",
    device_map: Any = None,
    rotate: str | bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
    hub_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> nn.Module:
    """`load`, with the weights rounded by the method's calibrated algorithm. Takes a block of dense weights in memory at a time.

    The checkpoint is written to a temporary folder first, which goes when the model does; `quantize` keeps one.
    """
    if isinstance(quantization_config, Mapping):
        quantization_config = AutoQuantizationConfig.from_dict(dict(quantization_config))
    folder = tempfile.TemporaryDirectory(prefix="anybit-calibrated-")
    try:
        made = Path(folder.name) / "model"
        quantize(
            path, made, quantization_config, calibration=calibration, rotate=rotate, dtype=dtype,
            device=devices.main_device(device_map), allow_pickle=allow_pickle, progress=progress, hub_options=hub_options,
        )  # fmt: skip
        model: Any = load(made, dtype=dtype, device_map=device_map, progress=progress, **options)
    except BaseException:
        folder.cleanup()
        raise
    weakref.finalize(model, folder.cleanup)
    model.anybit_plan.path = model.config._name_or_path = model.name_or_path = str(path)
    return model
