"""torch operators over prepared weights, so that compile, export and autograd see one opaque node per product.

`spec` is "<kernel name>\\n<the kernel's own spec>"; it is a constant of the graph. `columns`/`rows` are the output width.
They are defined by schema and not through `torch.library.custom_op`, whose checks of every call cost as much as a small product.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from anybit.kernels.base import Kernel
from anybit.kernels.registry import get


def full_spec(kernel: Kernel, spec: str) -> str:
    """The spec as the operators take it."""
    return f"{kernel.name}\n{spec}"


@functools.lru_cache(maxsize=4096)
def _split(spec: str) -> tuple[Kernel, str]:
    name, _, rest = spec.partition("\n")
    return get(name), rest


def _operator(name: str, schema: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Makes a function the operator anybit::name, for every device; its fake and its gradient are registered by name."""
    torch.library.define(f"anybit::{name}", schema, tags=torch.Tag.pt2_compliant_tag)

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        torch.library.impl(f"anybit::{name}", "CompositeExplicitAutograd", function)
        return function

    return register


def _fake(name: str) -> Any:
    return torch.library.register_fake(f"anybit::{name}")


@_operator("linear", "(Tensor x, Tensor[] packed, Tensor? bias, str spec, SymInt rows) -> Tensor")
def linear(x: Tensor, packed: list[Tensor], bias: Tensor | None, spec: str, rows: int) -> Tensor:
    """x [..., in] -> [..., rows] in x's dtype."""
    kernel, own = _split(spec)
    flat = x.reshape(-1, x.shape[-1])
    if flat.shape[0] == 0:
        return x.new_zeros(*x.shape[:-1], rows)
    return kernel.linear(flat, own, packed, bias).view(*x.shape[:-1], rows)


@_fake("linear")
def _(x: Tensor, packed: list[Tensor], bias: Tensor | None, spec: str, rows: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


@_operator("linear_input_gradient", "(Tensor gradient, Tensor[] packed, str spec, SymInt columns) -> Tensor")
def linear_input_gradient(gradient: Tensor, packed: list[Tensor], spec: str, columns: int) -> Tensor:
    """gradient [..., out] -> gradient @ W [..., columns]."""
    kernel, own = _split(spec)
    flat = gradient.reshape(-1, gradient.shape[-1])
    return kernel.input_gradient(flat, own, packed).view(*gradient.shape[:-1], columns)


@_fake("linear_input_gradient")
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
        to_input = torch.ops.anybit.linear_input_gradient(gradient.contiguous(), packed, ctx.spec, ctx.columns)  # type: ignore[attr-defined]
    to_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0) if ctx.has_bias else None  # type: ignore[attr-defined]
    return to_input, [None] * ctx.count, to_bias, None, None  # type: ignore[attr-defined]


torch.library.register_autograd("anybit::linear", _linear_backward, setup_context=_linear_context)


@_operator("embedding", "(Tensor ids, Tensor[] packed, str spec, SymInt columns, ScalarType dtype) -> Tensor")
def embedding(ids: Tensor, packed: list[Tensor], spec: str, columns: int, dtype: torch.dtype) -> Tensor:
    """ids [...] -> rows of the weight [..., columns] in `dtype`; on the CPU each distinct row is decoded once.

    On a GPU finding the distinct ones costs more than it saves: the host would wait for their number.
    """
    kernel, own = _split(spec)
    if ids.device.type != "cpu":
        return kernel.take_rows(ids.reshape(-1), own, packed).to(dtype).view(*ids.shape, columns)
    distinct, place = torch.unique(ids.reshape(-1), return_inverse=True)
    return kernel.take_rows(distinct, own, packed).to(dtype)[place].view(*ids.shape, columns)


@_fake("embedding")
def _(ids: Tensor, packed: list[Tensor], spec: str, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*ids.shape, columns, dtype=dtype, device=ids.device)


@_operator("experts_linear", "(Tensor x, Tensor ends, Tensor[] packed, str spec, SymInt rows) -> Tensor")
def experts_linear(x: Tensor, ends: Tensor, packed: list[Tensor], spec: str, rows: int) -> Tensor:
    """x [n, in] sorted by expert, expert e owning rows ends[e-1] .. ends[e] -> [n, rows]."""
    kernel, own = _split(spec)
    return kernel.experts(x, ends, own, packed)


@_fake("experts_linear")
def _(x: Tensor, ends: Tensor, packed: list[Tensor], spec: str, rows: int) -> Tensor:
    return x.new_empty(x.shape[0], rows)


@_operator(
    "experts_input_gradient",
    "(Tensor gradient, Tensor ends, Tensor[] packed, str spec, SymInt columns) -> Tensor",
)
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


@_fake("experts_input_gradient")
def _(gradient: Tensor, ends: Tensor, packed: list[Tensor], spec: str, columns: int) -> Tensor:
    return gradient.new_empty(gradient.shape[0], columns)


def _experts_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: Tensor) -> None:
    x, ends, packed, ctx.spec, _ = inputs  # type: ignore[attr-defined]
    ctx.columns, ctx.count = x.shape[-1], len(packed)  # type: ignore[attr-defined,arg-type]
    ctx.save_for_backward(ends, *packed)  # type: ignore[misc,arg-type]


def _experts_backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[object, ...]:
    ends, *packed = ctx.saved_tensors  # type: ignore[attr-defined]
    to_input = torch.ops.anybit.experts_input_gradient(gradient.contiguous(), ends, packed, ctx.spec, ctx.columns)  # type: ignore[attr-defined]
    return to_input, None, [None] * ctx.count, None, None  # type: ignore[attr-defined]


torch.library.register_autograd("anybit::experts_linear", _experts_backward, setup_context=_experts_context)
