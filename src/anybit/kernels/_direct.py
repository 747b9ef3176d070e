"""Products that go past torch's dispatcher: in a decoding step an operator costs as much time as a small product.

Only where nobody could tell: no gradients are recorded, nothing compiles or traces, no mode looks at operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]


def unobserved(x: Tensor) -> bool:
    """Whether an operator on `x` would be nothing but a call of its function."""
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and type(x) is Tensor
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and not torch.autograd._profiler_enabled()
    )


class Bound:
    """A product of a kernel with one weight, and where in memory the tensors lie that it reads. It keeps none of them alive.

    It belongs to one module in one process: copying or pickling it gives None, and the copy of the module makes its own.
    """

    def __init__(self, product: Product, parameters: dict[str, Any], names: list[str], bias: Tensor | None):
        self.product = product
        self.places = [(name, parameters[name].data_ptr()) for name in names]
        self.bias = None if bias is None else bias.data_ptr()

    def holds(self, parameters: dict[str, Any], bias: Tensor | None) -> bool:
        """Whether the module's tensors are still there. Others of the same spec in the same place would do as well."""
        for name, place in self.places:
            if parameters[name].data_ptr() != place:
                return False
        return (None if bias is None else bias.data_ptr()) == self.bias

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return type(None), ()
