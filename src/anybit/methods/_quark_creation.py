"""Quark from dense weights: what can be made without data, and the layout each module gets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from anybit.errors import CalibrationNeeded, InvalidOption, NotRepresentable
from anybit.methods import _quark_floats as floats
from anybit.methods import _quark_integers as integers
from anybit.methods import _quark_states as states
from anybit.methods._quark_layouts import is_symmetric

if TYPE_CHECKING:
    from anybit.weight.layout import Layout, ModuleInfo

INTEGERS = ("int4", "uint4", "int8", "uint8", "uint2")
FP8 = {"fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}
SCALE_TYPES = ("float32", "float16", "bfloat16")


def refuse(config: Any) -> None:
    """CalibrationNeeded where the configuration asks for an algorithm on data; else what is wrong with it."""
    if config.custom_mode == "awq":
        raise InvalidOption(
            "QuarkConfig: quant_method 'awq' writes AutoAWQ's tensors; make them with AwqConfig (--method awq)"
        )
    if config.custom_mode == "fp8" and config.kv_cache_scheme is not None:
        raise InvalidOption(
            f"QuarkConfig: kv_cache_scheme is {config.kv_cache_scheme!r}; files of quant_method 'fp8' with a quantized cache are "
            "not made here. Use quant_method 'quark' and kv_cache_quant_config"
        )
    if config.kv_cache_post_rope:
        raise InvalidOption(
            "QuarkConfig: kv_cache_post_rope is true, and caches are measured before the rotation of keys here; leave it out"
        )
    asked = [name for name in ("algo_config", "softmax_quant_spec") if getattr(config, name)]
    if asked:
        raise CalibrationNeeded(
            f"QuarkConfig asks for {' and '.join(asked)}, which needs data; weights are only rounded here. Leave "
            f"{'it' if len(asked) == 1 else 'them'} out"
        )
    if (config.export or {}).get("weight_format") == "fake_quantized":
        raise NotRepresentable(
            "QuarkConfig: export.weight_format is 'fake_quantized', which keeps weights dense; use 'real_quantized'"
        )
    found = config.custom_mode == "fp8"
    for where, settings in _settings(config):
        found = found or bool(settings.get("weight"))
        if settings.get("bias"):
            raise InvalidOption(f"QuarkConfig: {where}.bias quantizes biases, which is not done here; set it to null")
        outputs = settings.get("output_tensors")
        if any(own.get("is_dynamic") for own in _listed(outputs)):
            raise InvalidOption(
                f"QuarkConfig: {where}.output_tensors is dynamic, and outputs are quantized by stored scales alone; set "
                "is_dynamic: false, and quantize with calibration data"
            )
    if not found:
        raise InvalidOption(
            "QuarkConfig names no weight to quantize; set global_quant_config.weight, or use a scheme such as quark-int4-g128"
        )


def _settings(config: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if config.global_quant_config:
        yield "global_quant_config", config.global_quant_config
    for name in ("layer_quant_config", "layer_type_quant_config", "kv_cache_quant_config"):
        for pattern, settings in (getattr(config, name) or {}).items():
            if settings:
                yield f"{name}[{pattern!r}]", settings


def _listed(spec: Any) -> list[Mapping[str, Any]]:
    return list(spec) if isinstance(spec, list) else [spec] if spec else []


def layout_for(quantizer: Any, module: ModuleInfo) -> Layout | str:
    """The layout a dense module gets, or why it stays dense."""
    if module.kind not in ("linear", "embedding"):
        return f"Quark's layouts are of linear layers and embeddings, not of kind {module.kind!r}"
    spec = quantizer.spec_of(module.name, "weight", module.kind)
    inputs_spec = quantizer.spec_of(module.name, "input_tensors", module.kind)
    if spec is None:
        if inputs_spec is not None:
            raise InvalidOption(
                f"{module.name}: the configuration quantizes inputs and not the weight, which is not done here"
            )
        return "the configuration does not quantize its weight"
    dtype, scheme = str(spec.get("dtype")), spec.get("qscheme")
    columns = module.shape[1]
    size = int(spec.get("group_size") or (32 if dtype in states.MX else 0))
    if scheme == "per_group":
        size = columns if size == -1 else size
        if size <= 0:
            raise InvalidOption(f"{module.name}: qscheme is 'per_group' and group_size is {spec.get('group_size')!r}")
        if columns % size:
            return f"weights are in groups of {size} inputs, and {columns} is no multiple"
    inputs = states.inputs_of(module, inputs_spec, {}, making=True)
    numbers = _scale_dtype(spec, module.dtype)
    if dtype in states.MX and scheme == "per_group" and spec.get("scale_format") == "e8m0":
        mode = str(spec.get("scale_calculation_mode") or "even")
        if mode not in states.MODES:
            raise InvalidOption(f"{module.name}: scale_calculation_mode is {mode!r}; known are {states.MODES}")
        if columns % (2 if dtype == "fp4" else 4):
            return f"codes share bytes, and {columns} inputs do not fill them"
        return floats.FloatLayout(
            module.shape, module.dtype, levels=states.MX[dtype][0], block=(1, size), weight_dtype="uint8",
            scale_dtype="uint8", inputs=inputs, mode=mode,
        )  # fmt: skip
    if dtype in FP8 and scheme in ("per_tensor", "per_channel") and _rows_are_channels(spec):
        whole = scheme == "per_tensor"
        return floats.FloatLayout(
            module.shape, module.dtype, block=(0, 0) if whole else (1, 0), scale_dtype=numbers,
            scale_form="scalar" if whole else "flat", inputs=inputs, levels=floats.FP8[FP8[dtype]], weight_dtype=FP8[dtype],
        )  # fmt: skip
    if dtype in INTEGERS and (spec.get("zero_point_type") or "int32") == "int32" and _rows_are_channels(spec):
        return _integers(quantizer, module, spec, size, numbers, inputs)
    raise _unknown(module, spec)


def _integers(
    quantizer: Any, module: ModuleInfo, spec: Mapping[str, Any], size: int, numbers: str, inputs: Any
) -> Layout | str:
    dtype, scheme = str(spec["dtype"]), spec.get("qscheme")
    rows, columns = module.shape
    symmetric, signed = is_symmetric(spec), not dtype.startswith("u")
    if symmetric and not signed:
        raise InvalidOption(f"{module.name}: {dtype} has no code below zero; set symmetric: false, or use {dtype[1:]}")
    if scheme == "per_tensor" and spec.get("scale_type") not in SCALE_TYPES:
        numbers = "float32"
    common: dict[str, Any] = {"inputs": inputs, "symmetric": symmetric}
    shape = () if scheme == "per_tensor" else (rows,)
    if dtype.endswith("8") and scheme in ("per_tensor", "per_channel"):
        return integers.BytesLayout(
            module.shape, module.dtype, scale=("weight_scale", numbers, shape),
            zero=("weight_zero_point", dtype, shape), element=dtype, **common,
        )  # fmt: skip
    groups = columns // size if scheme == "per_group" else 1
    if dtype in ("int8", "uint8", "uint2") and scheme == "per_group":
        bits = int(dtype[-1])
        if rows * bits % 8:
            return f"four outputs share a byte, and {rows} is no multiple"
        element = "uint8" if dtype == "uint2" else dtype
        return integers.TurnedBytesLayout(
            module.shape, module.dtype, scale=("weight_scale", numbers, (groups, rows)),
            zero=("weight_zero_point", element, (groups, rows * bits // 8)), element=element, bits=bits, group_size=size,
            **common,
        )  # fmt: skip
    common |= {"signed": signed, "reordered": quantizer.pack_method == "reorder"}
    if dtype.endswith("4") and scheme in ("per_tensor", "per_channel"):
        if columns % 8 or rows % 8:
            return f"eight codes share a word, and {rows} outputs of {columns} inputs do not fill them"
        return integers.RowWordsLayout(
            module.shape, module.dtype, scale=("weight_scale", numbers, shape),
            zero=("weight_zero_point", "int32", (rows // 8,) if shape else ()), **common,
        )  # fmt: skip
    if dtype.endswith("4") and scheme == "per_group":
        if rows % 8:
            return f"eight outputs share a word, and {rows} is no multiple"
        return integers.WordsLayout(
            module.shape, module.dtype, scale=("weight_scale", numbers, (groups, rows)),
            zero=("weight_zero_point", "int32", (groups, rows // 8)), group_size=size, **common,
        )  # fmt: skip
    raise _unknown(module, spec)


def _scale_dtype(spec: Mapping[str, Any], dtype: str) -> str:
    named = spec.get("scale_type") or "float"
    if named not in ("float", *SCALE_TYPES):
        raise InvalidOption(f"scale_type is {named!r}; known are 'float' (as the weight), {', '.join(SCALE_TYPES)}")
    return dtype if named == "float" else str(named)


def _rows_are_channels(spec: Mapping[str, Any]) -> bool:
    if spec.get("qscheme") == "per_channel":
        return spec.get("ch_axis") in (0, -2, None)
    return spec.get("qscheme") == "per_tensor" or spec.get("ch_axis") in (1, -1, None)


def _unknown(module: ModuleInfo, spec: Mapping[str, Any]) -> InvalidOption:
    told = {name: spec.get(name) for name in ("dtype", "qscheme", "ch_axis", "scale_format", "zero_point_type")}
    return InvalidOption(
        f"{module.name}: a weight of {told} is not made here. Made are int4, uint4, int8 and uint8 (per group, channel, tensor), "
        "uint2 (per group), fp8_e4m3 and fp8_e5m2 (per channel, tensor), and fp4, fp6_e3m2, fp6_e2m3 (per group, scale_format "
        "'e8m0')"
    )
