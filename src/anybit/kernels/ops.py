"""torch operators over prepared weights, so that compile, export and autograd see one opaque node per product.

`spec` is "<kernel name>\\n<the kernel's own spec>"; it is a constant of the graph. `columns`/`rows` are the output width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anybit.kernels.base import Kernel
from anybit.kernels.registry import get


def full_spec(kernel: Kernel, spec: str) -> str:
    """The spec as the operators take it."""
    return f"{kernel.name}\n{spec}"


def _split(spec: str) -> tuple[Kernel, str]:
    name, _, rest = spec.partition("\n")
    return get(name), rest


@torch.library.custom_op("anybit::linear", mutates_args=())
def linear(x: Tensor, packed: list[Tensor], bias: Tensor | None, spec: str, rows: int) -> Tensor:
    """x [..., in] -> [..., rows] in x's dtype."""
    kernel, own = _split(spec)
    flat = x.reshape(-1, x.shape[-1])
    if flat.shape[0] == 0:
        return x.new_zeros(*x.shape[:-1], rows)
    return kernel.linear(flat, own, packed, bias).view(*x.shape[:-1], rows)


@linear.register_fake
def _(x: Tensor, packed: list[Tensor], bias: Tensor | None, spec: str, rows: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


@torch.library.custom_op("anybit::linear_input_gradient", mutates_args=())
def linear_input_gradient(gradient: Tensor, packed: list[Tensor], spec: str, columns: int) -> Tensor:
    """gradient [..., out] -> gradient @ W [..., columns]."""
    kernel, own = _split(spec)
    flat = gradient.reshape(-1, gradient.shape[-1])
    return kernel.input_gradient(flat, own, packed).view(*gradient.shape[:-1], columns)


@linear_input_gradient.register_fake
def _(gradient: Tensor, packed: list[Tensor], spec: str, columns: int) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-1], columns)


def _linear_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: Tensor) -> None:
    x, packed, bias, ctx.spec, _ = inputs  # type: ignore[attr-defined]
    ctx.columns = x.shape[-1]  # type: ignore[attr-defined]
    ctx.count = len(packed)  # type: ignore[attr-defined,arg-type]
    ctx.has_bias = bias is not None and bias.requires_grad  # type: ignore[attr-defined]
    ctx.save_for_backward(*packed)  # type: ignore[misc]


def _linear_backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[object, ...]:
    packed = list(ctx.saved_tensors)  # type: ignore[attr-defined]
    to_input = None
    if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
        to_input = linear_input_gradient(gradient.contiguous(), packed, ctx.spec, ctx.columns)  # type: ignore[attr-defined]
    to_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0) if ctx.has_bias else None  # type: ignore[attr-defined]
    return to_input, [None] * ctx.count, to_bias, None, None  # type: ignore[attr-defined]


linear.register_autograd(_linear_backward, setup_context=_linear_context)


@torch.library.custom_op("anybit::embedding", mutates_args=())
def embedding(ids: Tensor, packed: list[Tensor], spec: str, columns: int, dtype: torch.dtype) -> Tensor:
    """ids [...] -> rows of the weight [..., columns] in `dtype`; on the CPU each distinct row is decoded once.

    On a GPU finding the distinct ones costs more than it saves: the host would wait for their number.
    """
    kernel, own = _split(spec)
    if ids.device.type != "cpu":
        return kernel.take_rows(ids.reshape(-1), own, packed).to(dtype).view(*ids.shape, columns)
    distinct, place = torch.unique(ids.reshape(-1), return_inverse=True)
    return kernel.take_rows(distinct, own, packed).to(dtype)[place].view(*ids.shape, columns)


@embedding.register_fake
def _(ids: Tensor, packed: list[Tensor], spec: str, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*ids.shape, columns, dtype=dtype, device=ids.device)


@torch.library.custom_op("anybit::experts_linear", mutates_args=())
def experts_linear(x: Tensor, ends: Tensor, packed: list[Tensor], spec: str, rows: int) -> Tensor:
    """x [n, in] sorted by expert, expert e owning rows ends[e-1] .. ends[e] -> [n, rows]."""
    kernel, own = _split(spec)
    return kernel.experts(x, ends, own, packed)


@experts_linear.register_fake
def _(x: Tensor, ends: Tensor, packed: list[Tensor], spec: str, rows: int) -> Tensor:
    return x.new_empty(x.shape[0], rows)


@torch.library.custom_op("anybit::experts_input_gradient", mutates_args=())
def experts_input_gradient(gradient: Tensor, ends: Tensor, packed: list[Tensor], spec: str, columns: int) -> Tensor:
    """gradient [n, out] sorted by expert -> [n, columns]."""
    from anybit.kernels.reference import gradient_through

    kernel, own = _split(spec)
    weight = kernel.restore(own, packed)
    result, start = torch.empty(gradient.shape[0], columns, dtype=gradient.dtype, device=gradient.device), 0
    for expert, stop in enumerate(ends.tolist()):
        if stop > start:
            result[start:stop] = gradient_through(weight.select(expert), gradient[start:stop])
        start = stop
    return result


@experts_input_gradient.register_fake
def _(gradient: Tensor, ends: Tensor, packed: list[Tensor], spec: str, columns: int) -> Tensor:
    return gradient.new_empty(gradient.shape[0], columns)


def _experts_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: Tensor) -> None:
    x, ends, packed, ctx.spec, _ = inputs  # type: ignore[attr-defined]
    ctx.columns, ctx.count = x.shape[-1], len(packed)  # type: ignore[attr-defined,arg-type]
    ctx.save_for_backward(ends, *packed)  # type: ignore[misc,arg-type]


def _experts_backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[object, ...]:
    ends, *packed = ctx.saved_tensors  # type: ignore[attr-defined]
    to_input = experts_input_gradient(gradient.contiguous(), ends, packed, ctx.spec, ctx.columns)  # type: ignore[attr-defined]
    return to_input, None, [None] * ctx.count, None, None  # type: ignore[attr-defined]


experts_linear.register_autograd(_experts_backward, setup_context=_experts_context)
