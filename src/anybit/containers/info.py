"""What is known of a stored tensor before its data is read, and the dtypes of the safetensors format."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

LARGEST = (1 << 63) - 1  # what torch can count
MAX_DIMENSIONS = 64  # torch's own limit for most operators


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One stored tensor. `dtype` is torch's name, `shape` is in units of it, `offset` counts from the start of the file.

    `encoding`: what the bytes are, where torch has no dtype for it (GGUF's block types). `byte_order`: of a run of bytes that
    repeats, where each lies in the file; () as they are.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: str
    offset: int = 0
    stride: tuple[int, ...] | None = None  # None: contiguous; only pickles store anything else
    encoding: str = ""
    byte_order: tuple[int, ...] = ()


@dataclass(frozen=True)
class Contents:
    """Everything one file says of itself. `values`: what it holds beside tensors and is not text, by dotted name."""

    tensors: Sequence[TensorInfo]  # in the order their data lies in the file
    metadata: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StoredType:
    """A dtype of the safetensors format. `torch`: its name there (F6 has none); `pair`: torch counts two elements as one."""

    code: str
    torch: str
    bits: int
    pair: bool = False

    @property
    def itemsize(self) -> int:
        """Bytes of one element as torch counts them."""
        return max(self.bits // 8, 1)


# In the order the safetensors package sorts tensors by when it writes: widest first, so that data stays aligned.
STORED_TYPES = (
    StoredType("U64", "uint64", 64),
    StoredType("I64", "int64", 64),
    StoredType("F64", "float64", 64),
    StoredType("C64", "complex64", 64),
    StoredType("F32", "float32", 32),
    StoredType("U32", "uint32", 32),
    StoredType("I32", "int32", 32),
    StoredType("BF16", "bfloat16", 16),
    StoredType("F16", "float16", 16),
    StoredType("U16", "uint16", 16),
    StoredType("I16", "int16", 16),
    StoredType("F8_E5M2FNUZ", "float8_e5m2fnuz", 8),
    StoredType("F8_E4M3FNUZ", "float8_e4m3fnuz", 8),
    StoredType("F8_E8M0", "float8_e8m0fnu", 8),
    StoredType("F8_E4M3", "float8_e4m3fn", 8),
    StoredType("F8_E5M2", "float8_e5m2", 8),
    StoredType("I8", "int8", 8),
    StoredType("U8", "uint8", 8),
    StoredType("F6_E3M2", "float6_e3m2fn", 6),
    StoredType("F6_E2M3", "float6_e2m3fn", 6),
    StoredType("F4", "float4_e2m1fn_x2", 4, pair=True),
    StoredType("BOOL", "bool", 8),
)
BY_CODE = {kind.code: kind for kind in STORED_TYPES}
BY_TORCH_NAME = {kind.torch: kind for kind in STORED_TYPES}


def elements(shape: Sequence[int]) -> int | None:
    """Number of elements, or None if torch could not count them (an empty tensor with huge sides included)."""
    if math.prod(side for side in shape if side) > LARGEST:
        return None
    return math.prod(shape)


def shorten(name: object, limit: int = 120) -> str:
    """`repr` of a name out of a file, short enough for a message."""
    text = repr(name[: limit + 1] if isinstance(name, (str, bytes)) else name)
    return text if len(text) <= limit else f"{text[:limit]}..."
