"""From a configuration class of torchao's, as plain data, to the layout it gives a weight."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from anybit.errors import CalibrationNeeded, InvalidOption
from anybit.methods import _torchao_data as data
from anybit.methods._torchao_inputs import Inputs
from anybit.methods._torchao_layouts import (
    Float8Layout,
    Int4Layout,
    Int4TileLayout,
    Int8Layout,
    IntxLayout,
    TorchaoLayout,
    sides_of,
)
from anybit.methods._torchao_records import SCALES
from anybit.quantizers.options import listed

if TYPE_CHECKING:
    from anybit.weight.layout import ModuleInfo

MAPPINGS = ("SYMMETRIC", "SYMMETRIC_NO_CLIPPING_ERR", "ASYMMETRIC")
PER_ROW = {"_type": "PerRow", "_data": {"dim": -1}}
PER_TENSOR: dict[str, Any] = {"_type": "PerTensor", "_data": {}}
AUTO = data.member("KernelPreference", "AUTO")


class StaysDense(Exception):
    """torchao leaves such a weight as it is; the text says why."""


class Wish:
    """What a configuration asks for one weight: its options, the module, and the name of the parameter in it."""

    def __init__(self, config: Mapping[str, Any], module: ModuleInfo, parameter: str):
        self.tensor_config = str(config["_type"])
        self.version = config.get("_version", 1)
        self.own: Mapping[str, Any] = config.get("_data") or {}
        self.module, self.parameter, self.shape = module, parameter, module.shape
        self.dtype = module.dtype if module.dtype in SCALES else "float32"

    def common(self, attributes: Mapping[str, Any], *parts: str) -> dict[str, Any]:
        return {
            "shape": self.shape, "dtype": self.dtype, "parameter": self.parameter,
            "attributes": json.dumps(attributes), "parts": parts,
        }  # fmt: skip

    def block(self, granularity: Any) -> tuple[int, ...]:
        found = data.block_of(granularity, self.shape, self.tensor_config)
        if any(size % side for size, side in zip(self.shape, found, strict=True)):
            raise StaysDense(f"blocks of {list(found)} do not divide its shape {self.shape}")
        if len(found) == 3 and found[0] != 1:
            raise StaysDense("all experts would share a scale")
        return found

    def invalid(self, name: str, cure: str) -> InvalidOption:
        return InvalidOption(f"TorchAoConfig: {name} of {self.tensor_config} is {self.own.get(name)!r}; {cure}")

    def both_granularities(self, default: Mapping[str, Any]) -> tuple[Any, Any]:
        """Of inputs and of weights: one for both, or a list of two."""
        found = self.own.get("granularity") or default
        if isinstance(found, list):
            if len(found) != 2:
                raise self.invalid("granularity", "it must be one, or two: for inputs and for weights")
            return found[0], found[1]
        return found, found


def layout_of(config: Mapping[str, Any], module: ModuleInfo, parameter: str) -> TorchaoLayout:
    """Raises StaysDense, InvalidOption or CalibrationNeeded."""
    maker = MAKERS.get(config["_type"])
    if maker is None:
        raise InvalidOption(
            f"TorchAoConfig: anybit cannot quantize with {config['_type']}; it can with {', '.join(MAKERS)}. Checkpoints that "
            "torchao made with it may still load"
        )
    if module.transposed:
        raise StaysDense(
            "the model class holds these experts as [in, out], and groups of columns would run across outputs"
        )
    return maker(Wish(config, module, parameter))


# --- integers ------------------------------------------------------------------------------------------------------------


def _int8_attributes(wish: Wish, block: tuple[int, ...], kwargs: Any, reduced: bool) -> dict[str, Any]:
    return {
        "act_quant_kwargs": kwargs,
        "reduce_range": reduced,
        "block_size": list(block),
        "dtype": data.dtype(wish.dtype),
    }


def _int8_layout(wish: Wish, block: tuple[int, ...], inputs: Inputs | None, kwargs: Any, reduced: bool) -> Int8Layout:
    own = wish.common(_int8_attributes(wish, block, kwargs, reduced), "zero_point", "qdata", "scale")
    return Int8Layout(**own, inputs=inputs, block=sides_of(block, wish.shape), zero_dtype="int8", reduced=reduced)


def _int8_weight_only(wish: Wish) -> TorchaoLayout:
    granularity = wish.own.get("granularity") or PER_ROW
    if wish.own.get("group_size") is not None:
        granularity = {"_type": "PerGroup", "_data": {"group_size": wish.own["group_size"]}}
    return _int8_layout(wish, wish.block(granularity), None, None, False)


def _int8_dynamic(wish: Wish) -> TorchaoLayout:
    inputs, weights = wish.both_granularities(PER_ROW)
    mapping = data.name(wish.own.get("act_mapping_type"), "SYMMETRIC")
    if mapping not in ("SYMMETRIC", "ASYMMETRIC"):
        raise wish.invalid("act_mapping_type", "it must be SYMMETRIC or ASYMMETRIC")
    for granularity in (inputs, weights):
        if data.kind(granularity) not in ("PerRow", "PerTensor"):
            raise wish.invalid("granularity", "inputs and weights can be PerRow or PerTensor")
    reduced = bool(wish.own.get("reduce_range"))
    kwargs = {
        "_type": "QuantizeTensorToInt8Kwargs",
        "_data": {
            "granularity": {"_type": data.kind(inputs), "_data": dict(data.fields(inputs))},
            "mapping_type": data.member("MappingType", mapping),
            "reduce_range": reduced,
        },
    }
    how = Inputs(
        "torchao_int8", granularity="token" if data.kind(inputs) == "PerRow" else "tensor",
        symmetric=mapping == "SYMMETRIC", reduced=reduced,
    )  # fmt: skip
    return _int8_layout(wish, wish.block(weights), how, kwargs, reduced)


def _int8_static(wish: Wish) -> TorchaoLayout:
    raise CalibrationNeeded(
        f"{wish.tensor_config} needs the scale of every layer's inputs, which come from calibration data. Quantize inputs as "
        "they come, with Int8DynamicActivationInt8WeightConfig"
    )


def _intx_layout(wish: Wish, weight_dtype: str, granularity: Any, mapping: str, quantized: str | None) -> IntxLayout:
    bits = weight_dtype.removeprefix("int")
    if not weight_dtype.startswith("int") or not bits.isdigit() or not 1 <= int(bits) <= 8:
        raise wish.invalid("weight_dtype", "it must be int1 to int8")
    if mapping not in MAPPINGS:
        raise wish.invalid("mapping_type", f"it must be {listed(MAPPINGS)}")
    if len(wish.shape) != 2:
        raise StaysDense(f"{wish.tensor_config} is for matrices, its shape is {wish.shape}")
    packing_format = data.name(wish.own.get("intx_packing_format"), "UNPACKED_TO_INT8").upper()
    if packing_format != "UNPACKED_TO_INT8":
        raise wish.invalid(
            "intx_packing_format", "only UNPACKED_TO_INT8 is a form of files, the others belong to one machine"
        )
    algorithm = data.name(wish.own.get("intx_choose_qparams_algorithm"), "AFFINE").upper()
    if algorithm not in ("AFFINE", "HQQ_SCALE_ONLY"):
        raise wish.invalid("intx_choose_qparams_algorithm", "it must be AFFINE or HQQ_SCALE_ONLY")
    scale_dtype = data.name(wish.own.get("scale_dtype", wish.own.get("weight_scale_dtype")), wish.dtype)
    if scale_dtype not in SCALES:
        raise wish.invalid("scale_dtype", f"it must be {listed(SCALES)}")
    block = wish.block(granularity)
    attributes = {
        "target_dtype": data.dtype(weight_dtype),
        "block_size": list(block),
        "dtype": data.dtype(wish.dtype),
        "activation_quantization": quantized,
    }
    return IntxLayout(
        **wish.common(attributes, "qdata", "scale", "zero_point"),
        inputs=Inputs("torchao_int8_qdq", symmetric=False) if quantized else None,
        block=sides_of(block, wish.shape),
        scale_dtype=scale_dtype,
        zero_dtype="int8",
        bits=int(bits),
        mapping=mapping,
        search=algorithm == "HQQ_SCALE_ONLY",
    )


def _intx_weight_only(wish: Wish) -> TorchaoLayout:
    granularity = wish.own.get("granularity") or {"_type": "PerAxis", "_data": {"axis": 0}}
    mapping = data.name(wish.own.get("mapping_type"), "SYMMETRIC")
    return _intx_layout(wish, data.name(wish.own.get("weight_dtype"), "int8"), granularity, mapping, None)


def _int8_dynamic_intx(wish: Wish) -> TorchaoLayout:
    if data.name(wish.own.get("act_mapping_type"), "ASYMMETRIC") != "ASYMMETRIC":
        raise wish.invalid("act_mapping_type", "torchao knows inputs that are ASYMMETRIC here")
    granularity = wish.own.get("weight_granularity") or {"_type": "PerGroup", "_data": {"group_size": 32}}
    mapping = data.name(wish.own.get("weight_mapping_type"), "SYMMETRIC")
    dtype = data.name(wish.own.get("weight_dtype"), "int8")
    return _intx_layout(wish, dtype, granularity, mapping, "int8_asym_per_token")


def _int8_dynamic_int4(wish: Wish) -> TorchaoLayout:
    """The older name of the former with int4."""
    granularity = {"_type": "PerGroup", "_data": {"group_size": wish.own.get("group_size", 32)}}
    mapping = data.name(wish.own.get("mapping_type"), "SYMMETRIC")
    return _intx_layout(wish, "int4", granularity, mapping, "int8_asym_per_token")


def _int4_weight_only(wish: Wish) -> TorchaoLayout:
    # version 1 had no plain form
    default = "plain" if wish.version != 1 else "tile_packed_to_4d"
    packing_format = data.name(wish.own.get("int4_packing_format"), default).lower()
    size = wish.own.get("group_size", 128)
    if data.name(wish.own.get("int4_choose_qparams_algorithm"), "TINYGEMM").upper() != "TINYGEMM":
        raise wish.invalid("int4_choose_qparams_algorithm", "anybit finds ranges as TINYGEMM does")
    if packing_format not in ("plain", "tile_packed_to_4d"):
        raise wish.invalid("int4_packing_format", "only plain and tile_packed_to_4d are forms that anybit writes")
    if type(size) is not int or size <= 0:
        raise wish.invalid("group_size", "it must be a positive number of inputs")
    if wish.shape[-1] % size:
        raise StaysDense(f"groups of {size} do not divide its {wish.shape[-1]} inputs")
    block = [*([1] * (len(wish.shape) - 1)), size]
    attributes: dict[str, Any] = {"block_size": block, "shape": list(wish.shape)}
    if packing_format == "plain":
        attributes = {"activation_dtype": data.dtype("bfloat16"), **attributes}
        own = wish.common(attributes, "qdata", "scale", "zero_point")
        return Int4Layout(**own, group_size=size, scale_dtype=wish.dtype)
    if 1024 % size:
        raise wish.invalid("group_size", "tiles have 1024 columns, which it must divide")
    return Int4TileLayout(**{**wish.common(attributes, "qdata", "scale_and_zero")}, group_size=size)


# --- floats --------------------------------------------------------------------------------------------------------------


def _float8_dtype(wish: Wish, name: str) -> str:
    found = data.name(wish.own.get(name), "float8_e4m3fn")
    if found not in ("float8_e4m3fn", "float8_e5m2"):
        raise wish.invalid(name, "it must be float8_e4m3fn or float8_e5m2")
    return found


def _float8_layout(
    wish: Wish, block: tuple[int, ...], dtype: str, inputs: Inputs | None, kwargs: Any, mm_config: Any
) -> TorchaoLayout:
    attributes = {
        "block_size": list(block),
        "mm_config": mm_config,
        "act_quant_kwargs": kwargs,
        "kernel_preference": wish.own.get("kernel_preference") or AUTO,
        "dtype": data.dtype(wish.dtype),
    }
    return Float8Layout(
        **wish.common(attributes, "qdata", "scale"), inputs=inputs, block=sides_of(block, wish.shape), qdata_dtype=dtype
    )


def _float8_weight_only(wish: Wish) -> TorchaoLayout:
    block = wish.block(wish.own.get("granularity") or PER_ROW)
    return _float8_layout(wish, block, _float8_dtype(wish, "weight_dtype"), None, None, None)


def _float8_dynamic(wish: Wish) -> TorchaoLayout:
    inputs, weights = wish.both_granularities(PER_TENSOR)
    if any(size % 16 for size in wish.shape[-2:]):
        raise StaysDense(f"torchao multiplies multiples of 16 in FP8, its shape is {wish.shape}")
    if data.name(wish.own.get("packing_format"), "plain").lower() != "plain":
        raise wish.invalid("packing_format", "only plain can be written")
    kinds = (data.kind(inputs), data.kind(weights))
    granularity = {
        ("PerTensor", "PerTensor"): "tensor",
        ("PerRow", "PerRow"): "token",
        ("PerBlock", "PerBlock"): "group",
    }.get(kinds)
    if granularity is None:
        raise wish.invalid("granularity", "inputs and weights must both be PerRow, both PerTensor, or PerBlock")
    size = data.block_of(inputs, wish.shape, wish.tensor_config)[-1] if granularity == "group" else None
    inputs_dtype = _float8_dtype(wish, "activation_dtype")
    lower, upper = wish.own.get("activation_value_lb"), wish.own.get("activation_value_ub")
    preference = wish.own.get("kernel_preference") or AUTO
    kwargs = {
        "_type": "QuantizeTensorToFloat8Kwargs",
        "_data": {
            "float8_dtype": data.dtype(inputs_dtype),
            "granularity": {"_type": data.kind(inputs), "_data": dict(data.fields(inputs))},
            "mm_config": None, "hp_value_lb": lower, "hp_value_ub": upper, "kernel_preference": preference,
        },
    }  # fmt: skip
    mm_config = wish.own.get("mm_config") or {
        "_type": "Float8MMConfig",
        "_data": {"emulate": False, "use_fast_accum": granularity != "group", "pad_inner_dim": False},
    }
    how = Inputs("torchao_float8", inputs_dtype, granularity, size, lower=lower, upper=upper)
    mm_config = {"_type": data.kind(mm_config), "_data": dict(data.fields(mm_config))}
    return _float8_layout(wish, wish.block(weights), _float8_dtype(wish, "weight_dtype"), how, kwargs, mm_config)


def _float8_dynamic_int4(wish: Wish) -> TorchaoLayout:
    packing_format = data.name(wish.own.get("int4_packing_format"), "preshuffled").lower()
    if packing_format != "plain":
        raise wish.invalid(
            "int4_packing_format", "only 'plain' is a form of files; preshuffled codes belong to one GPU kernel"
        )
    if wish.shape[-1] % 128:
        raise StaysDense(f"groups of 128 do not divide its {wish.shape[-1]} inputs")
    attributes = {
        "activation_dtype": data.dtype("float8_e4m3fn"),
        "block_size": [*([1] * (len(wish.shape) - 1)), 128],
        "shape": list(wish.shape),
    }
    return Int4Layout(
        **wish.common(attributes, "qdata", "scale", "zero_point"),
        inputs=Inputs("torchao_float8", "float8_e4m3fn"),
        group_size=128,
        scale_dtype=wish.dtype,
        symmetric=True,
    )


MAKERS: dict[str, Callable[[Wish], TorchaoLayout]] = {
    "Int8WeightOnlyConfig": _int8_weight_only,
    "Int8DynamicActivationInt8WeightConfig": _int8_dynamic,
    "Int8StaticActivationInt8WeightConfig": _int8_static,
    "IntxWeightOnlyConfig": _intx_weight_only,
    "Int8DynamicActivationIntxWeightConfig": _int8_dynamic_intx,
    "Int8DynamicActivationInt4WeightConfig": _int8_dynamic_int4,
    "Int4WeightOnlyConfig": _int4_weight_only,
    "Float8WeightOnlyConfig": _float8_weight_only,
    "Float8DynamicActivationFloat8WeightConfig": _float8_dynamic,
    "Float8DynamicActivationInt4WeightConfig": _float8_dynamic_int4,
}
