"""What the stored tensors of small-float weights say: blocks and forms of scales, told from dtypes and shapes.

Configurations of these formats are vague or wrong often enough that the tensors decide; what is expected only chooses between
readings that both fit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from anybit.errors import MissingTensor, ShapeMismatch
from anybit.methods._scaled_floats import FORMS, Inputs, NvFp4Layout
from anybit.weight.layout import ModuleInfo, join_name

Block = tuple[int, int]
POWERS = ("uint8", "float8_e8m0fnu")
FLOATS = ("float32", "bfloat16", "float16")
MX = (1, 32)
WHOLE = (0, 0)
ROW = (1, 0)
# blocks seen in published checkpoints, tried when the expected one does not fit
KNOWN_BLOCKS = ((128, 128), (1, 128), (64, 64), (32, 32), (1, 64), (1, 32))


@dataclass(frozen=True)
class Reading:
    """How a stored scale is to be read. `as_expected`: the configuration says the same."""

    block: Block
    form: str
    as_expected: bool = True

    def __str__(self) -> str:
        if self.block == WHOLE:
            return "one scale for the matrix"
        if self.block == ROW:
            return "one scale for each row"
        return f"a scale for each block of {self.block[0]} x {self.block[1]}"


def read_scale(module: ModuleInfo, scale: Any, expected: Block | None) -> Reading | None:
    """The blocks of a scale (a TensorInfo) over the module's weight; None when no known reading fits.

    `expected`: the block the configuration names, `WHOLE` for one scale per matrix, None when it says nothing.
    """
    powers = scale.dtype in POWERS
    if powers and _fits(module, scale.shape, MX, "grid"):
        return Reading(MX, "grid", expected in (MX, None))
    if expected is not None:
        for form in ("grid", "scalar", "flat") if expected == WHOLE else ("grid", "tiles"):
            if _fits(module, scale.shape, expected, form):
                return Reading(expected, form)
    plain = [(WHOLE, "scalar"), (WHOLE, "flat"), (ROW, "grid"), (ROW, "flat"), *_halves(module, expected)]
    others = [(block, form) for block in KNOWN_BLOCKS for form in ("grid", "tiles")]
    for readings in (plain, others if math.prod(scale.shape) > 1 else ()):
        fitting = [(block, form) for block, form in readings if _fits(module, scale.shape, block, form)]
        # small weights give one grid for several blocks; then nothing is told
        if len(fitting) == 1 or (fitting and readings is plain):
            return Reading(*fitting[0], as_expected=expected is None)
    return None


def _fits(module: ModuleInfo, shape: Sequence[int], block: Block, form: str) -> bool:
    *lead, rows, columns = module.shape
    down, across = -(-rows // block[0]) if block[0] else 1, -(-columns // block[1]) if block[1] else 1
    found: tuple[int, ...] = FORMS[form](tuple(lead), down, across)
    return tuple(shape) == found


def _halves(module: ModuleInfo, expected: Block | None) -> list[tuple[Block, str]]:
    """Gate and up in one matrix of a stack, each with scales of its own because it is smaller than a block."""
    rows = module.shape[-2]
    if len(module.shape) != 3 or rows % 2:
        return []
    down, across = expected or WHOLE
    return [((rows // 2, across), "grid")] if not down or rows <= down else []


def nvfp4_layout(module: ModuleInfo, stored: Mapping[str, Any]) -> NvFp4Layout | None:
    """NVFP4 as ModelOpt stores it, whatever the configuration calls it; None for tensors that are something else."""
    weight, scale = stored.get("weight"), stored.get("weight_scale")
    if weight is None or scale is None or weight.dtype != "uint8" or scale.dtype != "float8_e4m3fn":
        return None
    columns = module.shape[-1]
    sizes = [size for size in (16, 32, 64, 128) if tuple(scale.shape) == (*module.shape[:-1], -(-columns // size))]
    if not sizes:  # several only where one group holds all inputs, and then they mean the same
        raise contradiction(
            module, stored, ("weight", "weight_scale"), "NVFP4 (uint8 [out, in/2], E4M3 [out, in/group])"
        )
    inputs = None
    if "input_scale" in stored:
        inputs = Inputs("nvfp4", "e2m1", "group", sizes[0], stored=(("input_scale", "float32", ()),))
    return NvFp4Layout(module.shape, module.dtype, block=(1, sizes[0]), inputs=inputs)


def first_stored(stored: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first of `names` that is stored."""
    return next((name for name in names if name in stored), None)


def missing(module: ModuleInfo, name: str, why: str) -> MissingTensor:
    """A scale that ought to be there."""
    return MissingTensor(f"tensor {join_name(module.name, name)!r} is not stored; {why}")


def contradiction(module: ModuleInfo, stored: Mapping[str, Any], names: Sequence[str], what: str) -> ShapeMismatch:
    """Tensors that fit no known form, with everything that was seen of them."""
    seen = ", ".join(
        f"{stored[name].name!r} {stored[name].dtype} {tuple(stored[name].shape)}" for name in names if name in stored
    )
    return ShapeMismatch(
        f"{module.name}: {seen} fit no known form of {what} for a weight of shape {tuple(module.shape)}"
    )
