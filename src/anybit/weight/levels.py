"""Named value tables: what the code `c` of a `Grid` stands for. A name is a constant of the library, never stored per module.

name          bits  source
nf4              4  QLoRA, arXiv 2305.14314 (bitsandbytes' float32 constants)
nf3              3  the same idea with eight levels (sinq's constants)
fp4_bnb          4  bitsandbytes: sign . [0, 1/192, 2/3, 1, 1/3, 1/2, 1/6, 1/4], index = bit pattern; not OCP E2M1
e2m1             4  OCP MX: s ee m       0 .5 1 1.5 2 3 4 6 and negatives; code 8 is -0
e2m3, e3m2       6  OCP MX: s ee mmm / s eee mm
e4m3, e5m2       8  OCP FP8 (torch.float8_e4m3fn, torch.float8_e5m2); e4m3fnuz, e5m2fnuz: AMD's
e8m0             8  OCP MX scale 2**(c - 127); 255 is NaN
ternary          2  -1, 0, 1 (3 is never written)
iq4_nl           4  llama.cpp's non-linear 4-bit table
ue4m3            8  llama.cpp: E4M3 magnitudes, bit 7 of no meaning; 0x7F is 0
binary           1  -1, 1; eighth: -1/8, 1/8
from_minus_one   2  -1, 0, 1, 2
odd              4  1, 3, .. 31; odd_quarters and odd_eighths: a quarter and an eighth of that (llama.cpp's scales)
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from anybit._lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
NF3 = (
    -1.0, -0.5350227355957031, -0.2469314038753510, 0.0, 0.1833375245332718, 0.3819939494132996, 0.6229856610298157, 1.0,
)  # fmt: skip
_FP4_BNB = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

_ODD = tuple(range(1, 32, 2))
_FRACTIONS: dict[str, tuple[float, ...]] = {
    "binary": (-1, 1),
    "eighth": (-0.125, 0.125),
    "from_minus_one": (-1, 0, 1, 2),
    "odd": _ODD,
    "odd_quarters": tuple(value / 4 for value in _ODD),
    "odd_eighths": tuple(value / 8 for value in _ODD),
}

# 8-bit floats that torch can read itself: a view and a cast beat a table look-up
_TORCH_FLOAT8 = {
    "e4m3": "float8_e4m3fn",
    "e5m2": "float8_e5m2",
    "e4m3fnuz": "float8_e4m3fnuz",
    "e5m2fnuz": "float8_e5m2fnuz",
}

BITS = {
    "nf4": 4,
    "nf3": 3,
    "fp4_bnb": 4,
    "e2m1": 4,
    "iq4_nl": 4,
    "binary": 1,
    "eighth": 1,
    "from_minus_one": 2,
    "odd": 4,
    "odd_quarters": 4,
    "odd_eighths": 4,
    "ue4m3": 8,
    "ternary": 2,
    "e2m3": 6,
    "e3m2": 6,
    "e8m0": 8,
    **dict.fromkeys(_TORCH_FLOAT8, 8),
}


def _minifloat(exponent_bits: int, mantissa_bits: int) -> list[float]:
    """All values of a sign-exponent-mantissa float without inf or NaN, in the order of their bit patterns."""
    bias = (1 << (exponent_bits - 1)) - 1
    positive = []
    for exponent in range(1 << exponent_bits):
        for mantissa in range(1 << mantissa_bits):
            fraction = mantissa / (1 << mantissa_bits)
            positive.append(
                fraction * 2.0 ** (1 - bias) if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - bias)
            )
    return positive + [-value for value in positive]


@functools.lru_cache(maxsize=64)
def table(name: str, device: str = "cpu") -> Tensor:
    """The table called `name`, float32 [2**bits], on `device`. Shared: never write into it. KeyError if unknown."""
    if name == "nf4":
        values = torch.tensor(NF4, dtype=torch.float32)
    elif name == "nf3":
        values = torch.tensor(NF3, dtype=torch.float32)
    elif name == "fp4_bnb":
        half = torch.tensor(_FP4_BNB, dtype=torch.float32)
        values = torch.cat([half, -half]) / 12  # float32 division, as the peer does it
    elif name == "e2m1":
        values = torch.tensor(_E2M1 + tuple(-value for value in _E2M1), dtype=torch.float32)
    elif name == "iq4_nl":
        values = torch.tensor(_IQ4_NL, dtype=torch.float32)
    elif name == "ternary":
        values = torch.tensor((-1.0, 0.0, 1.0, float("nan")), dtype=torch.float32)
    elif name == "e2m3":
        values = torch.tensor(_minifloat(2, 3), dtype=torch.float32)
    elif name == "e3m2":
        values = torch.tensor(_minifloat(3, 2), dtype=torch.float32)
    elif name == "e8m0":
        values = torch.exp2(torch.arange(256, dtype=torch.float64) - 127).to(torch.float32)  # 2**-127 is a subnormal
        values[255] = float("nan")
    elif name in _FRACTIONS:
        values = torch.tensor(_FRACTIONS[name], dtype=torch.float32)
    elif name == "ue4m3":
        values = torch.tensor([*_minifloat(4, 3)[:127], 0.0], dtype=torch.float32).repeat(2)
        values[255] = 480.0  # only 0x7F itself is read as 0
    elif name in _TORCH_FLOAT8:
        values = torch.arange(256, dtype=torch.uint8).view(getattr(torch, _TORCH_FLOAT8[name])).to(torch.float32)
    else:
        raise KeyError(f"no value table is called {name!r}; known: {', '.join(sorted(BITS))}")
    return values.to(device)


def look_up(levels: str | Tensor, codes: Tensor) -> Tensor:
    """Values of unsigned integer `codes` (any shape) in a named or stored table; float32 for a named one."""
    if isinstance(levels, str):
        if levels in _TORCH_FLOAT8 and codes.dtype == torch.uint8:
            return codes.view(getattr(torch, _TORCH_FLOAT8[levels])).to(torch.float32)
        levels = table(levels, str(codes.device)) if codes.device.type != "meta" else torch.empty(256, device="meta")
    # index_select takes a flat int32 index: several times faster on the CPU than advanced indexing
    return levels.index_select(0, codes.reshape(-1).to(torch.int32)).view(codes.shape)
