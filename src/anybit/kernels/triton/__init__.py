"""Triton kernels for GPUs: a weight tree becomes a program (programs.py) over two Triton functions (grid.py).

A few rows of input are multiplied straight from the packed codes; many rows (prefill) meet a decoded piece of the weight that
stays in the card's cache, in torch's own matmul. The dense weight never exists. Sums are float32; a bfloat16 or float16 input
of more than one row meets weights of its own dtype, as in a dense layer.

TRITON_INTERPRET=1 runs the same code on the CPU, for tests.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from anybit.kernels._grids import Refused, Workspace, has_group_index, restored
from anybit.kernels._programs import Program, program_of
from anybit.kernels.base import Kernel
from anybit.kernels.triton.programs import Leaf, build, leaf_program, plain
from anybit.weight import Weight
from anybit.weight.activation import RULES


def interpreted() -> bool:
    """Whether Triton runs its kernels on the CPU, one operation at a time."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


class TritonGrid(Kernel):
    """Grids of integer codes, of tables and of 8-bit floats, straight from the packed bytes, on a GPU."""

    name = "triton"
    rank = 60
    description = (
        "GPU code for grids of 1- to 8-bit codes: integers, tables, FP8, stacks of experts, any activation rule"
    )

    def unavailable(self) -> str | None:
        return _unavailable()

    def refuses(self, weight: Weight, device: torch.device) -> str | None:
        if device.type not in (("cpu", "meta") if interpreted() else ("cuda", "xpu")):
            return f"runs on GPUs, not on {device.type}"
        if weight.activation is not None and weight.activation.rule not in RULES:
            return f"activation rule {weight.activation.rule!r} is not registered"
        scheme = weight.map(_on_meta)
        try:
            program_of(scheme.tree, Workspace(scheme), leaf_program)
        except Refused as reason:
            return str(reason)
        return None

    def prepare(self, weight: Weight) -> tuple[str, list[Tensor]]:
        home = weight.device
        if home.type != "meta" and has_group_index(weight.tree):  # columns are moved on the host, once
            weight = weight.to("cpu")
        space = Workspace(weight)
        program = program_of(weight.tree, space, leaf_program)
        spec = {"structure": weight.structure(), "own": space.own, "moved": space.moved, "program": program}
        return json.dumps(spec, default=plain, separators=(",", ":")), [t.to(home) for t in space.tensors]

    def restore(self, spec: str, tensors: list[Tensor]) -> Weight:
        form = _form(spec)
        return restored(form.structure, tensors[: form.own], form.moved, tensors)

    def linear(self, x: Tensor, spec: str, tensors: list[Tensor], bias: Tensor | None) -> Tensor:
        form = _form(spec)
        if form.rule is not None:

            def product(rows: Tensor) -> Tensor:
                return form.program.linear(rows, tensors, None, torch.float32)

            return RULES[form.rule](x, self.restore(spec, tensors), bias, product)
        return form.program.linear(x, tensors, bias, x.dtype)

    def input_gradient(self, gradient: Tensor, spec: str, tensors: list[Tensor]) -> Tensor:
        program = _form(spec).program
        total = torch.zeros(gradient.shape[0], program.columns, dtype=torch.float32, device=gradient.device)
        program.add_gradient(gradient, tensors, total)
        return total.to(gradient.dtype)

    def experts(self, x: Tensor, ends: Tensor, spec: str, tensors: list[Tensor]) -> Tensor:
        form = _form(spec)
        if form.rule is not None or not isinstance(form.program, Leaf):
            return super().experts(x, ends, spec, tensors)
        return form.program.experts(x, ends, tensors)


def _on_meta(tensor: Tensor) -> Tensor:
    return tensor if tensor.device.type == "meta" else tensor.to("meta")


@functools.lru_cache(maxsize=1)
def _unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; it comes with torch's builds for GPUs"
    if not interpreted() and not (torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available())):
        return "there is no GPU that Triton knows (CUDA, ROCm or XPU)"
    return None


@dataclass(frozen=True)
class Form:
    """A spec, read."""

    structure: str
    own: int
    moved: dict[int, list[tuple[int, int]]]
    rule: str | None
    program: Program


@functools.lru_cache(maxsize=4096)
def _form(spec: str) -> Form:
    parts = json.loads(spec)
    activation = json.loads(parts["structure"]).get("activation")
    moved = {int(slot): moves for slot, moves in parts["moved"].items()}
    return Form(parts["structure"], parts["own"], moved, activation and activation["rule"], build(parts["program"]))


KERNELS = [TritonGrid()]
