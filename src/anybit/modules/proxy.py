"""What stands where a model's code expects a weight tensor: shape, dtype and device of the dense weight, and products.

`F.linear(x, weight)`, `x @ weight.T` and `x @ stack[expert]` become packed products; asking what the weight looks like works;
anything else raises and says that the weight is packed, instead of computing with numbers that are not there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from anybit.errors import NoKernel

Product = Callable[[Tensor], Tensor]

_TURNS = (
    torch.Tensor.T.__get__,  # type: ignore[attr-defined]
    torch.Tensor.mT.__get__,  # type: ignore[attr-defined]
    torch.Tensor.t,
    torch.t,
    torch.Tensor.transpose,
    torch.transpose,
)
_PRODUCTS = (torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__)


class PackedTensor(torch.Tensor):
    """A matrix [out, in] without storage; `turned` when it stands for [in, out]. `product(x)` is x @ W.T, x [..., in]."""

    product: Product
    turned: bool

    @staticmethod
    def __new__(
        cls, product: Product, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, turned: bool = False
    ) -> PackedTensor:
        size = (*shape[:-2], shape[-1], shape[-2]) if turned else shape
        self: Any = torch.Tensor._make_wrapper_subclass(cls, size, dtype=dtype, device=device)
        self.product, self.turned = product, turned
        self._is_hf_initialized = True  # transformers' initialisation leaves it alone
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is nn.functional.linear:
            x, weight, bias = _linear_arguments(*args, **kwargs)
            if isinstance(weight, cls) and not weight.turned and not isinstance(x, cls):
                y = weight.product(x)
                return y if bias is None else y + bias
        elif function in _PRODUCTS and len(args) == 2 and isinstance(args[1], cls) and not isinstance(args[0], cls):
            if args[1].turned:
                return args[1].product(args[0])
        elif function in _TURNS and args[0].dim() == 2:
            own = args[0]
            logical = tuple(own.shape[::-1]) if own.turned else tuple(own.shape)
            return cls(own.product, logical, own.dtype, own.device, not own.turned)
        return super().__torch_function__(function, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise NoKernel(
            f"a packed weight does not take part in {function}: it holds codes, not numbers. The layer's dequantize() gives the "
            "dense weight"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedTensor(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}')"


def _linear_arguments(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias


def multiplies_plainly(module: nn.Linear) -> bool:
    """Whether the forward of a subclass of `nn.Linear` is nothing but a product with its weight, told by trying it."""
    products, y = _tried(module)
    return products == 1 and isinstance(y, Tensor) and tuple(y.shape) == (2, module.weight.shape[0])


def multiplies_once(module: nn.Module) -> bool:
    """Whether a forward uses its weight for one product and nothing else, whatever becomes of the result (a router's)."""
    return _tried(module)[0] == 1


def _tried(module: Any) -> tuple[int, Any]:
    """(products with the weight in a forward of two inputs, its result); no products if it cannot be tried."""
    rows, columns = module.weight.shape
    touched: list[bool] = []

    def product(x: Tensor) -> Tensor:
        touched.append(True)
        return x.new_empty(*x.shape[:-1], rows)

    class Probe(type(module)):  # type: ignore[misc]
        weight = PackedTensor(product, (rows, columns), module.weight.dtype, torch.device("meta"))

    probe = Probe.__new__(Probe)
    probe.__dict__.update(module.__dict__)
    probe._parameters = {name: tensor for name, tensor in module._parameters.items() if name != "weight"}
    try:
        y = probe.forward(torch.empty(2, columns, dtype=module.weight.dtype, device="meta"))
    except Exception:  # whatever a stranger's forward does with arguments or weights we do not know: it stays dense
        return 0, None
    return len(touched), y
