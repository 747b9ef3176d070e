"""How BitNet stores one weight, and what it does to inputs.

Four rows share a byte, the first quarter of the rows in the lowest bits; a code is the value plus one:

    byte[r]:  ddccbbaa      a = W[r]   b = W[step + r]   c = W[2*step + r]   d = W[3*step + r]      step = ceil(out / 4)

"bitlinear" divides by weight_scale and keeps the dtype of its input throughout; "autobitlinear" multiplies, bias included, and
rounds inputs in float32. Online, master weights are rounded whenever they are multiplied.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from anybit._lazy import torch
from anybit.errors import CorruptFile, NoKernel, NotRepresentable
from anybit.methods._words import fitted, require_finite, require_zeros
from anybit.weight import packing
from anybit.weight.activation import Activation, Product, activation_rule
from anybit.weight.layout import Layout, meta
from anybit.weight.nodes import OPAQUE_DECODERS, Codes, Grid, Node, Opaque, Rows, Scaled, Values
from anybit.weight.weight import Weight

if TYPE_CHECKING:
    from torch import Tensor

FLOATS = ("bfloat16", "float16", "float32")
SMALLEST = 1e-5  # no mean magnitude, of weights or of inputs, counts as less


@dataclass(frozen=True)
class BitNetLayout(Layout):
    """Ternary codes, four in a byte. `divides`: bitlinear's reading of weight_scale."""

    scale_dtype: str = "bfloat16"
    divides: bool = True
    stored_as: str = "uint8"
    scale_shape: tuple[int, ...] = (1,)

    algorithm: ClassVar[str | None] = "absmean"

    @property
    def step(self) -> int:
        """Rows of bytes."""
        return -(-self.shape[0] // 4)

    def _weight(self, packed: Tensor, scale: Tensor) -> Weight:
        grid = Grid(Codes(packed, 2, self.shape[1]), Values(scale, inverted=self.divides), levels="ternary")
        return Weight(grid, self.dtype, _activation(self.divides))

    def scheme(self) -> Weight:
        rows, columns = self.shape
        return self._weight(meta("uint8", rows, packing.row_bytes(columns, 2)), meta(self.scale_dtype, 1, 1))

    def specs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {
            "weight": (self.stored_as, (self.step, self.shape[1])),
            "weight_scale": (self.scale_dtype, self.scale_shape),
        }

    def decode(self, tensors: Mapping[str, Tensor]) -> Weight:
        found = {name: self.take(tensors, name, *spec) for name, spec in self.specs().items()}
        scale = _checked_scale(found["weight_scale"], self.divides)
        words = found["weight"].view(torch.uint8)
        rows, columns = self.shape
        packed = torch.empty(rows, packing.row_bytes(columns, 2), dtype=torch.uint8, device=words.device)
        for quarter in range(4):
            first = quarter * self.step
            count = max(min(self.step, rows - first), 0)
            codes = (words >> (2 * quarter)) & 3
            if bool((codes[:count] == 3).any()):
                raise CorruptFile(
                    "tensor 'weight' holds the code 3, which stands for no ternary value; the file is damaged, or its bytes "
                    "are not BitNet's"
                )
            require_zeros("weight", codes[count:])
            packed[first : first + count] = packing.pack(codes[:count], 2)
        return self._weight(packed, scale)

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        grid: Any = fitted(weight, self)
        codes: Tensor = grid.codes.integers()
        words = torch.zeros(self.step, self.shape[1], dtype=torch.uint8, device=codes.device)
        for quarter in range(4):
            part = codes[quarter * self.step : (quarter + 1) * self.step]
            words[: len(part)] |= part << (2 * quarter)
        stored_as = getattr(torch, self.stored_as)
        return {"weight": words.view(stored_as), "weight_scale": grid.scale.tensor.reshape(self.scale_shape)}


@dataclass(frozen=True)
class UnpackedLayout(Layout):
    """Values -1, 0, 1 kept as floats, with autobitlinear's weight_scale: what some tools wrote before packing."""

    stored_as: str = "bfloat16"
    scale_dtype: str = "bfloat16"
    scale_shape: tuple[int, ...] = (1,)

    def _weight(self, numbers: Tensor, scale: Tensor) -> Weight:
        return Weight(Scaled(Values(numbers), Values(scale)), self.dtype, _activation(divides=False))

    def scheme(self) -> Weight:
        return self._weight(meta(self.stored_as, *self.shape), meta(self.scale_dtype, 1, 1))

    def decode(self, tensors: Mapping[str, Tensor]) -> Weight:
        numbers = require_finite("weight", self.take(tensors, "weight", self.stored_as, self.shape))
        scale = self.take(tensors, "weight_scale", self.scale_dtype, self.scale_shape)
        return self._weight(numbers, _checked_scale(scale, divides=False))

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        _check_form(weight, self)
        tree: Any = weight.tree
        return {"weight": tree.child.tensor, "weight_scale": tree.scale.tensor.reshape(self.scale_shape)}


@dataclass(frozen=True)
class OnlineLayout(Layout):
    """Master weights; what is multiplied is rounded from them, see `rounded`."""

    stored_as: str = "bfloat16"

    algorithm: ClassVar[str | None] = "keep"

    def _weight(self, numbers: Tensor) -> Weight:
        kind = f"bitnet_online_{self.dtype}"
        tree = Opaque(kind, ("weight",), (numbers,), *self.shape)
        return Weight(tree, self.dtype, Activation("bitnet_online"))

    def scheme(self) -> Weight:
        return self._weight(meta(self.stored_as, *self.shape))

    def decode(self, tensors: Mapping[str, Tensor]) -> Weight:
        return self._weight(require_finite("weight", self.take(tensors, "weight", self.stored_as, self.shape)))

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        _check_form(weight, self)
        tree: Any = weight.tree
        return {"weight": tree.tensors[0]}


def _activation(divides: bool) -> Activation:
    return Activation("bitnet_divide" if divides else "bitnet_multiply")


def _checked_scale(scale: Tensor, divides: bool) -> Tensor:
    require_finite("weight_scale", scale)
    if divides and not bool(scale.all()):
        raise CorruptFile("tensor 'weight_scale' is 0, and bitlinear divides by it; the file is damaged")
    return scale.reshape(1, 1)


def _check_form(weight: Weight, layout: Layout) -> None:
    scheme = layout.scheme()
    forms = [[(tensor.dtype, tensor.shape) for tensor in own.tensors] for own in (weight, scheme)]
    if weight.structure() != scheme.structure() or forms[0] != forms[1]:
        raise NotRepresentable(
            f"{type(layout).__name__} stores floats of shape {layout.shape}; this weight is a {type(weight.tree).__name__} of "
            f"shape {tuple(weight.shape)} in {weight.dtype}. Write it packed: linear_class='bitlinear'"
        )


# --- rounding as weights are multiplied ------------------------------------------------------------------------------------

# the factor of a matrix needs all of its numbers, and a product asks for a few rows at a time
_factors: dict[int, tuple[weakref.ref[Any], Any, Any]] = {}  # by id: tensors cannot be compared, as keys would be


def _factor(master: Tensor, dtype: torch.dtype) -> Tensor:
    """1 / mean|W|, float32, computed as transformers does, and again only when the weights have changed."""
    state = (None if master.is_inference() else master._version, master.data_ptr(), dtype)
    key = id(master)
    known = _factors.get(key)
    if known is None or known[0]() is not master or known[1] != state:
        mean = master.detach().to(dtype).to(torch.float32).abs().mean()
        known = (weakref.ref(master, lambda _: _factors.pop(key, None)), state, 1.0 / mean.clamp_(min=SMALLEST))
        _factors[key] = known
    factor: Tensor = known[2]
    return factor


def rounded(tensors: Mapping[str, Tensor], rows: slice, columns: slice, dtype: torch.dtype) -> Tensor:
    """clamp(round(W * k), -1, 1) / k as numbers of `dtype`, k = 1 / mean|W| of the whole matrix."""
    master = tensors["weight"]
    factor = _factor(master, dtype)
    numbers = master[rows, columns].to(dtype).to(torch.float32)
    return ((numbers * factor).round().clamp(-1, 1) / factor).to(dtype).to(torch.float32)


def _register(dtype: str) -> None:
    def decode(tensors: Mapping[str, Tensor], rows: slice, columns: slice) -> Tensor:
        return rounded(tensors, rows, columns, getattr(torch, dtype))

    OPAQUE_DECODERS[f"bitnet_online_{dtype}"] = decode


for _dtype in FLOATS:
    _register(_dtype)


# --- inputs ----------------------------------------------------------------------------------------------------------------


@activation_rule("bitnet_divide")
def bitnet_divide(x: Tensor, weight: Weight, bias: Tensor | None, product: Product) -> Tensor:
    """Integers in the input's dtype; the dot product is rounded to it before both scales divide it."""
    dtype = x.dtype
    factor = 127 / x.abs().amax(-1, keepdim=True).clamp(min=SMALLEST)
    scale = scales(weight.tree)
    # of zeros in float16 the factor is infinite, and a NaN becomes 0 where the peer has int8
    codes = (x * factor).round().clamp(-128, 127).nan_to_num_(0.0)
    # a sum of whole numbers, read off the product with the scaled weight
    sums = torch.round(product(codes) * scale.to(torch.float32)).to(dtype)
    y = sums / (scale.to(dtype) * factor)
    return y if bias is None else y + bias.to(dtype)


@activation_rule("bitnet_multiply")
def bitnet_multiply(x: Tensor, weight: Weight, bias: Tensor | None, product: Product) -> Tensor:
    """Inputs rounded in float32; weight_scale multiplies product and bias, after they were rounded to the input's dtype."""
    scale = scales(weight.tree)
    numbers = scale.to(torch.float32)
    sums = product(token_rounded(x)) / torch.where(numbers == 0, 1, numbers)
    sums = sums if bias is None else sums + bias.to(torch.float32)
    return sums.to(x.dtype) * scale.to(x.dtype)


@activation_rule("bitnet_online")
def bitnet_online(x: Tensor, weight: Weight, bias: Tensor | None, product: Product) -> Tensor:
    """Inputs rounded in float32; there is no scale beside the weight's own."""
    y = product(token_rounded(x))
    return (y if bias is None else y + bias.to(torch.float32)).to(x.dtype)


def token_rounded(x: Tensor) -> Tensor:
    """Each token in 255 steps, back in its own dtype."""
    numbers = x.to(torch.float32)
    factor = 127 / numbers.abs().amax(-1, keepdim=True).clamp(min=SMALLEST)
    return ((numbers * factor).round().clamp(-128, 127) / factor).to(x.dtype)


def scales(tree: Node) -> Tensor:
    """The stored weight_scale: one number, or one for each row where matrices were put together."""
    if isinstance(tree, Rows):
        return torch.cat([scales(part).expand(part.shape[0]) for part in tree.parts])
    if isinstance(tree, (Grid, Scaled)) and isinstance(tree.scale, Values):
        return tree.scale.tensor.reshape(-1)
    raise NoKernel(f"BitNet multiplies ternary matrices with a scale, not a {type(tree).__name__}; dequantize it first")
