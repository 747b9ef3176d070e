"""HQQ. Groups of a flattened weight, along rows or columns, with a float zero point.

Stored beside each W_q (uint8, int32 for 3 bits, or the compute dtype): scale, zero, and every setting of the layer as a tensor:
nbits, group_size, axis, shape, packing (text as bytes), ... , bias. hqq's own folders keep the same in qmodel.pt.
M = (code - zero) * scale with one group in each row (axis 1) or column (axis 0) of M; W is M reshaped to [out, in].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from anybit.errors import InvalidOption
from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.config import QuantizationConfigMixin, difference
from anybit.quantizers.options import check_names, check_objects, listed
from anybit.quantizers.registry import register_quantization_config, register_quantizer

BITS = (8, 6, 5, 4, 3, 2, 1.58, 1)


@register_quantization_config("hqq")
class HqqConfig(QuantizationConfigMixin):
    """`quant_config` is one layer setting for all linears, or one for each tag: a module name without "model", "layers", numbers.

    A file holds `quant_config`; the arguments before it are another way to write it. They only say how to quantize: a stored
    layer carries its own settings.
    """

    method: ClassVar[str] = "hqq"

    def __init__(
        self,
        nbits: float = 4,
        group_size: int | None = 64,
        view_as_float: bool = False,
        axis: int | None = None,
        dynamic_config: Mapping[str, Mapping[str, Any]] | None = None,
        skip_modules: list[str] | None = None,
        quant_config: dict[str, Any] | None = None,
    ):
        if quant_config is not None:
            self.quant_config = quant_config
        elif dynamic_config is not None:
            self.quant_config = {tag: _tagged(tag, settings) for tag, settings in dynamic_config.items()}
        else:
            self.quant_config = layer_settings(
                nbits, group_size, view_as_float=view_as_float, axis=1 if axis is None else axis
            )
        self.skip_modules = ["lm_head"] if skip_modules is None else skip_modules
        self.__post_init__()

    def post_init(self) -> None:
        check_objects(self, "quant_config")
        check_names(self, "skip_modules")

    @classmethod
    def found_in(cls, folder: Path, model_config: Mapping[str, Any]) -> dict[str, Any] | None:
        if (folder / "qmodel.pt").is_file():
            return {"quant_method": cls.method, "quant_config": {}, "skip_modules": []}  # each layer has its own
        return super().found_in(folder, model_config)

    def to_diff_dict(self) -> dict[str, Any]:
        return difference(self, HqqConfig())


def _tagged(tag: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return layer_settings(**settings)
    except TypeError as error:
        raise InvalidOption(f"HqqConfig: dynamic_config[{tag!r}] is {settings!r}: {error}") from error


def layer_settings(
    nbits: float = 4,
    group_size: int | None = 64,
    quant_zero: bool = False,
    quant_scale: bool = False,
    offload_meta: bool = False,
    view_as_float: bool = False,
    axis: int = 1,
) -> dict[str, Any]:
    """What hqq's BaseQuantizeConfig makes of its arguments. InvalidOption names the one that is wrong."""
    if nbits not in BITS:
        raise InvalidOption(f"HqqConfig: nbits is {nbits!r}; it must be {listed(BITS)}")
    if axis not in (0, 1):
        raise InvalidOption(f"HqqConfig: axis is {axis!r}; it must be 0 or 1")
    if group_size is not None and (not isinstance(group_size, int) or group_size <= 0 or group_size % 8):
        raise InvalidOption(
            f"HqqConfig: group_size is {group_size!r}; it must be a positive multiple of 8, or null for whole rows"
        )
    meta = {"nbits": 8, "channel_wise": True, "group_size": 128, "optimize": False}
    whole = meta if offload_meta else {**meta, "channel_wise": False, "group_size": None}
    quant_scale = quant_zero if offload_meta else quant_scale
    return {
        "weight_quant_params": {
            "nbits": nbits, "channel_wise": True, "group_size": group_size, "optimize": True, "round_zero": nbits == 4,
            "axis": axis, "view_as_float": view_as_float,
        },
        "scale_quant_params": dict(meta) if quant_scale else None,
        "zero_quant_params": dict(whole) if quant_zero else None,
        "offload_meta": offload_meta,
    }  # fmt: skip


@register_quantizer("hqq")
class HqqHfQuantizer(HfQuantizer):
    """HQQ's layouts."""

    def skipped_modules(self) -> Sequence[str]:
        skipped: Sequence[str] = self.quantization_config.skip_modules
        return skipped
