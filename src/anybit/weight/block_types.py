"""llama.cpp's tensor types: how many weights a block has, and the fields its bytes are made of. Rows are whole blocks.

What the bytes mean is a layout's business; this is what a reader of files must know of a type to count and order bytes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockType:
    """A tensor type: `elements` weights in a block of sum(words) bytes. `words`: widths of its fields, for the byte order.

    `dtype`: torch's name where torch can read it; the others are blocks of bytes.
    """

    name: str
    elements: int
    words: tuple[int, ...]
    dtype: str = "uint8"

    @property
    def bytes(self) -> int:
        return sum(self.words)

    @property
    def byte_order(self) -> tuple[int, ...]:
        """Where each byte of a block lies when every word is reversed."""
        order: list[int] = []
        for width in self.words:
            order += range(len(order) + width - 1, len(order) - 1, -1)
        return tuple(order)


def _bytes(count: int) -> tuple[int, ...]:
    return (1,) * count


TYPES: dict[int, BlockType] = {
    0: BlockType("F32", 1, (4,), "float32"),
    1: BlockType("F16", 1, (2,), "float16"),
    2: BlockType("Q4_0", 32, (2, *_bytes(16))),
    3: BlockType("Q4_1", 32, (2, 2, *_bytes(16))),
    6: BlockType("Q5_0", 32, (2, 4, *_bytes(16))),
    7: BlockType("Q5_1", 32, (2, 2, 4, *_bytes(16))),
    8: BlockType("Q8_0", 32, (2, *_bytes(32))),
    9: BlockType("Q8_1", 32, (2, 2, *_bytes(32))),
    10: BlockType("Q2_K", 256, (*_bytes(80), 2, 2)),
    11: BlockType("Q3_K", 256, (*_bytes(108), 2)),
    12: BlockType("Q4_K", 256, (2, 2, *_bytes(140))),
    13: BlockType("Q5_K", 256, (2, 2, *_bytes(172))),
    14: BlockType("Q6_K", 256, (*_bytes(208), 2)),
    15: BlockType("Q8_K", 256, (4, *_bytes(256), *(2,) * 16)),
    16: BlockType("IQ2_XXS", 256, (2, *(4,) * 16)),
    17: BlockType("IQ2_XS", 256, (2, *(2,) * 32, *_bytes(8))),
    18: BlockType("IQ3_XXS", 256, (2, *_bytes(64), *(4,) * 8)),
    19: BlockType("IQ1_S", 256, (2, *_bytes(32), *(2,) * 8)),
    20: BlockType("IQ4_NL", 32, (2, *_bytes(16))),
    21: BlockType("IQ3_S", 256, (2, *_bytes(108))),
    22: BlockType("IQ2_S", 256, (2, *_bytes(80))),
    23: BlockType("IQ4_XS", 256, (2, 2, *_bytes(132))),
    24: BlockType("I8", 1, (1,), "int8"),
    25: BlockType("I16", 1, (2,), "int16"),
    26: BlockType("I32", 1, (4,), "int32"),
    27: BlockType("I64", 1, (8,), "int64"),
    28: BlockType("F64", 1, (8,), "float64"),
    29: BlockType("IQ1_M", 256, (*_bytes(48), *(2,) * 4)),
    30: BlockType("BF16", 1, (2,), "bfloat16"),
    34: BlockType("TQ1_0", 256, (*_bytes(52), 2)),
    35: BlockType("TQ2_0", 256, (*_bytes(64), 2)),
    39: BlockType("MXFP4", 32, _bytes(17)),
    40: BlockType("NVFP4", 64, _bytes(36)),
    41: BlockType("Q1_0", 128, (2, *_bytes(16))),
    42: BlockType("Q2_0", 64, (2, *_bytes(16))),
}
BY_NAME = {kind.name: kind for kind in TYPES.values()}
REMOVED = {
    4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8",
}  # fmt: skip
_ITEMSIZE = {kind.dtype: kind.bytes for kind in TYPES.values() if kind.elements == 1}


def itemsize(dtype: str) -> int:
    """Bytes of an element of one of torch's dtypes that tensors of these types are read as."""
    return _ITEMSIZE.get(dtype, 1)
