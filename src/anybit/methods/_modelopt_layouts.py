"""ModelOpt: its layouts, and which one a module has or gets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from anybit._lazy import torch
from anybit.algorithms import minifloat
from anybit.errors import CalibrationNeeded, NotRepresentable
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
from anybit.methods._scaled_floats import Inputs, NvFp4Layout, ScaledFloatLayout, Spec, check_form, require_scale
from anybit.weight.layout import Layout, ModuleInfo, meta
from anybit.weight.nodes import Codes, Grid, Node, Scaled, Values
from anybit.weight.weight import Weight

if TYPE_CHECKING:
    from torch import Tensor

INPUT_SCALE: Spec = ("input_scale", "float32", ())
PRE_SCALE = "pre_quant_scale"
TILES = (128, 128)
EXPERT = re.compile(r"\.experts\.\d+\.")
# read by ModelOpt's own engines in ways that could not be checked
UNVERIFIED = ("W8A16", "W8A8_SQ_PER_CHANNEL", "W4A8_NVFP4_FP8", "W4A8_MXFP4_FP8", "NVFP4_SVD", "INT8_SQ", "INT8_WO")
STATIC = ("FP8", "NVFP4", "NVFP4_AWQ", "W4A8_AWQ")  # their inputs have stored scales
KNOWN = (
    "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "MXFP8", "NVFP4", "W4A16_NVFP4", "NVFP4_AWQ", "W4A16_AWQ", "W4A8_AWQ",
)  # fmt: skip

# names that the same tensors go by
SAME_TENSORS = {
    ("NVFP4_AWQ", "NVFP4"), ("W4A16_NVFP4_AWQ", "W4A16_NVFP4"), ("FP8_BLOCK", "FP8_PB_WO"), ("FP8_PB_REAL", "FP8_PB_WO"),
}  # fmt: skip


# --- layouts ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelOptFp8Layout(ScaledFloatLayout):
    """E4M3 codes; one scale for the matrix, for each row, for each block (stored as tiles), or powers of two."""

    def algorithm_options(self) -> dict[str, object]:
        if self.scale_dtype in POWERS:
            return {"rule": self.scales}
        return {"rule": self.scales, "quotient": self.dtype}  # ModelOpt divides in the model's dtype

    def scales(self, largest: Tensor) -> minifloat.Scales:
        """max / 448, for MXFP8 rounded up to a power of two; 1 for an empty block."""
        if self.scale_dtype in POWERS:
            exponents = minifloat.e8m0(largest / TOP, "ceil").masked_fill(largest == 0, 127)
            return minifloat.Scales(minifloat.e8m0_numbers(exponents))
        return minifloat.Scales((largest / TOP).masked_fill(largest == 0, 1.0))


@dataclass(frozen=True)
class Int4AwqLayout(Layout):
    """Four-bit integers and a scale for each group of inputs, packed along the output.

    weight uint8 [out/2, in]: byte [r, i] holds row 2r in its low nibble and row 2r + 1 in its high one, two's complement.
    `second`: W4A8 stores weight_scale_2 and input_scale as well. `prescaled`: pre_quant_scale is part of the weight, where
    the input cannot be scaled by a hook.
    """

    group_size: int = 128
    scale_dtype: str = "float32"
    inputs: Inputs | None = None
    second: bool = False
    prescaled: str | None = None

    algorithm: ClassVar[str] = "rtn"

    def algorithm_options(self) -> dict[str, object]:
        return {"symmetric": True}

    @property
    def scale_spec(self) -> tuple[int, int]:
        return (self.shape[0], -(-self.shape[1] // self.group_size))

    def decode(self, tensors: Mapping[str, Tensor]) -> Weight:
        rows, columns = self.shape
        packed = self.take(tensors, "weight", "uint8", (rows // 2, columns))
        scale = self.take(tensors, "weight_scale", self.scale_dtype, self.scale_spec)
        require_scale("weight_scale", scale)
        stored = [self.take(tensors, *spec) for spec in (self.inputs.stored if self.inputs is not None else ())]
        extras = {"weight_scale_2": self.take(tensors, "weight_scale_2", "float32", ())} if self.second else {}
        pre = self.take(tensors, PRE_SCALE, self.prescaled, (columns,)) if self.prescaled is not None else None
        for name, tensor in (("input_scale", stored), ("weight_scale_2", list(extras.values())), (PRE_SCALE, [pre])):
            for one in tensor:
                if one is not None:
                    require_scale(name, one)
        codes = torch.stack([packed & 15, packed >> 4], dim=1).view(rows, columns)
        return self._weight(Codes.of(codes, 4, signed=True), scale, pre, tuple(stored), extras)

    def _weight(
        self, codes: Codes, scale: Tensor, pre: Tensor | None, inputs: tuple[Tensor, ...], extras: Mapping[str, Tensor]
    ) -> Weight:
        tree: Node = Grid(codes, Values(scale), block=(1, self.group_size))
        if pre is not None:
            tree = Scaled(tree, Values(pre.reshape(1, -1)))
        activation = self.inputs.activation(inputs) if self.inputs is not None else None
        return Weight(tree, self.dtype, activation, extras)

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        tree: Any = check_form(weight, self)
        grid = tree.child if self.prescaled is not None else tree
        packed = grid.codes.packed
        if packed.is_meta:
            weights = meta("uint8", self.shape[0] // 2, self.shape[1])
        else:
            unsigned = Codes(packed, 4, self.shape[1]).integers().view(-1, 2, self.shape[1])
            weights = unsigned[:, 0] | (unsigned[:, 1] << 4)
        found = {"weight": weights, "weight_scale": grid.scale.tensor}
        if self.prescaled is not None:
            found[PRE_SCALE] = tree.scale.tensor.reshape(-1)
        if self.inputs is not None and weight.activation is not None:
            found.update(
                {spec[0]: own for spec, own in zip(self.inputs.stored, weight.activation.tensors, strict=True)}
            )
        if self.second:
            if "weight_scale_2" not in weight.extras:
                raise NotRepresentable("W4A8_AWQ stores 'weight_scale_2', which this weight does not carry")
            found["weight_scale_2"] = weight.extras["weight_scale_2"]
        return found

    def scheme(self) -> Weight:
        rows, columns = self.shape
        return self._weight(
            Codes(meta("uint8", rows, (columns + 1) // 2), 4, columns, signed=True),
            meta(self.scale_dtype, *self.scale_spec),
            meta(self.prescaled, columns) if self.prescaled is not None else None,
            tuple(meta(dtype, *shape) for _, dtype, shape in (self.inputs.stored if self.inputs is not None else ())),
            {"weight_scale_2": meta("float32")} if self.second else {},
        )


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
    if (algo or "").upper() in UNVERIFIED:
        raise contradiction(
            module,
            stored,
            list(stored),
            f"anybit; the configuration says {algo}, whose arithmetic could not be checked,",
        )
    if (algo or "").upper() in STATIC and INPUT_SCALE[0] not in stored:
        raise missing(module, INPUT_SCALE[0], f"the configuration says {algo}, whose inputs are quantized with it")
    if info.dtype == "float8_e4m3fn":
        return _fp8(module, stored)
    if info.dtype == "uint8":
        two_levels = nvfp4_layout(module, stored)
        if two_levels is not None:
            return ("NVFP4" if two_levels.inputs is not None else "W4A16_NVFP4"), two_levels
        return _int4(module, stored, scale)
    raise contradiction(module, stored, ("weight", "weight_scale"), "ModelOpt's formats")


def _static_inputs(stored: Mapping[str, Any]) -> Inputs | None:
    return Inputs("e4m3_static", granularity="tensor", stored=(INPUT_SCALE,)) if INPUT_SCALE[0] in stored else None


def _fp8(module: ModuleInfo, stored: Mapping[str, Any]) -> tuple[str, Layout]:
    scale = stored["weight_scale"]
    # blocks are 128 x 128, and written as tiles; a plain grid of them is read as well
    reading = read_scale(module, scale, WHOLE if len(scale.shape) < 2 else TILES)
    if reading is None or scale.dtype not in (*POWERS, *FLOATS):
        raise contradiction(module, stored, ("weight", "weight_scale"), "ModelOpt's FP8")
    name, inputs = "FP8_PB_WO", None
    if reading.block == MX and scale.dtype in POWERS:
        name, inputs = "MXFP8", Inputs("mx_e4m3", granularity="group", group_size=MX[1])
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
    prescaled = stored[PRE_SCALE].dtype if PRE_SCALE in stored else None
    if prescaled is not None and (inputs is not None or prescaled not in FLOATS):
        raise contradiction(
            module,
            stored,
            ("weight", PRE_SCALE, INPUT_SCALE[0]),
            "an expert whose input is scaled before it is quantized",
        )
    second = "weight_scale_2" in stored
    return ("W4A8_AWQ" if second or inputs is not None else "W4A16_AWQ"), Int4AwqLayout(
        module.shape, module.dtype, sizes[0], scale.dtype, inputs, second, prescaled
    )


# --- creating --------------------------------------------------------------------------------------------------------------


def layout_for(module: ModuleInfo, algo: str, group_size: int | None) -> Layout | str:
    """The layout a dense module gets, or why it stays dense. CalibrationNeeded when its input scales are measured on data."""
    rows, columns = module.shape[-2:]
    if module.kind != "linear":
        return f"ModelOpt's layouts are of linear layers, not of {'an' if module.kind[0] in 'aeiou' else 'a'} {module.kind}"
    if algo == "FP8_PER_CHANNEL_PER_TOKEN":
        return ModelOptFp8Layout(module.shape, module.dtype, block=ROW, scale_form="flat", inputs=Inputs("e4m3_token"))
    if algo == "FP8_PB_WO":
        return ModelOptFp8Layout(module.shape, module.dtype, block=TILES, scale_form="tiles")
    if algo == "MXFP8":
        if columns % MX[1]:
            return f"weights are in groups of {MX[1]} inputs, and {columns} is no multiple"
        inputs = Inputs("mx_e4m3", granularity="group", group_size=MX[1])
        return ModelOptFp8Layout(module.shape, module.dtype, block=MX, scale_dtype="uint8", inputs=inputs)
    if algo == "W4A16_NVFP4":
        size = group_size or 16
        if columns % size:
            return f"weights are in groups of {size} inputs, and {columns} is no multiple"
        return NvFp4Layout(module.shape, module.dtype, block=(1, size))
    if algo == "W4A16_AWQ":
        if rows % 2:
            return f"two rows share a byte, and {rows} is odd"
        return Int4AwqLayout(module.shape, module.dtype, group_size or 128)
    raise CalibrationNeeded(
        f"{module.name}: {algo} has input scales that are measured on data. Without data: FP8_PER_CHANNEL_PER_TOKEN, fp8_pb_wo, "
        "MXFP8, W4A16_NVFP4, W4A16_AWQ"
    )
