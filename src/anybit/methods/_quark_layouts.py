"""Quark: which layout a module has, told from dtypes and shapes of its tensors, and from the configuration what they cannot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from anybit.errors import InvalidOption, MissingTensor, ShapeMismatch
from anybit.methods._awq_layout import AwqGemmLayout
from anybit.methods._float_evidence import nvfp4_layout
from anybit.methods._quark_floats import FP8, FakeLayout, FloatLayout, ProgressiveLayout
from anybit.methods._quark_integers import BytesLayout, RowWordsLayout, TurnedBytesLayout, WordsLayout
from anybit.methods._quark_states import FLOATS, MX, inputs_of
from anybit.methods._scaled_floats import Spec
from anybit.quantizers.bundle import Derived
from anybit.weight.layout import Layout, ModuleInfo, join_name

PARAMETERS = ("weight_zero_point", "input_scale", "input_zero_point")


def awq_layout_of(quantizer: Any, module: ModuleInfo, stored: Mapping[str, Any]) -> Layout | None:
    """The layout of a file that calls itself "awq": AutoAWQ's tensors, with scales in the model's dtype."""
    if not {"qweight", "qzeros", "scales"} & set(stored) or module.kind != "linear":
        return None
    config = quantizer.quantization_config
    rows, columns = module.shape
    size = columns if config.group_size in (None, -1) else config.group_size
    if config.bits not in (None, 4):
        raise InvalidOption(f"QuarkConfig: bits is {config.bits!r}; Quark's AWQ files have 4")
    if size < 1:
        raise InvalidOption(f"QuarkConfig: group_size is {size}; it must be -1 or at least 1")
    if rows % 8 or columns % size:
        raise ShapeMismatch(
            f"{module.name} is stored packed, but its shape {module.shape} is no whole number of words of 8 outputs and groups "
            f"of {size} inputs; config.json and tensors contradict each other"
        )
    scales = stored.get("scales")
    layout = AwqGemmLayout(
        module.shape, module.dtype, 4, size, scale_dtype=scales.dtype if scales is not None else module.dtype,
        symmetric=config.zero_point is False, interleaved=quantizer.pack_method == "reorder",
    )  # fmt: skip
    for name, (dtype, shape) in layout.specs().items():
        if name not in stored:
            raise MissingTensor(f"tensor {join_name(module.name, name)!r} is not stored; {module.name} needs it")
        if (stored[name].dtype, tuple(stored[name].shape)) != (dtype, shape):
            raise ShapeMismatch(
                f"tensor {stored[name].name!r} is {stored[name].dtype} {tuple(stored[name].shape)}; AWQ's form of a weight "
                f"{module.shape} in groups of {size} has {dtype} {shape}"
            )
    if layout.scale_dtype not in FLOATS:
        raise ShapeMismatch(f"tensor {join_name(module.name, 'scales')!r} is {layout.scale_dtype}; scales are floats")
    return layout


def mended_names(checkpoint: Any) -> Any:
    """The checkpoint without a mistake of Quark 0.13 under transformers 5.6 and later.

    Its AWQ files have `qscales` and `qqzeros`, and every other `weight` is called `qweight` too.
    """
    packed = {name.removesuffix("qscales") for name in checkpoint.tensors if name.endswith(".qscales")}
    if not packed:
        return checkpoint
    derived = {}
    for name, info in checkpoint.tensors.items():
        owner, dot, own = name.rpartition(".")
        meant = {"qscales": "scales", "qqzeros": "qzeros"}.get(own, own)
        if own == "qweight" and f"{owner}{dot}" not in packed:
            meant = "weight"
        derived[f"{owner}{dot}{meant}"] = Derived((name,), info.dtype, tuple(info.shape))
    return checkpoint.renamed(derived)


def is_symmetric(spec: Mapping[str, Any]) -> bool:
    """Whether zero is the middle code; integers with a sign are so unless the configuration says otherwise."""
    named = spec.get("symmetric")
    return str(spec.get("dtype")).startswith("int") if named is None else bool(named)


# --- which layout ---------------------------------------------------------------------------------------------------


def layout_of(quantizer: Any, module: ModuleInfo, stored: Mapping[str, Any]) -> Layout | None:
    """The layout that a module's tensors have; dtypes and shapes tell, and the configuration what they cannot."""
    weight, scale = stored.get("weight"), stored.get("weight_scale")
    if weight is None or module.kind not in ("linear", "embedding"):
        return None
    if scale is None and weight.dtype in (*FLOATS, "float64"):
        beside = [name for name in PARAMETERS if name in stored]
        expected = quantizer.weight_format == "fake_quantized" and bool(
            quantizer.levels_of(module.name, "weight", module.kind)
        )
        if beside or expected:
            raise MissingTensor(
                f"tensor {join_name(module.name, 'weight_scale')!r} is not stored; {weight.name!r} is quantized by the "
                f"configuration{' and has ' + ', '.join(beside) if beside else ''}"
            )
        return None
    if scale is None:
        raise MissingTensor(
            f"tensor {join_name(module.name, 'weight_scale')!r} is not stored; {weight.name!r} is {weight.dtype}"
        )
    levels = quantizer.levels_of(module.name, "weight", module.kind)
    if len(levels) == 2:
        return _two_levels(quantizer, module, stored, *levels)
    return _layout_of(quantizer, module, stored, quantizer.spec_of(module.name, "weight", module.kind) or {})


def _two_levels(
    quantizer: Any, module: ModuleInfo, stored: Mapping[str, Any], first: Mapping[str, Any], second: Mapping[str, Any]
) -> Layout:
    """Scales that are quantized themselves (NVFP4), or codes of what are codes already (int4 of FP8)."""
    scale = stored["weight_scale"]
    if "weight_scale_2" not in stored:
        raise MissingTensor(
            f"tensor {join_name(module.name, 'weight_scale_2')!r} is not stored; the weight has two levels"
        )
    if second.get("is_scale_quant"):
        found = nvfp4_layout(module, {name: info for name, info in stored.items() if not name.startswith("input")})
        if found is None or quantizer.levels_of(module.name, "input_tensors"):
            raise ShapeMismatch(
                f"{module.name}: its scales are quantized, and {stored['weight'].name!r} {stored['weight'].dtype}, "
                f"{scale.name!r} {scale.dtype} are no NVFP4 with inputs as they are; other forms with two levels of scales are "
                "not known"
            )
        return replace(found, common_shape=tuple(stored["weight_scale_2"].shape))
    if first.get("dtype") not in ("fp8_e4m3", "fp8_e5m2") or tuple(scale.shape) not in ((), (1,), module.shape[:1]):
        raise ShapeMismatch(
            f"{module.name}: the first of its two levels is {first.get('dtype')!r} with {scale.name!r} {tuple(scale.shape)}; "
            "known are FP8 with one scale or one for each output"
        )
    names = {"weight": "weight", "weight_scale": "weight_scale_2", "weight_zero_point": "weight_zero_point_2"}
    below = {name: stored[own] for name, own in names.items() if own in stored}
    below |= {name: info for name, info in stored.items() if name.startswith("input_")}
    inner = _layout_of(quantizer, module, below, second)
    return ProgressiveLayout(module.shape, module.dtype, inner, ("weight_scale", scale.dtype, tuple(scale.shape)))


def _layout_of(quantizer: Any, module: ModuleInfo, stored: Mapping[str, Any], spec: Mapping[str, Any]) -> Layout:
    """The layout of one level, or of the second of two, whose tensors are given the names of one."""
    weight, scale = stored["weight"], stored["weight_scale"]
    inputs = inputs_of(module, quantizer.spec_of(module.name, "input_tensors"), stored)
    shape = tuple(scale.shape)
    own: Spec = ("weight_scale", scale.dtype, shape)
    symmetric = is_symmetric(spec)
    common: dict[str, Any] = {"scale": own, "inputs": inputs}
    rows, columns = module.shape
    per_tensor, per_row = shape in ((), (1,)), shape == (rows,)
    if weight.dtype in FP8 and (per_tensor or per_row) and scale.dtype in FLOATS:
        return FloatLayout(
            module.shape, module.dtype, block=(1, 0) if per_row and rows > 1 else (0, 0), scale_dtype=scale.dtype,
            scale_form="scalar" if shape == () else "flat", inputs=inputs, levels=FP8[weight.dtype],
            weight_dtype=weight.dtype,
        )  # fmt: skip
    if weight.dtype in ("int8", "uint8") and (per_tensor or per_row) and scale.dtype in FLOATS:
        return BytesLayout(
            module.shape, module.dtype, element=weight.dtype,
            zero=("weight_zero_point", weight.dtype, shape), symmetric=symmetric, **common,
        )  # fmt: skip
    bits = {"int8": 8, "uint8": 8, "uint2": 2}.get(str(spec.get("dtype")))
    if (
        weight.dtype in ("int8", "uint8")
        and len(shape) == 2
        and scale.dtype in FLOATS
        and bits
        and rows * bits % 8 == 0
    ):
        size = int(spec.get("group_size") or -1)
        size = columns if size == -1 else size
        wanted, turned = (-(-columns // size), rows), not quantizer.quantization_config.legacy
        common["scale"] = ("weight_scale", scale.dtype, wanted if turned else wanted[::-1])
        return TurnedBytesLayout(
            module.shape, module.dtype, element=weight.dtype, bits=bits, group_size=size, turned=turned,
            zero=("weight_zero_point", weight.dtype, (wanted[0], rows * bits // 8)), symmetric=symmetric, **common,
        )  # fmt: skip
    nibbles = weight.dtype == "int32" and spec.get("dtype") in ("int4", "uint4")
    common_nibbles = {
        "signed": spec.get("dtype") == "int4", "reordered": quantizer.pack_method == "reorder", "symmetric": symmetric,
    }  # fmt: skip
    if nibbles and (per_tensor or per_row) and columns % 8 == 0 and spec.get("qscheme") != "per_group":
        return RowWordsLayout(
            module.shape, module.dtype,
            zero=("weight_zero_point", "int32", (rows // 8,) if per_row else shape), **common_nibbles, **common,
        )  # fmt: skip
    if nibbles and rows % 8 == 0:
        size = int(spec.get("group_size") or -1)
        size = columns if size == -1 else size
        wanted = (-(-columns // size), rows)
        turned = not quantizer.quantization_config.legacy
        common["scale"] = ("weight_scale", scale.dtype, wanted if turned else wanted[::-1])
        return WordsLayout(
            module.shape, module.dtype, group_size=size, turned=turned,
            zero=("weight_zero_point", "int32", (wanted[0], rows // 8)), **common_nibbles, **common,
        )  # fmt: skip
    if weight.dtype == "uint8" and scale.dtype == "uint8" and len(shape) == 2 and shape[0] == rows and shape[1]:
        dtype = str(spec.get("dtype"))
        if dtype in MX:
            return FloatLayout(
                module.shape, module.dtype, levels=MX[dtype][0], block=(1, int(spec.get("group_size") or 32)),
                weight_dtype="uint8", scale_dtype="uint8", inputs=inputs,
                mode=str(spec.get("scale_calculation_mode") or "even"),
            )  # fmt: skip
    if weight.dtype in FLOATS and quantizer.weight_format == "fake_quantized":
        zero = stored.get("weight_zero_point")
        if zero is not None:
            common["zero"] = ("weight_zero_point", zero.dtype, tuple(zero.shape))
        return FakeLayout(module.shape, module.dtype, element=weight.dtype, **common)
    raise ShapeMismatch(
        f"tensors {weight.name!r} {weight.dtype} {weight.shape} and {scale.name!r} {scale.dtype} {shape} of a weight "
        f"{module.shape} fit no known form of Quark's {spec.get('dtype')!r}, {spec.get('qscheme')!r}"
    )
