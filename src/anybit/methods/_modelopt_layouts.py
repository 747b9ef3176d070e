"""ModelOpt: its layouts, and which one a module has or gets. Integers: see `_modelopt_integers`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from anybit._lazy import torch
from anybit.algorithms import minifloat
from anybit.errors import InvalidOption
from anybit.methods._activations import TOP
from anybit.methods._float_evidence import (
    FLOATS,
    MX,
    POWERS,
    ROW,
    WHOLE,
    contradiction,
    missing,
    nvfp4_layout,
    read_scale,
)
from anybit.methods._modelopt_integers import PRE_SCALE, Int4AwqLayout, Int8Layout
from anybit.methods._scaled_floats import (
    Inputs,
    NvFp4Layout,
    ScaledFloatLayout,
    Spec,
    joined_with,
    nvfp4_scales,
)
from anybit.weight.layout import Layout, ModuleInfo

if TYPE_CHECKING:
    from torch import Tensor

INPUT_SCALE: Spec = ("input_scale", "float32", ())
TILES = (128, 128)
EXPERT = re.compile(r"\.experts\.\d+\.")
STATIC = (  # their inputs have stored scales
    "FP8", "NVFP4", "NVFP4_AWQ", "NVFP4_SVD", "W4A8_AWQ", "W4A8_NVFP4_FP8", "W8A8_SQ_PER_CHANNEL",
)  # fmt: skip
MADE = (
    "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "MXFP8", "NVFP4", "W4A16_NVFP4", "NVFP4_AWQ", "W4A8_NVFP4_FP8",
    "W4A8_MXFP4_FP8", "MXFP4", "W4A16_AWQ", "W4A8_AWQ", "W8A16", "W8A8_SQ_PER_CHANNEL",
)  # fmt: skip
# names that the same tensors go by
SAME_TENSORS = {
    ("NVFP4_AWQ", "NVFP4"), ("NVFP4_SVD", "NVFP4"), ("W4A16_NVFP4_AWQ", "W4A16_NVFP4"), ("FP8_BLOCK", "FP8_PB_WO"),
    ("FP8_PB_REAL", "FP8_PB_WO"), ("FP8_PB_WO", "FP8"), ("INT8_SQ", "W8A8_SQ_PER_CHANNEL"), ("INT8_WO", "W8A16"),
}  # fmt: skip
# foldings and roundings that ModelOpt's recipe of the name runs on calibration data
RECIPES = {
    "W4A16_AWQ": "awq", "W4A8_AWQ": "awq", "NVFP4_AWQ": "awq", "W8A8_SQ_PER_CHANNEL": "smoothquant",
}  # fmt: skip


# --- layouts ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelOptFp8Layout(ScaledFloatLayout):
    """E4M3 codes; one scale for the matrix, for each row, for each block (stored as tiles), or powers of two."""

    joined: tuple[str, ...] = field(default=(), compare=False)  # last names of the layers whose one scale is the same
    covers: float = field(default=0.0, compare=False)

    @property
    def alongside(self) -> tuple[str, ...]:
        return self.joined

    def covering(self, largest: float) -> Layout:
        return replace(self, covers=largest)

    def algorithm_options(self) -> dict[str, object]:
        if self.block != WHOLE:
            return {"rule": self.scales}
        return {
            "rule": self.scales,
            "quotient": self.dtype,
        }  # one number does not widen a division in the model's dtype

    def scales(self, largest: Tensor) -> minifloat.Scales:
        """max / 448, for MXFP8 rounded up to a power of two; 1 for an empty block, 2**-127 where they are powers."""
        if self.scale_dtype in POWERS:
            return powers(largest / TOP)
        largest = largest.clamp(min=self.covers)
        return minifloat.Scales((largest / TOP).masked_fill(largest == 0, 1.0))


@dataclass(frozen=True)
class ModelOptMxFp4Layout(ScaledFloatLayout):
    """E2M1 codes, low nibble first, and a power of two for each group of 32 inputs. Half way goes towards zero."""

    levels: str = "e2m1"
    block: tuple[int, int] = MX
    weight_dtype: str = "uint8"
    scale_dtype: str = "uint8"

    def algorithm_options(self) -> dict[str, object]:
        return {"rule": self.scales, "ties": "zero"}

    def scales(self, largest: Tensor) -> minifloat.Scales:
        return powers(largest / 6.0)


@dataclass(frozen=True)
class WideNvFp4Layout(NvFp4Layout):
    """NVFP4 for FP8 inputs (W4A8_NVFP4_FP8): scales below max / 448, so that scale times code is an E4M3 number."""

    def scales(self, largest: Tensor) -> minifloat.Scales:
        return nvfp4_scales(largest, largest.amax().clamp(min=self.covers) / TOP)


def powers(wanted: Tensor) -> minifloat.Scales:
    """Powers of two, rounded up by a float32 logarithm, as the peer does it."""
    exponents = torch.ceil(torch.log2(wanted)).nan_to_num(neginf=-127.0).clamp(-127, 127)
    return minifloat.Scales(minifloat.e8m0_numbers((exponents + 127).to(torch.uint8)))


# --- reading ---------------------------------------------------------------------------------------------------------------


def layout_of(module: ModuleInfo, stored: Mapping[str, Any], algo: str | None) -> tuple[str, Layout] | None:
    """(the algorithm's name, the layout) that a module's tensors have; None for a dense weight.

    `algo`: what the configuration says of the module, None if nothing. It only decides what tensors leave open.
    """
    info, scale = stored.get("weight"), stored.get("weight_scale")
    if info is None or info.dtype not in ("float8_e4m3fn", "uint8", "int8"):
        return None
    if scale is None and info.dtype == "float8_e4m3fn" and "weight_scale_inv" in stored:
        return _deepseek_fp8(module, stored)
    if scale is None:
        raise missing(module, "weight_scale", f"{info.name!r} is {info.dtype} and has no meaning without it")
    if (algo or "").upper() in STATIC and INPUT_SCALE[0] not in stored:
        raise missing(module, INPUT_SCALE[0], f"the configuration says {algo}, whose inputs are quantized with it")
    if info.dtype == "float8_e4m3fn":
        return _fp8(module, stored)
    if info.dtype == "int8":
        return _int8(module, stored, scale)
    two_levels = nvfp4_layout(module, stored)
    if two_levels is not None:
        inputs = E4M3_INPUTS if algo == "W4A8_NVFP4_FP8" else two_levels.inputs
        name = "W4A16_NVFP4" if inputs is None else "W4A8_NVFP4_FP8" if inputs == E4M3_INPUTS else "NVFP4"
        return name, replace(two_levels, inputs=_prescaled(module, stored, inputs))
    if scale.dtype in POWERS:
        return _mxfp4(module, stored, algo)
    return _int4(module, stored, scale)


E4M3_INPUTS = Inputs("e4m3_static", granularity="tensor", stored=(INPUT_SCALE,))
FREE_E4M3_INPUTS = Inputs("e4m3_tensor", granularity="tensor")
INT8_INPUTS = Inputs("int8_static", "int8", "tensor", stored=(INPUT_SCALE,))
NVFP4_INPUTS = Inputs("nvfp4", "e2m1", "group", 16, stored=(INPUT_SCALE,))
MXFP8_INPUTS = Inputs("mx_e4m3", granularity="group", group_size=MX[1])
MXFP4_INPUTS = Inputs("mx_e2m1", "e2m1", "group", MX[1])


def _static_inputs(stored: Mapping[str, Any]) -> Inputs | None:
    return E4M3_INPUTS if INPUT_SCALE[0] in stored else None


def _prescaled(module: ModuleInfo, stored: Mapping[str, Any], inputs: Inputs | None) -> Inputs | None:
    """What is done to the input of an expert whose factors are stored with it; a layer has a hook for them."""
    info = stored.get(PRE_SCALE)
    if info is None:
        return inputs
    shape = (module.shape[-1],)
    if inputs is None or not inputs.stored or info.dtype not in FLOATS or tuple(info.shape) != shape:
        raise contradiction(
            module,
            stored,
            ("weight", PRE_SCALE),
            f"inputs that are scaled by {shape} factors and then quantized by a stored scale",
        )
    return replace(inputs, rule=f"{inputs.rule}_prescaled", stored=(*inputs.stored, (PRE_SCALE, info.dtype, shape)))


def _int8(module: ModuleInfo, stored: Mapping[str, Any], scale: Any) -> tuple[str, Layout]:
    if tuple(scale.shape) not in ((), (1,), (module.shape[0],)) or scale.dtype not in FLOATS:
        raise contradiction(module, stored, ("weight", "weight_scale"), "int8 (a scale for each output, or one)")
    inputs = _prescaled(module, stored, INT8_INPUTS if INPUT_SCALE[0] in stored else None)
    layout = Int8Layout(module.shape, module.dtype, scale.dtype, tuple(scale.shape), inputs)
    return ("W8A16" if inputs is None else "W8A8_SQ_PER_CHANNEL"), layout


def _mxfp4(module: ModuleInfo, stored: Mapping[str, Any], algo: str | None) -> tuple[str, Layout]:
    reading = read_scale(module, stored["weight_scale"], MX)
    if reading is None or reading.block != MX:
        raise contradiction(module, stored, ("weight", "weight_scale"), "MXFP4 (uint8 [out, in/2], uint8 [out, in/32])")
    if algo == "W4A8_MXFP4_FP8" or INPUT_SCALE[0] in stored:
        name, inputs = "W4A8_MXFP4_FP8", _static_inputs(stored) or FREE_E4M3_INPUTS  # ModelOpt stores no scale of them
    else:
        name, inputs = "MXFP4", MXFP4_INPUTS
    return name, ModelOptMxFp4Layout(
        module.shape, module.dtype, scale_dtype=stored["weight_scale"].dtype, inputs=inputs
    )


def _fp8(module: ModuleInfo, stored: Mapping[str, Any]) -> tuple[str, Layout]:
    scale = stored["weight_scale"]
    # blocks are 128 x 128, and written as tiles; a plain grid of them is read as well
    reading = read_scale(module, scale, WHOLE if len(scale.shape) < 2 else TILES)
    if reading is None or scale.dtype not in (*POWERS, *FLOATS):
        raise contradiction(module, stored, ("weight", "weight_scale"), "ModelOpt's FP8")
    name, inputs = "FP8_PB_WO", None
    if reading.block == MX and scale.dtype in POWERS:
        name, inputs = "MXFP8", MXFP8_INPUTS
    elif reading.block == WHOLE:
        name, inputs = "FP8", _static_inputs(stored)
    elif reading.block == ROW:
        name, inputs = "FP8_PER_CHANNEL_PER_TOKEN", Inputs("e4m3_token")
    layout = ModelOptFp8Layout(
        module.shape, module.dtype, block=reading.block, scale_dtype=scale.dtype, scale_form=reading.form, inputs=inputs
    )
    return name, layout


def _deepseek_fp8(module: ModuleInfo, stored: Mapping[str, Any]) -> tuple[str, Layout]:
    """Layers that stay as the FP8 source of the checkpoint had them, inputs measured in the runs of the blocks."""
    scale = stored["weight_scale_inv"]
    reading = read_scale(module, scale, TILES)
    if reading is None or reading.block != TILES or scale.dtype not in FLOATS:
        raise contradiction(module, stored, ("weight", "weight_scale_inv"), "FP8 in blocks of 128 x 128")
    inputs = Inputs("e4m3_group", granularity="group", group_size=TILES[1])
    return "FP8 in blocks", ModelOptFp8Layout(
        module.shape, module.dtype, block=TILES, scale_name="weight_scale_inv", scale_dtype=scale.dtype,
        scale_form=reading.form, inputs=inputs,
    )  # fmt: skip


def _int4(module: ModuleInfo, stored: Mapping[str, Any], scale: Any) -> tuple[str, Layout]:
    rows, columns = module.shape
    sizes = [size for size in (128, 64, 32, 16, 256, columns) if tuple(scale.shape) == (rows, -(-columns // size))]
    if not sizes or rows % 2 or scale.dtype not in FLOATS:
        raise contradiction(
            module,
            stored,
            ("weight", "weight_scale"),
            "int4 along the output (uint8 [out/2, in], scale [out, in/group])",
        )
    inputs = _static_inputs(stored)
    prescaled = None
    if inputs is not None:
        inputs = _prescaled(module, stored, inputs)
    elif PRE_SCALE in stored:
        prescaled = stored[PRE_SCALE].dtype
        if prescaled not in FLOATS:
            raise contradiction(module, stored, ("weight", PRE_SCALE), "experts whose inputs are scaled")
    second = "weight_scale_2" in stored
    return ("W4A8_AWQ" if second or inputs is not None else "W4A16_AWQ"), Int4AwqLayout(
        module.shape, module.dtype, sizes[0], scale.dtype, inputs, second, prescaled
    )


# --- creating --------------------------------------------------------------------------------------------------------------


def layout_for(module: ModuleInfo, algo: str, group_size: int | None) -> Layout | str:
    """The layout a dense module gets, or why it stays dense. Static scales of inputs are measured afterwards."""
    rows, columns = module.shape[-2:]
    if module.kind != "linear":
        return f"ModelOpt's layouts are of linear layers, not of {'an' if module.kind[0] in 'aeiou' else 'a'} {module.kind}"
    own: dict[str, Any] = {"shape": module.shape, "dtype": module.dtype}
    size = group_size or {"NVFP4": 16, "W4A16_NVFP4": 16, "NVFP4_AWQ": 16, "W4A8_NVFP4_FP8": 32}.get(algo)
    if algo in ("MXFP8", "MXFP4", "W4A8_MXFP4_FP8"):
        size = MX[1]
    if algo in ("W4A16_AWQ", "W4A8_AWQ"):
        size = size or 128
        if rows % 2:
            return f"two rows share a byte, and {rows} is odd"
    if size is not None and columns % size:
        return f"weights are in groups of {size} inputs, and {columns} is no multiple"
    match algo:
        case "FP8":  # of layers that are no experts ModelOpt leaves the scales apart
            joined = joined_with(module.name) if EXPERT.search(module.name) else ()
            return ModelOptFp8Layout(**own, block=WHOLE, scale_form="scalar", inputs=E4M3_INPUTS, joined=joined)
        case "FP8_PER_CHANNEL_PER_TOKEN":
            return ModelOptFp8Layout(**own, block=ROW, scale_form="flat", inputs=Inputs("e4m3_token"))
        case "FP8_PB_WO" if rows <= TILES[0] and columns <= TILES[1]:
            return ModelOptFp8Layout(**own, block=WHOLE, scale_form="scalar")  # a tile alone is stored as a matrix
        case "FP8_PB_WO":
            return ModelOptFp8Layout(**own, block=TILES, scale_form="tiles")
        case "MXFP8":
            return ModelOptFp8Layout(**own, block=MX, scale_dtype="uint8", inputs=MXFP8_INPUTS)
        case "MXFP4" | "W4A8_MXFP4_FP8":
            return ModelOptMxFp4Layout(**own, inputs=MXFP4_INPUTS if algo == "MXFP4" else FREE_E4M3_INPUTS)
        case "NVFP4" | "NVFP4_AWQ" | "W4A16_NVFP4":
            inputs = None if algo == "W4A16_NVFP4" else replace(NVFP4_INPUTS, group_size=size)
            return NvFp4Layout(**own, block=(1, size or 16), inputs=inputs, joined=joined_with(module.name))
        case "W4A8_NVFP4_FP8":
            return WideNvFp4Layout(**own, block=(1, size or 32), inputs=E4M3_INPUTS, joined=joined_with(module.name))
        case "W4A16_AWQ" | "W4A8_AWQ":
            second = algo == "W4A8_AWQ"
            return Int4AwqLayout(**own, group_size=size or 128, inputs=E4M3_INPUTS if second else None, second=second)
        case "W8A16" | "W8A8_SQ_PER_CHANNEL":
            return Int8Layout(**own, scale_spec=(rows,), inputs=INT8_INPUTS if algo != "W8A16" else None)
    raise InvalidOption(f"{module.name}: {algo!r} is not made here; made are {', '.join(MADE)}")
