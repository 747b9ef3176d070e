"""Toy8. One int8 code per weight and one float32 scale per row.

Stored: codes int8 [out, in], scale float32 [out].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from anybit.errors import CorruptFile, NotRepresentable
from anybit.quantizers import (
    HfQuantizer,
    QuantizationConfigMixin,
    register_quantization_config,
    register_quantizer,
)
from anybit.weight import Codes, Grid, Layout, ModuleInfo, Values, Weight
from anybit.weight.layout import meta


@register_quantization_config("toy8")
@dataclass(eq=False, repr=False)
class Toy8Config(QuantizationConfigMixin):
    """`modules_to_not_convert`: names of modules that stay dense, besides the output layer."""

    modules_to_not_convert: list[str] | None = None

    method: ClassVar[str] = "toy8"


@dataclass(frozen=True)
class Toy8Layout(Layout):
    """codes * scale, in float32."""

    algorithm: ClassVar[str] = "rtn"

    def decode(self, tensors: Mapping[str, torch.Tensor]) -> Weight:
        rows, columns = self.shape
        codes = self.take(tensors, "codes", "int8", (rows, columns))
        scale = self.take(tensors, "scale", "float32", (rows,))
        if not bool(torch.isfinite(scale).all()):
            raise CorruptFile("tensor 'scale' holds a number that is not finite; write the checkpoint again")
        return self._weight(codes.view(torch.uint8), scale)

    def encode(self, weight: Weight) -> dict[str, torch.Tensor]:
        match weight.tree:
            case Grid(
                codes=Codes(packed=packed, bits=8, signed=True), scale=Values(tensor=scale), zero=None, offset=None
            ):
                return {"codes": packed.view(torch.int8), "scale": scale[:, 0].contiguous()}
        raise NotRepresentable(
            f"a {type(weight.tree).__name__} cannot be stored as toy8: it needs signed 8-bit codes and row scales"
        )

    def scheme(self) -> Weight:
        rows, columns = self.shape
        return self._weight(meta("uint8", rows, columns), meta("float32", rows))

    def _weight(self, codes: torch.Tensor, scale: torch.Tensor) -> Weight:
        _rows, columns = self.shape
        return Weight(
            Grid(Codes(codes, 8, columns, signed=True), Values(scale[:, None]), block=(1, columns)), self.dtype
        )


@register_quantizer("toy8")
class Toy8HfQuantizer(HfQuantizer):
    """Linear layers, by rounding to nearest."""

    layouts_available = True

    def layout_of(
        self, module: ModuleInfo, stored: Mapping[str, Any], peek: Callable[[str], torch.Tensor]
    ) -> Layout | None:
        return Toy8Layout(module.shape, module.dtype) if {"codes", "scale"} & set(stored) else None

    def layout_for(self, module: ModuleInfo) -> Layout | None:
        if module.kind != "linear" or not self.should_convert(module):
            return None
        return Toy8Layout(module.shape, module.dtype)
