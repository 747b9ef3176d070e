"""The bytes inside GGUF's blocks, and the same numbers as fields in canonical packing.

A block type is two pure functions. `unpack`: blocks uint8 [rows, blocks, bytes] -> fields [rows, blocks, n], each one stream
of codes (packing.py) or float16 / float32 numbers; `pack`: the way back, byte for byte. Nothing is lost, nothing is added:
the fields of a block have as many bits as the block.

In the comments, e is an element of the block, "lo" and "hi" are the halves of a byte.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from anybit._lazy import torch
from anybit.weight import packing

if TYPE_CHECKING:
    from torch import Tensor

Fields = Mapping[str, "Tensor"]
UNPACK: dict[str, Callable[[Tensor], dict[str, Tensor]]] = {}
PACK: dict[str, Callable[[Fields], Tensor]] = {}


def _type(*names: str) -> Callable[[type], type]:
    def keep(cls: type) -> type:
        for name in names:
            UNPACK[name], PACK[name] = cls.unpack, cls.pack  # type: ignore[attr-defined]
        return cls

    return keep


# --- pieces --------------------------------------------------------------------------------------------------------------


def _numbers(blocks: Tensor, start: int, dtype: str = "float16", count: int = 1) -> Tensor:
    kind = getattr(torch, dtype)
    raw = blocks[..., start : start + count * kind.itemsize]
    return raw.clone(memory_format=torch.contiguous_format).view(kind)


def _raw(numbers: Tensor) -> Tensor:
    return numbers.contiguous().view(torch.uint8)


def _codes(field: Tensor, bits: int) -> Tensor:
    """All codes of a field."""
    return packing.unpack(field, bits, field.shape[-1] * 8 // bits)


def _both_halves(half_bytes: Tensor) -> Tensor:
    """[..., n] bytes, lo = element j, hi = element n + j -> the same 2n nibbles in canonical order."""
    words = half_bytes.clone(memory_format=torch.contiguous_format).view(torch.int16)
    low = (words & 0x0F) | ((words >> 4) & 0xF0)
    high = ((words >> 4) & 0x0F) | ((words >> 8) & 0xF0)
    return torch.cat([low, high], -1).to(torch.uint8)


def _into_halves(nibbles: Tensor) -> Tensor:
    """Inverse of `_both_halves`."""
    low, high = nibbles.chunk(2, -1)
    first = (low & 0x0F) | ((high & 0x0F) << 4)
    second = (low >> 4) | (high & 0xF0)
    return torch.stack([first, second], -1).flatten(-2)


def _shifted(values: Tensor, bits: int, count: int) -> Tensor:
    """[..., n] -> [..., count, n]: the fields of `bits` bits of every byte, lowest first."""
    shifts = torch.arange(0, bits * count, bits, dtype=torch.uint8, device=values.device)
    return (values[..., None, :] >> shifts[:, None]) & ((1 << bits) - 1)


def _gathered(fields: Tensor, bits: int) -> Tensor:
    """Inverse of `_shifted`."""
    total = fields[..., 0, :].clone()
    for position in range(1, fields.shape[-2]):
        total |= fields[..., position, :] << (bits * position)
    return total


def _words(blocks: Tensor) -> Tensor:
    """Bytes [..., 2n] -> little-endian 16-bit words, int32 [..., n]."""
    return packing.unpack(blocks, 16, blocks.shape[-1] // 2)


def _word_bytes(words: Tensor) -> Tensor:
    return torch.stack([words & 0xFF, (words >> 8) & 0xFF], -1).flatten(-2).to(torch.uint8)


# --- one scale, or scale and minimum, per 32 --------------------------------------------------------------------------------


@_type("Q4_0")
class _Q4_0:
    """d f16, qs[16]: lo = e, hi = 16 + e. Codes are kept as q - 8, signed."""

    @staticmethod
    def unpack(b: Tensor) -> dict[str, Tensor]:
        return {"d": _numbers(b, 0), "q": _both_halves(b[..., 2:]) ^ 0x88}

    @staticmethod
    def pack(f: Fields) -> Tensor:
        return torch.cat([_raw(f["d"]), _into_halves(f["q"] ^ 0x88)], -1)


@_type("Q4_1")
class _Q4_1:
    """d, m f16, qs[16] as Q4_0."""

    @staticmethod
    def unpack(b: Tensor) -> dict[str, Tensor]:
        return {"d": _numbers(b, 0), "m": _numbers(b, 2), "q": _both_halves(b[..., 4:])}

    @staticmethod
    def pack(f: Fields) -> Tensor:
        return torch.cat([_raw(f["d"]), _raw(f["m"]), _into_halves(f["q"])], -1)


def _five_bits(high: Tensor, halves: Tensor, flip: int = 0) -> Tensor:
    """qh u32 (bit e = bit 4 of element e), qs[16] as Q4_0 -> 5-bit codes."""
    low = torch.cat([halves & 0x0F, halves >> 4], -1)
    return packing.pack((low | (packing.unpack(high, 1, 32) << 4)) ^ flip, 5)


def _from_five_bits(field: Tensor, flip: int = 0) -> Tensor:
    codes = _codes(field, 5) ^ flip
    low, high = (codes & 0x0F).chunk(2, -1)
    return torch.cat([packing.pack(codes >> 4, 1), low | (high << 4)], -1)


@_type("Q5_0")
class _Q5_0:
    """d f16, qh u32, qs[16]. Codes are kept as q - 16, signed."""

    @staticmethod
    def unpack(b: Tensor) -> dict[str, Tensor]:
        return {"d": _numbers(b, 0), "q": _five_bits(b[..., 2:6], b[..., 6:], 16)}

    @staticmethod
    def pack(f: Fields) -> Tensor:
        return torch.cat([_raw(f["d"]), _from_five_bits(f["q"], 16)], -1)


@_type("Q5_1")
class _Q5_1:
    """d, m f16, qh u32, qs[16]."""

    @staticmethod
    def unpack(b: Tensor) -> dict[str, Tensor]:
        return {"d": _numbers(b, 0), "m": _numbers(b, 2), "q": _five_bits(b[..., 4:8], b[..., 8:])}

    @staticmethod
    def pack(f: Fields) -> Tensor:
        return torch.cat([_raw(f["d"]), _raw(f["m"]), _from_five_bits(f["q"])], -1)


@_type("Q8_0", "Q1_0", "Q2_0")
class _Plain:
    """d f16, then codes in canonical order: int8[32]; bits[128]; 2 bits[64]."""

    @staticmethod
    def unpack(b: Tensor) -> dict[str, Tensor]:
        return {"d": _numbers(b, 0), "q": b[..., 2:]}

    @staticmethod
    def pack(f: Fields) -> Tensor:
        return torch.cat([_raw(f["d"]), f["q"]], -1)


@_type("Q8_1")
class _Q8_1:
    """d f16, sum f16 (of no use to the weight), int8[32]."""

    @staticmethod
    def unpack(b: Tensor) -> dict[str, Tensor]:
        return {"d": _numbers(b, 0), "sums": _numbers(b, 2), "q": b[..., 4:]}

    @staticmethod
    def pack(f: Fields) -> Tensor:
        return torch.cat([_raw(f["d"]), _raw(f["sums"]), f["q"]], -1)


@_type("Q8_K")
class _Q8_K:
    """d f32, int8[256], int16 sums[16] (of no use to the weight)."""

    @staticmethod
    def unpack(b: Tensor) -> dict[str, Tensor]:
        return {"d": _numbers(b, 0, "float32"), "q": b[..., 4:260], "sums": _numbers(b, 260, "int16", 16)}

    @staticmethod
    def pack(f: Fields) -> Tensor:
        return torch.cat([_raw(f["d"]), f["q"], _raw(f["sums"])], -1)


# --- k-quants: 256 elements, scales that have scales ------------------------------------------------------------------------


def _two_bits(quarters: Tensor) -> Tensor:
    """qs[64]: e = 128h + 32s + l is bits 2s of qs[32h + l] -> codes [..., 256]."""
    return _shifted(quarters.unflatten(-1, (2, 32)), 2, 4).flatten(-3)


def _from_two_bits(codes: Tensor) -> Tensor:
    return _gathered(codes.unflatten(-1, (2, 4, 32)), 2).flatten(-2)


@_type("Q2_K")
class _Q2_K:
    """scales[16] (lo scale, hi minimum of 16 elements), qs[64], d, dmin f16."""

    @staticmethod
    def unpack(b: Tensor) -> dict[str, Tensor]:
        both = b[..., :16]
        return {
            "q": packing.pack(_two_bits(b[..., 16:80]), 2),
            "sc": packing.pack(both & 0x0F, 4),
            "mn": packing.pack(both >> 4, 4),
            "d": _numbers(b, 80),
            "dmin": _numbers(b, 82),
        }

    @staticmethod
    def pack(f: Fields) -> Tensor:
        both = _codes(f["sc"], 4) | (_codes(f["mn"], 4) << 4)
        return torch.cat([both, _from_two_bits(_codes(f["q"], 2)), _raw(f["d"]), _raw(f["dmin"])], -1)


@_type("Q3_K")
class _Q3_K:
    """hmask[32], qs[64], scales[12], d f16. Codes are kept as q - 4 and scales as sc - 32, signed.

    q: low bits as Q2_K, bit 2 is bit e / 32 of hmask[e % 32]. sc of 16 elements: low nibble (i / 8) of scales[i % 8], upper
    two bits at 2 * (i / 4) of scales[8 + i % 4].
    """

    @staticmethod
    def unpack(b: Tensor) -> dict[str, Tensor]:
        high = _shifted(b[..., :32], 1, 8).flatten(-2)
        low = torch.cat([b[..., 96:104] & 0x0F, b[..., 96:104] >> 4], -1)
        scales = low | (_shifted(b[..., 104:108], 2, 4).flatten(-2) << 4)
        return {
            "q": packing.pack((_two_bits(b[..., 32:96]) | (high << 2)) ^ 4, 3),
            "sc": packing.pack(scales ^ 32, 6),
            "d": _numbers(b, 108),
        }

    @staticmethod
    def pack(f: Fields) -> Tensor:
        codes, scales = _codes(f["q"], 3) ^ 4, _codes(f["sc"], 6) ^ 32
        low, high = (scales & 0x0F).chunk(2, -1)
        return torch.cat([
            _gathered((codes >> 2).unflatten(-1, (8, 32)), 1), _from_two_bits(codes & 3), low | (high << 4),
            _gathered((scales >> 4).unflatten(-1, (4, 4)), 2), _raw(f["d"]),
        ], -1)  # fmt: skip


def _six_bit_pairs(b: Tensor) -> dict[str, Tensor]:
    """scales[12]: eight 6-bit scales and minimums.

    j < 4: sc = b[j] & 63, mn = b[j + 4] & 63; else sc = b[j + 4] lo | top of b[j - 4], mn = b[j + 4] hi | top of b[j].
    """
    first, second, third = b.split(4, -1)
    scales = torch.cat([first & 63, (third & 0x0F) | ((first >> 6) << 4)], -1)
    minimums = torch.cat([second & 63, (third >> 4) | ((second >> 6) << 4)], -1)
    return {"sc": packing.pack(scales, 6), "mn": packing.pack(minimums, 6)}


def _from_six_bit_pairs(f: Fields) -> Tensor:
    (low_scales, scales), (low_minimums, minimums) = (_codes(f[name], 6).chunk(2, -1) for name in ("sc", "mn"))
    return torch.cat([
        low_scales | ((scales >> 4) << 6), low_minimums | ((minimums >> 4) << 6), (scales & 0x0F) | ((minimums & 0x0F) << 4),
    ], -1)  # fmt: skip


@_type("Q4_K")
class _Q4_K:
    """d, dmin f16, scales[12], qs[128]: of 64 elements lo are the first 32, hi the others."""

    @staticmethod
    def unpack(b: Tensor) -> dict[str, Tensor]:
        codes = _both_halves(b[..., 16:].unflatten(-1, (4, 32))).flatten(-2)
        return {"d": _numbers(b, 0), "dmin": _numbers(b, 2), **_six_bit_pairs(b[..., 4:16]), "q": codes}

    @staticmethod
    def pack(f: Fields) -> Tensor:
        halves = _into_halves(f["q"].unflatten(-1, (4, 32))).flatten(-2)
        return torch.cat([_raw(f["d"]), _raw(f["dmin"]), _from_six_bit_pairs(f), halves], -1)


@_type("Q5_K")
class _Q5_K:
    """d, dmin f16, scales[12], qh[32] (bit e / 32 of qh[e % 32] is bit 4), qs[128] as Q4_K."""

    @staticmethod
    def unpack(b: Tensor) -> dict[str, Tensor]:
        low = _shifted(b[..., 48:].unflatten(-1, (4, 32)), 4, 2).flatten(-3)
        codes = low | (_shifted(b[..., 16:48], 1, 8).flatten(-2) << 4)
        scales = _six_bit_pairs(b[..., 4:16])
        return {"d": _numbers(b, 0), "dmin": _numbers(b, 2), **scales, "q": packing.pack(codes, 5)}

    @staticmethod
    def pack(f: Fields) -> Tensor:
        codes = _codes(f["q"], 5)
        return torch.cat([
            _raw(f["d"]), _raw(f["dmin"]), _from_six_bit_pairs(f), _gathered((codes >> 4).unflatten(-1, (8, 32)), 1),
            _gathered((codes & 0x0F).unflatten(-1, (4, 2, 32)), 4).flatten(-2),
        ], -1)  # fmt: skip


@_type("Q6_K")
class _Q6_K:
    """ql[128], qh[64], int8 scales[16], d f16. Codes are kept as q - 32, signed.

    e = 128h + 32s + l: low four bits of ql[64h + 32(s % 2) + l], lo if s < 2; upper two at 2s of qh[32h + l].
    """

    @staticmethod
    def unpack(b: Tensor) -> dict[str, Tensor]:
        low = _shifted(b[..., :128].unflatten(-1, (2, 64)), 4, 2).flatten(-3)
        codes = (low | (_two_bits(b[..., 128:192]) << 4)) ^ 32
        return {"q": packing.pack(codes, 6), "sc": b[..., 192:208], "d": _numbers(b, 208)}

    @staticmethod
    def pack(f: Fields) -> Tensor:
        codes = _codes(f["q"], 6) ^ 32
        low = _gathered((codes & 0x0F).unflatten(-1, (2, 2, 64)), 4).flatten(-2)
        return torch.cat([low, _from_two_bits(codes >> 4), f["sc"], _raw(f["d"])], -1)


# --- ternary and small floats -----------------------------------------------------------------------------------------------


@_type("TQ2_0")
class _TQ2_0:
    """qs[64] as Q2_K, d f16."""

    @staticmethod
    def unpack(b: Tensor) -> dict[str, Tensor]:
        return {"q": packing.pack(_two_bits(b[..., :64]), 2), "d": _numbers(b, 64)}

    @staticmethod
    def pack(f: Fields) -> Tensor:
        return torch.cat([_from_two_bits(_codes(f["q"], 2)), _raw(f["d"])], -1)


@_type("TQ1_0")
class _TQ1_0:
    """qs[48], qh[4], d f16. A byte holds five digits in base 3 (of qh, four) as a fraction of 256; see `_gguf_layout`."""

    @staticmethod
    def unpack(b: Tensor) -> dict[str, Tensor]:
        return {"fives": b[..., :48], "fours": b[..., 48:52], "d": _numbers(b, 52)}

    @staticmethod
    def pack(f: Fields) -> Tensor:
        return torch.cat([f["fives"], f["fours"], _raw(f["d"])], -1)


@_type("MXFP4")
class _MXFP4:
    """e u8, qs[16] as Q4_0: E2M1."""

    @staticmethod
    def unpack(b: Tensor) -> dict[str, Tensor]:
        return {"d": b[..., :1], "q": _both_halves(b[..., 1:])}

    @staticmethod
    def pack(f: Fields) -> Tensor:
        return torch.cat([f["d"], _into_halves(f["q"])], -1)


@_type("NVFP4")
class _NVFP4:
    """Scales u8[4], one for 16 elements; qs[32]: of 16 elements lo are the first 8, hi the others."""

    @staticmethod
    def unpack(b: Tensor) -> dict[str, Tensor]:
        return {"d": b[..., :4], "q": _both_halves(b[..., 4:].unflatten(-1, (4, 8))).flatten(-2)}

    @staticmethod
    def pack(f: Fields) -> Tensor:
        return torch.cat([f["d"], _into_halves(f["q"].unflatten(-1, (4, 8))).flatten(-2)], -1)


# --- code books ---------------------------------------------------------------------------------------------------------------


@_type("IQ4_NL")
class _IQ4_NL:
    """d f16, qs[16] as Q4_0."""

    @staticmethod
    def unpack(b: Tensor) -> dict[str, Tensor]:
        return {"d": _numbers(b, 0), "q": _both_halves(b[..., 2:])}

    @staticmethod
    def pack(f: Fields) -> Tensor:
        return torch.cat([_raw(f["d"]), _into_halves(f["q"])], -1)


@_type("IQ4_XS")
class _IQ4_XS:
    """d f16, scales_h u16 (2 bits of each of 8), scales_l[4] (4 bits), qs[128]: of 32 elements lo are the first 16.

    Scales are kept as ls - 32, signed.
    """

    @staticmethod
    def unpack(b: Tensor) -> dict[str, Tensor]:
        scales = _codes(b[..., 4:8], 4) | (_codes(b[..., 2:4], 2) << 4)
        codes = _both_halves(b[..., 8:].unflatten(-1, (8, 16))).flatten(-2)
        return {"d": _numbers(b, 0), "sc": packing.pack(scales ^ 32, 6), "q": codes}

    @staticmethod
    def pack(f: Fields) -> Tensor:
        scales = _codes(f["sc"], 6) ^ 32
        halves = _into_halves(f["q"].unflatten(-1, (8, 16))).flatten(-2)
        return torch.cat([_raw(f["d"]), packing.pack(scales >> 4, 2), packing.pack(scales & 0x0F, 4), halves], -1)


def _signs_and_scale(words: Tensor) -> dict[str, Tensor]:
    """u32 for 32 elements, [..., 8, 4 bytes]: four signs of 7 bits, and the scale in the top four bits."""
    signs = packing.unpack(words, 7, 4).flatten(-2)
    return {"signs": packing.pack(signs, 7), "sc": packing.pack(words[..., 3] >> 4, 4)}


def _from_signs_and_scale(f: Fields) -> Tensor:
    signs = packing.pack(_codes(f["signs"], 7).unflatten(-1, (8, 4)), 7)  # 28 bits in 4 bytes
    signs[..., 3] |= _codes(f["sc"], 4) << 4
    return signs


@_type("IQ2_XXS")
class _IQ2_XXS:
    """d f16, then for 32 elements: four indices of 8 bits, u32 of signs and scale."""

    @staticmethod
    def unpack(b: Tensor) -> dict[str, Tensor]:
        words = b[..., 2:].unflatten(-1, (8, 8))
        return {"d": _numbers(b, 0), "q": words[..., :4].flatten(-2), **_signs_and_scale(words[..., 4:])}

    @staticmethod
    def pack(f: Fields) -> Tensor:
        words = torch.cat([f["q"].unflatten(-1, (8, 4)), _from_signs_and_scale(f)], -1)
        return torch.cat([_raw(f["d"]), words.flatten(-2)], -1)


@_type("IQ2_XS")
class _IQ2_XS:
    """d f16, u16[32] for 8 elements each: index of 9 bits, signs of 7; scales[8], lo first, for 16 elements each."""

    @staticmethod
    def unpack(b: Tensor) -> dict[str, Tensor]:
        words = _words(b[..., 2:66])
        return {
            "d": _numbers(b, 0),
            "q": packing.pack(words & 511, 9),
            "signs": packing.pack(words >> 9, 7),
            "sc": b[..., 66:],
        }

    @staticmethod
    def pack(f: Fields) -> Tensor:
        words = _codes(f["q"], 9) | (_codes(f["signs"], 7).to(torch.int32) << 9)
        return torch.cat([_raw(f["d"]), _word_bytes(words), f["sc"]], -1)


def _with_top_bits(low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Indices of 8 + bits bits: low bytes, and top bits in canonical order."""
    return packing.pack(low.to(torch.int32) | (_codes(high, bits).to(torch.int32) << 8), 8 + bits)


@_type("IQ2_S")
class _IQ2_S:
    """d f16, qs[32] and qh[8] (index of 10 bits for 8 elements), signs[32] a bit each between them; scales[8] as IQ2_XS."""

    @staticmethod
    def unpack(b: Tensor) -> dict[str, Tensor]:
        index = _with_top_bits(b[..., 2:34], b[..., 66:74], 2)
        return {"d": _numbers(b, 0), "q": index, "signs": b[..., 34:66], "sc": b[..., 74:]}

    @staticmethod
    def pack(f: Fields) -> Tensor:
        index = _codes(f["q"], 10)
        low, high = (index & 0xFF).to(torch.uint8), packing.pack(index >> 8, 2)
        return torch.cat([_raw(f["d"]), low, f["signs"], high, f["sc"]], -1)


@_type("IQ3_XXS")
class _IQ3_XXS:
    """d f16, qs[64] indices of 8 bits for 4 elements each, u32[8] of signs and scale."""

    @staticmethod
    def unpack(b: Tensor) -> dict[str, Tensor]:
        return {"d": _numbers(b, 0), "q": b[..., 2:66], **_signs_and_scale(b[..., 66:].unflatten(-1, (8, 4)))}

    @staticmethod
    def pack(f: Fields) -> Tensor:
        return torch.cat([_raw(f["d"]), f["q"], _from_signs_and_scale(f).flatten(-2)], -1)


@_type("IQ3_S")
class _IQ3_S:
    """d f16, qs[64] and qh[8] (index of 9 bits for 4 elements), signs[32] a bit each, scales[4], lo first, for 32 elements."""

    @staticmethod
    def unpack(b: Tensor) -> dict[str, Tensor]:
        index = _with_top_bits(b[..., 2:66], b[..., 66:74], 1)
        return {"d": _numbers(b, 0), "q": index, "signs": b[..., 74:106], "sc": b[..., 106:]}

    @staticmethod
    def pack(f: Fields) -> Tensor:
        index = _codes(f["q"], 9)
        low, high = (index & 0xFF).to(torch.uint8), packing.pack(index >> 8, 1)
        return torch.cat([_raw(f["d"]), low, high, f["signs"], f["sc"]], -1)


@_type("IQ1_S")
class _IQ1_S:
    """d f16, qs[32], qh u16[8] for 32 elements: top 3 bits of four indices of 11 bits, scale of 3 bits, sign of the shift."""

    @staticmethod
    def unpack(b: Tensor) -> dict[str, Tensor]:
        words = _words(b[..., 34:])
        high = (words[..., None] >> torch.arange(0, 12, 3, device=b.device)) & 7
        index = b[..., 2:34].to(torch.int32) | (high.flatten(-2) << 8)
        return {
            "d": _numbers(b, 0),
            "q": packing.pack(index, 11),
            "sc": packing.pack((words >> 12) & 7, 3),
            "shift": packing.pack((words >> 15) & 1, 1),
        }

    @staticmethod
    def pack(f: Fields) -> Tensor:
        index = _codes(f["q"], 11)
        high = (index >> 8).unflatten(-1, (8, 4)) << torch.arange(0, 12, 3, device=index.device)
        scales, shifts = (_codes(f[name], bits).to(torch.int32) for name, bits in (("sc", 3), ("shift", 1)))
        words = high.sum(-1) | (scales << 12) | (shifts << 15)
        return torch.cat([_raw(f["d"]), (index & 0xFF).to(torch.uint8), _word_bytes(words)], -1)


@_type("IQ1_M")
class _IQ1_M:
    """qs[32], qh[16] (a nibble for 8 elements: top 3 bits of the index, sign of the shift), scales u16[4]: four scales of 3 bits
    for 16 elements each, and a nibble of d f16. Codes are index and shift together, 12 bits."""

    @staticmethod
    def unpack(b: Tensor) -> dict[str, Tensor]:
        words = _words(b[..., 48:])
        number = (words >> 12) << torch.arange(0, 16, 4, device=b.device)
        scales = (words[..., None] >> torch.arange(0, 12, 3, device=b.device)) & 7
        return {
            "d": _word_bytes(number.sum(-1, keepdim=True)).view(torch.float16),
            "q": _with_top_bits(b[..., :32], b[..., 32:48], 4),
            "sc": packing.pack(scales.flatten(-2), 3),
        }

    @staticmethod
    def pack(f: Fields) -> Tensor:
        index = _codes(f["q"], 12)
        number = _words(_raw(f["d"]))
        scales = _codes(f["sc"], 3).to(torch.int32).unflatten(-1, (4, 4))
        words = (scales << torch.arange(0, 12, 3, device=scales.device)).sum(-1)
        words = words | (((number >> torch.arange(0, 16, 4, device=scales.device)) & 15) << 12)
        return torch.cat([(index & 0xFF).to(torch.uint8), packing.pack(index >> 8, 4), _word_bytes(words)], -1)
