"""Typed reading of a GGUF file's metadata: a key of another type, or a number that cannot be, is an error that names it."""

from __future__ import annotations

import math
import re
import struct
from array import array
from collections.abc import Mapping
from typing import Any, NoReturn

from anybit.errors import ConfigError, CorruptFile
from anybit.weight.block_types import BY_NAME

LARGEST = 1 << 31
BLOCK = re.compile(r"blk\.(0|[1-9]\d{0,5})\.(.+)")


class Metadata:
    """Metadata of one model. Keys without a dot in front are the architecture's own: `block_count` is `llama.block_count`."""

    def __init__(self, checkpoint: Any):
        self.values: Mapping[str, Any] = checkpoint.values
        self.tensors: Mapping[str, Any] = checkpoint.tensors
        self.read = checkpoint.read
        self.path = checkpoint.path
        self.architecture = self.text("general.architecture")
        found = {int(match[1]) for name in self.tensors if (match := BLOCK.match(name))}
        total = self.whole("block_count", largest=1 << 16)
        # the last ones may predict further tokens; they may also be left out
        self.blocks = total - self.whole("nextn_predict_layers", 0, least=0, largest=total - 1)
        missing = next((number for number in range(self.blocks) if number not in found), None)
        if found and (max(found) >= total or missing is not None):
            self.fail(
                f"{self._key('block_count')} is {total}, but the tensors belong to blocks up to {max(found)}"
                + (f", and block {missing} has none" if missing is not None else "")
            )

    def fail(self, what: str) -> NoReturn:
        raise CorruptFile(f"{self.path}: {what}. Download the file again, or make it anew with llama.cpp's converter")

    def refuse(self, what: str) -> NoReturn:
        raise ConfigError(f"{self.path}: {what}")

    def _key(self, name: str) -> str:
        known = name.startswith(("general.", "tokenizer.", "split."))
        return name if known else f"{self.architecture}.{name}"

    def _get(self, name: str, kinds: tuple[type, ...], what: str, default: Any) -> Any:
        key = self._key(name)
        found = self.values.get(key, default)
        if found is None:
            self.fail(f"the metadata has no {key!r}, and the model cannot be built without it")
        if found is not default and (type(found) not in kinds):
            shown = repr(found)
            self.fail(f"{key!r} is {shown[:60]}, which is no {what}")
        return found

    def has(self, name: str) -> bool:
        return self._key(name) in self.values

    def text(self, name: str, default: str | None = None) -> str:
        found: str = self._get(name, (str,), "text", default)
        return found

    def flag(self, name: str, default: bool) -> bool:
        found: bool = self._get(name, (bool,), "bool", default)
        return found

    def whole(self, name: str, default: int | None = None, *, least: int = 1, largest: int = LARGEST) -> int:
        found: int = self._get(name, (int,), "whole number", default)
        if found is not default and not least <= found <= largest:
            self.fail(f"{self._key(name)!r} is {found}; it lies between {least} and {largest}")
        return found

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number, as the decimal that was meant: 1e-6 for the float32 9.99999997e-07."""
        found: float = self._get(name, (float, int), "number", default)
        if not math.isfinite(found):
            self.fail(f"{self._key(name)!r} is {found}")
        number = float(found)
        return number if found is default else shortest(number)

    def uniform(self, name: str, default: int | None = None) -> int:
        """A whole number, or one for each block as long as they are equal."""
        found = self.values.get(self._key(name))
        if not isinstance(found, (array, list)):
            return self.whole(name, default)
        if not len(found) or any(type(item) is not int or not 1 <= item <= LARGEST for item in found):
            self.fail(f"{self._key(name)!r} is no list of whole numbers above zero")
        if len(set(found)) > 1:
            self.refuse(
                f"{self._key(name)!r} differs from block to block ({sorted(set(found))}), which transformers' class has no "
                "setting for. Use a model whose blocks are alike"
            )
        return int(found[0])

    def texts(self, name: str) -> list[str]:
        found: list[str] = self._get(name, (list,), "list of texts", None)
        if any(type(item) is not str for item in found):
            self.fail(f"{self._key(name)!r} is no list of texts")
        return found

    def numbers(self, name: str, default: Any = None) -> Any:
        return self._get(name, (array, list), "list of numbers", default)

    def token(self, name: str, count: int | None = None) -> int | None:
        """A special token's id, or None; ids outside of the vocabulary (the embedding's rows, or `count`) are no tokens."""
        key = f"tokenizer.ggml.{name}_token_id"
        if key not in self.values:
            return None
        found = self.whole(key, least=-LARGEST, largest=(1 << 32) - 1)
        return found if 0 <= found < (self.vocabulary if count is None else count) else None

    # --- what the tensors say -------------------------------------------------------------------------------------------

    @property
    def vocabulary(self) -> int:
        return self.shape("token_embd.weight")[0]

    def shape(self, name: str) -> tuple[int, ...]:
        """The logical shape of a stored tensor."""
        info = self.tensors.get(name)
        if info is None:
            self.fail(f"there is no tensor {name!r}")
        if len(info.shape) < 1:
            self.fail(f"tensor {name!r} is a single number")
        if not info.encoding:
            return tuple(info.shape)
        kind = BY_NAME[info.encoding]
        return (*info.shape[:-1], info.shape[-1] // kind.bytes * kind.elements)

    def first(self, name: str) -> str | None:
        """The stored tensor of that name in the first block that has one."""
        return next((f"blk.{n}.{name}" for n in range(self.blocks) if f"blk.{n}.{name}" in self.tensors), None)

    def width(self, key: str, tensor: str, axis: int = -2) -> int:
        """A width that a tensor has, and that the metadata may say too: it must be the same."""
        found = self.first(tensor)
        if found is None:
            return self.uniform(key)
        shape = self.shape(found)
        if len(shape) < 2:
            self.fail(f"tensor {found!r} has the shape {shape}; a matrix was expected")
        if self.has(key) and self.uniform(key) != shape[axis]:
            self.fail(f"{self._key(key)!r} is {self.uniform(key)}, but tensor {found!r} has {shape[axis]}")
        return shape[axis]


def shortest(value: float) -> float:
    """The shortest decimal that is the same float32."""
    try:
        wanted = struct.pack("<f", value)
    except OverflowError:
        return value
    if struct.unpack("<f", wanted)[0] != value:
        return value  # a float64
    return next(
        number for digits in range(1, 18) if struct.pack("<f", number := float(f"{value:.{digits}g}")) == wanted
    )
