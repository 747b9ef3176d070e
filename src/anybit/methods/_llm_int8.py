"""LLM.int8: rows of int8 with a scale each, and an input of which rows become int8 while columns with outliers do not.

Stored: weight int8 [out, in], SCB float32 [out] (the largest magnitude of each row), weight_format uint8 [] = 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from anybit._lazy import torch
from anybit.errors import CorruptFile, NoKernel, NotRepresentable
from anybit.methods._bnb_4bit import check_finite, check_form
from anybit.weight import nodes
from anybit.weight.activation import Activation, activation_rule
from anybit.weight.integer_products import exact_product
from anybit.weight.layout import Layout, meta
from anybit.weight.weight import Weight, row_chunks

if TYPE_CHECKING:
    from torch import Tensor

ONE_127TH = 7.874015718698502e-3  # as a float32; bitsandbytes multiplies with it instead of dividing


@dataclass(frozen=True)
class LlmInt8Layout(Layout):
    """`threshold`: inputs at least this large are multiplied unquantized; 0 for none."""

    threshold: float = 6.0
    has_format: bool = True

    algorithm: ClassVar[str | None] = "absmax"

    def algorithm_options(self) -> dict[str, object]:
        return {"through": "float16"}

    def _weight(self, codes: Tensor, scales: Tensor, factor: Tensor) -> Weight:
        grid = nodes.Grid(
            nodes.Codes(codes.view(torch.uint8), 8, self.shape[-1], signed=True), nodes.Values(scales.view(-1, 1))
        )
        return Weight(
            nodes.Scaled(grid, nodes.Values(factor)), self.dtype, Activation("llm_int8", threshold=self.threshold)
        )

    def scheme(self) -> Weight:
        return self._weight(meta("int8", *self.shape), meta("float32", self.shape[0]), meta("float32", 1, 1))

    def target(self) -> Weight:
        return self._weight(meta("int8", *self.shape), meta("float32", self.shape[0]), torch.full((1, 1), ONE_127TH))

    def decode(self, tensors: Mapping[str, Tensor]) -> Weight:
        codes = self.take(tensors, "weight", "int8", self.shape)
        scales = self.take(tensors, "SCB", "float32", self.shape[:1])
        check_finite(scales, "SCB")
        if self.has_format and (found := int(self.take(tensors, "weight_format", "uint8", ()))) != 0:
            raise CorruptFile(
                f"tensor 'weight_format' is {found}: the codes lie in an old order for NVIDIA cards that nothing reads any more, "
                "bitsandbytes included. Save the model again with the bitsandbytes that wrote it"
            )
        return self._weight(codes, scales, torch.full((1, 1), ONE_127TH, device=codes.device))

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        check_form(self, weight)
        tree: Any = weight.tree
        factor = tree.scale.tensor
        if not factor.is_meta and float(factor) != ONE_127TH:
            raise NotRepresentable(
                f"LLM.int8 rows are scaled by 1/127, not by {float(factor)}; quantize the weight anew"
            )
        found = {"SCB": tree.child.scale.tensor.reshape(-1), "weight": tree.child.codes.packed.view(torch.int8)}
        if self.has_format:
            found["weight_format"] = torch.zeros((), dtype=torch.uint8, device=factor.device)
        return found


@activation_rule("llm_int8")
def llm_int8(x: Tensor, weight: Weight, bias: Tensor | None, product: Any) -> Tensor:
    """Rows of the input become int8, columns with an outlier in any row stay in its dtype. As bitsandbytes in eval mode."""
    assert weight.activation is not None
    halves, threshold = x.to(torch.float16), weight.activation.threshold
    outliers = halves.abs() >= threshold if threshold > 0 else torch.zeros_like(halves, dtype=torch.bool)
    columns = outliers.any(0).nonzero()[:, 0]
    halves = halves.masked_fill(outliers, 0)
    largest = halves.abs().amax(1).to(torch.float32)
    codes = torch.round(halves * (127.0 / largest)[:, None]).nan_to_num_(0.0)  # a row of zeros, or one beyond float16
    codes[:, columns] = 0
    codes = codes.to(torch.int8)
    found = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    start = 0
    for part in _row_parts(weight.tree):
        for first, last in row_chunks(*part.shape):
            rows = slice(first, last)
            stored, scales = part.child.codes.integers(rows, slice(0, part.shape[1])), part.child.scale.tensor[rows, 0]
            sums = exact_product(codes, stored)
            own = sums * (largest[:, None] * scales[None]) * 6.200124e-05  # 1 / 127**2
            if bias is not None:
                own += bias[start + first : start + last]
            own = own.to(x.dtype)
            if len(columns):
                dense = stored[:, columns] * scales[:, None] * part.scale.tensor
                own = own.addmm(x[:, columns], dense.to(x.dtype).t())
            found[:, start + first : start + last] = own
        start += part.shape[0]
    return found


def _row_parts(tree: Any) -> list[Any]:
    """The matrices that lie one above the other."""
    if isinstance(tree, nodes.Rows):
        return [one for part in tree.parts for one in _row_parts(part)]
    if (
        isinstance(tree, nodes.Scaled)
        and isinstance(tree.child, nodes.Grid)
        and isinstance(tree.child.codes, nodes.Codes)
    ):
        return [tree]
    raise NoKernel(
        f"LLM.int8 multiplies rows of 8-bit integers, not a {type(tree).__name__}; dequantize the weight first"
    )
