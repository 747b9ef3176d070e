"""FBGEMM FP8: its layouts and what its products do to their inputs. Formulas are those of its PyTorch code, which runs anywhere;
its CUDA code divides where this multiplies by a reciprocal, a difference in the last bit of a scale.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from anybit._lazy import torch
from anybit.algorithms import minifloat
from anybit.methods._activations import SMALLEST, TOP
from anybit.methods._float_evidence import FLOATS, ROW, contradiction, missing
from anybit.methods._scaled_floats import Inputs, ScaledFloatLayout, Spec
from anybit.weight.activation import Product, activation_rule
from anybit.weight.layout import Layout, ModuleInfo

if TYPE_CHECKING:
    from torch import Tensor

    from anybit.weight import Weight

RULE = "fbgemm_fp8"
EXPERT = re.compile(r"\.experts\.\d+\.")
BOUND = "input_scale_ub"  # older files carry it; the configuration has it too


@dataclass(frozen=True)
class FbgemmLayout(ScaledFloatLayout):
    """E4M3 codes and a float scale for each row; experts lie input first, with a scale for each column."""

    block: tuple[int, int] = ROW

    def scales(self, largest: Tensor) -> minifloat.Scales:
        """f = 448 / max, multiplied by; 1 / f is stored."""
        factor = TOP / largest.clamp(min=SMALLEST)
        return minifloat.Scales(1.0 / factor, factor=factor)


@activation_rule(RULE)
def fbgemm_fp8(x: Tensor, weight: Weight, bias: Tensor | None, product: Product) -> Tensor:
    """One scale for each token, from a largest magnitude bounded from above; the bias is added to the rounded product."""
    assert weight.activation is not None
    numbers = x.to(torch.float32)
    largest = numbers.abs().amax(1, keepdim=True).clamp(min=SMALLEST, max=weight.activation.limit)
    factor = TOP / largest
    y = (product(minifloat.nearest(numbers * factor, "e4m3")) * (1.0 / factor)).to(x.dtype)
    return y if bias is None else (y + bias.to(torch.float32)).to(x.dtype)


def layout_of(module: ModuleInfo, stored: Mapping[str, Any], bound: float) -> Layout | None:
    """The layout of stored tensors; None for a dense weight."""
    own, scale_name = ("", "_scale") if module.kind == "experts" else ("weight", "weight_scale")
    info, scale = stored.get(own), stored.get(scale_name)
    if info is None or info.dtype != "float8_e4m3fn":
        return None
    if scale is None:
        raise missing(module, scale_name, f"{info.name!r} is {info.dtype} and has no meaning without it")
    dtype = scale.dtype if scale.dtype in FLOATS else FLOATS[0]
    if module.kind != "experts":
        if tuple(scale.shape) != (module.shape[0], 1):
            raise contradiction(module, stored, (own, scale_name), "E4M3 rows (a scale [out, 1])")
        unused: tuple[Spec, ...] = ((BOUND, "float32", (1,)),) if BOUND in stored else ()
        return FbgemmLayout(module.shape, module.dtype, scale_dtype=dtype, inputs=_inputs(bound), unused=unused)
    experts, rows, _ = module.shape
    form = _form(module)
    if tuple(scale.shape) != ((experts, rows, 1) if form == "turned" else (experts, 1, rows)):
        raise contradiction(
            module, stored, (own, scale_name), "E4M3 experts [experts, in, out] (a scale for each output)"
        )
    return _experts(module, bound, dtype)


def layout_for(module: ModuleInfo, bound: float) -> Layout:
    """The layout a dense module gets."""
    if module.kind != "experts":
        return FbgemmLayout(module.shape, module.dtype, inputs=_inputs(bound))
    return _experts(module, bound)


def _form(module: ModuleInfo) -> str:
    """The peer's two stacks keep their scales along different axes."""
    return "turned" if module.name.endswith("down_proj") else "grid"


def _experts(module: ModuleInfo, bound: float, dtype: str = "float32") -> Layout:
    return FbgemmLayout(
        module.shape, module.dtype, block=(0, 1), weight_name="", scale_name="_scale", scale_dtype=dtype,
        scale_form=_form(module), inputs=_inputs(bound), swapped=True,
    )  # fmt: skip


def _inputs(bound: float) -> Inputs:
    return Inputs(RULE, limit=float(bound))


def stays_dense(module: ModuleInfo) -> str | None:
    """Why a module has no form in this format, or None."""
    if module.kind == "experts" and not module.class_name.startswith("Llama4"):
        return f"FBGEMM FP8 has a form for the experts of Llama 4, not for {module.class_name}"
    if module.kind in ("embedding", "conv1d"):
        return f"FBGEMM FP8 quantizes linear layers, not {module.class_name}"
    if EXPERT.search(module.name):
        return "FBGEMM FP8 has no form for experts that are stored one by one"
    return None
