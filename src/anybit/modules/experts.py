"""A packed stack of expert matrices, standing where a model class has a 3-D parameter.

The model's own experts module keeps its forward. What it does with the parameter is met in three ways:
  * `experts_forward`, registered with transformers as the experts implementation "anybit": sorts tokens by expert and
    multiplies all of them in one operator; compiles without graph breaks;
  * `stack[expert]` gives the matrix of one expert, and `F.linear(x, matrix)` or `x @ matrix` a packed product;
  * `torch.bmm(x, stack)` for classes that run every expert on every token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from anybit.errors import NoKernel
from anybit.kernels import ops
from anybit.kernels._direct import unobserved
from anybit.modules.packed import PackedWeight
from anybit.modules.proxy import PackedTensor


class QuantExperts(PackedWeight):
    """[experts, out, in], or [experts, in, out] for a model class that stores it `transposed`.

    `dequantize()` has the model class' own orientation, like the parameter it stands for.
    """

    def __init__(self, transposed: bool = False):
        super().__init__()
        self.transposed = transposed

    @property
    def shape(self) -> torch.Size:
        experts, rows, columns = self.quantized_shape
        return torch.Size((experts, columns, rows) if self.transposed else (experts, rows, columns))

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.parts[0].layout.dtype)
        return dtype

    @property
    def device(self) -> torch.device:
        return self.packed[0].device

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        dense = super().dequantize(dtype)
        return dense.transpose(1, 2).contiguous() if self.transposed else dense

    def grouped(self, x: Tensor, ends: Tensor) -> Tensor:
        """x [n, in] sorted by expert, expert e owning rows ends[e-1] .. ends[e] -> [n, out]."""
        multiply = ops.experts_linear if unobserved(x) else torch.ops.anybit.experts_linear
        return multiply(x, ends, self.packed, self.spec, self.quantized_shape[1])

    def __getitem__(self, expert: int | Tensor) -> Tensor:
        """The matrix of one expert as far as a model's forward needs it: in a product."""
        number, (experts, *shape) = int(expert), self.quantized_shape

        def product(x: Tensor) -> Tensor:
            flat = x.reshape(-1, x.shape[-1])
            ends = torch.zeros(experts, dtype=torch.int64, device=x.device)
            ends[number:] = flat.shape[0]
            return self.grouped(flat, ends).view(*x.shape[:-1], -1)

        return PackedTensor(product, tuple(shape), self.dtype, self.device, turned=self.transposed)

    @classmethod
    def __torch_function__(cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.bmm, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.bmm):
            x, stack = args
            if isinstance(stack, cls) and stack.transposed:  # x [experts, tokens, in] @ [experts, in, out]
                experts, tokens, width = x.shape
                ends = torch.arange(tokens, tokens * experts + 1, tokens, device=x.device)
                return stack.grouped(x.reshape(-1, width), ends).view(experts, tokens, -1)
        raise NoKernel(f"packed experts do not take part in {function.__name__}; dequantize() gives the dense stack")

    def extra_repr(self) -> str:
        return f"shape={tuple(self.shape)}, {self.form}"


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Forward of an experts module (transformers' "experts implementation" protocol) over packed stacks.

    hidden_states [tokens, hidden], top_k_index and top_k_weights [tokens, k] -> [tokens, hidden]. Dense stacks beside
    packed ones are multiplied expert by expert.
    """
    tokens, choices = top_k_index.shape
    expert_of = top_k_index.reshape(-1)
    order = torch.argsort(expert_of, stable=True)
    sorted_experts = expert_of[order].clamp(max=self.num_experts - 1)
    ends = torch.searchsorted(
        expert_of[order].contiguous(), torch.arange(self.num_experts, device=order.device), right=True
    )
    x = hidden_states[order // choices]

    observers = self.__dict__.get("_anybit_observers", {})

    def multiply(name: str, x: Tensor) -> Tensor:
        stack = getattr(self, name)
        if name in observers:  # calibration listens
            observers[name](x, ends)
        if isinstance(stack, QuantExperts):
            y = stack.grouped(x, ends)
        else:
            y = _dense_experts(stack.transpose(1, 2) if self.is_transposed else stack, x, ends)
        return y + getattr(self, f"{name}_bias")[sorted_experts].to(y.dtype) if self.has_bias else y

    if self.has_gate:
        x = self._apply_gate(multiply("gate_up_proj", x))
    else:
        x = self.act_fn(multiply("up_proj", x))
    x = multiply("down_proj", x)
    if self.has_post_expert_norm:
        x = self.post_expert_norm(x)
    weighted = x * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    restored = torch.empty_like(weighted)
    restored[order] = weighted
    return restored.view(tokens, choices, -1).sum(dim=1).to(hidden_states.dtype)


def _dense_experts(stack: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """x [n, in] sorted by expert times dense [experts, out, in]."""
    y, start = x.new_empty(x.shape[0], stack.shape[1]), 0
    for expert, stop in enumerate(ends.tolist()):
        if stop > start:
            y[start:stop] = nn.functional.linear(x[start:stop], stack[expert])
        start = stop
    return y
