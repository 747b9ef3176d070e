"""Folders of fine-grained FP8 whose config.json does not say so: transformers 5.23 writes them when it saves what it loaded on
a CPU, and then takes the codes for numbers. Headers alone are read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from anybit.methods._headers import Headers, headers_of

SUFFIX = ".weight_scale_inv"
FLOATS, POWERS = ("F32", "BF16", "F16"), ("U8", "F8_E8M0")
TORCH_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "U8": "uint8", "F8_E8M0": "float8_e8m0fnu"}


def without_config(folder: Path) -> dict[str, Any] | None:
    """The configuration of a folder whose E4M3 weights have scales beside them; None for any other."""
    return _told_by(headers_of(folder, SUFFIX))


def _told_by(tensors: Headers) -> dict[str, Any] | None:
    weights = {name: name.removesuffix(SUFFIX) + ".weight" for name in tensors if name.endswith(SUFFIX)}
    pairs = [
        (tensors[weight][1], *tensors[scale])
        for scale, weight in weights.items()
        if weight in tensors and tensors[weight][0] == "F8_E4M3" and len(tensors[weight][1]) == 2
    ]
    if not pairs or any(dtype not in FLOATS + POWERS for _, dtype, _ in pairs):
        return None
    return {
        "quant_method": "fp8",
        "activation_scheme": "static" if any(name.endswith(".activation_scale") for name in tensors) else "dynamic",
        "weight_block_size": _common_block(pairs),
        "scale_fmt": "ue8m0" if all(dtype in POWERS for _, dtype, _ in pairs) else "float",
    }


def _common_block(pairs: list[tuple[list[int], str, list[int]]]) -> list[int] | None:
    """The block that all scales are grids of; None for one scale per matrix."""
    from types import SimpleNamespace

    from anybit.methods._float_evidence import KNOWN_BLOCKS, WHOLE, read_scale
    from anybit.weight.layout import ModuleInfo

    for block in (WHOLE, *KNOWN_BLOCKS):
        readings = [
            read_scale(
                ModuleInfo("", "linear", tuple(weight), ""),
                SimpleNamespace(dtype=TORCH_NAMES[dtype], shape=scale),
                block,
            )
            for weight, dtype, scale in pairs
        ]
        if all(reading is not None and reading.block == block for reading in readings):
            return list(block) if block != WHOLE else None
    return list(KNOWN_BLOCKS[0])
