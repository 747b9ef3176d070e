"""Fine-grained FP8: its layouts with the rules their scales are found by, and folders that lost their configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from anybit._lazy import torch
from anybit.algorithms import minifloat
from anybit.errors import CheckpointError
from anybit.methods import _activations
from anybit.methods._float_evidence import FLOATS, KNOWN_BLOCKS, MX, POWERS, WHOLE, read_scale
from anybit.methods._scaled_floats import ScaledFloatLayout
from anybit.quantizers.checkpoint_config import read_json
from anybit.weight.layout import ModuleInfo

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

TOP = _activations.TOP
SUFFIX = ".weight_scale_inv"


@dataclass(frozen=True)
class Fp8Layout(ScaledFloatLayout):
    """E4M3 codes and a multiplier for each block. `powers`: multipliers are powers of two when they are made."""

    scale_name: str = "weight_scale_inv"
    powers: bool = False

    def scales(self, largest: Tensor) -> minifloat.Scales:
        """f = 448 / max, multiplied by; 1 / f is stored. Powers of two are rounded up."""
        factor = TOP / torch.where(largest > 0, largest, TOP)
        if self.powers:
            inverse = torch.exp2(torch.ceil(torch.log2(1.0 / factor)))  # as transformers: not of the bits, of log2
            return minifloat.Scales(inverse, factor=1.0 / inverse)
        return minifloat.Scales(1.0 / factor, factor=factor)


@dataclass(frozen=True)
class Fp4ExpertLayout(ScaledFloatLayout):
    """DeepSeek-V4's experts: E2M1 codes and a power of two for each 32 inputs."""

    levels: str = "e2m1"
    block: tuple[int, int] = MX
    weight_dtype: str = "int8"
    scale_name: str = "weight_scale_inv"
    scale_dtype: str = "float8_e8m0fnu"

    def scales(self, largest: Tensor) -> minifloat.Scales:
        """The smallest power of two under which nothing is clipped; 1 for an empty block."""
        exponents = minifloat.e8m0(largest / 6.0, "ceil").masked_fill(largest == 0, 127)
        return minifloat.Scales(minifloat.e8m0_numbers(exponents))


# --- a folder without a configuration ------------------------------------------------------------------------------------


def fp8_without_config(folder: Path) -> dict[str, Any] | None:
    """The configuration of a folder whose E4M3 weights have scales beside them; None for any other.

    transformers 5.23 writes such folders when it saves a model that it loaded on a CPU.
    """
    from anybit.containers import Checkpoint

    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    try:
        if index.is_file():
            names = read_json(index).get("weight_map")
            if not isinstance(names, dict) or not any(str(name).endswith(SUFFIX) for name in names):
                return None
        elif not single.is_file():
            return None
        with Checkpoint.open(index if index.is_file() else single) as checkpoint:
            tensors = checkpoint.tensors
    except CheckpointError:
        return None  # whoever loads the folder says what is wrong with it
    pairs = [
        (tensors[name.removesuffix(SUFFIX) + ".weight"], info)
        for name, info in tensors.items()
        if name.endswith(SUFFIX) and name.removesuffix(SUFFIX) + ".weight" in tensors
    ]
    pairs = [(weight, scale) for weight, scale in pairs if weight.dtype == "float8_e4m3fn" and len(weight.shape) == 2]
    if not pairs or any(scale.dtype not in (*FLOATS, *POWERS) for _, scale in pairs):
        return None
    powers = all(scale.dtype in POWERS for _, scale in pairs)
    static = any(name.endswith(".activation_scale") for name in tensors)
    return {
        "quant_method": "fp8",
        "activation_scheme": "static" if static else "dynamic",
        "weight_block_size": _common_block(pairs),
        "scale_fmt": "ue8m0" if powers else "float",
    }


def _common_block(pairs: list[tuple[Any, Any]]) -> list[int] | None:
    """The block that all scales are grids of: None for one scale per matrix."""
    for block in (WHOLE, *KNOWN_BLOCKS):
        readings = [
            read_scale(ModuleInfo("", "linear", tuple(weight.shape), ""), scale, block) for weight, scale in pairs
        ]
        if all(reading is not None and reading.block == block for reading in readings):
            return list(block) if block != WHOLE else None
    return list(KNOWN_BLOCKS[0])
