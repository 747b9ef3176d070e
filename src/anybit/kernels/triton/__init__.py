"""Triton kernels for GPUs: a weight tree becomes a program (programs.py) over two Triton functions (grid.py).

A few rows of input are multiplied straight from the packed codes; many rows (prefill) meet a decoded piece of the weight that
stays in the card's cache, in torch's own matmul. The dense weight never exists. Sums are float32; a bfloat16 or float16 input
of more than one row meets weights of its own dtype, as in a dense layer.

TRITON_INTERPRET=1 runs the same code on the CPU, for tests.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from anybit.kernels._grids import Refused, Workspace, has_group_index
from anybit.kernels._programs import Program, ProgramKernel, form_of
from anybit.kernels.triton import planes_form, programs
from anybit.weight import Weight, integer_products
from anybit.weight.nodes import Node


def interpreted() -> bool:
    """Whether Triton runs its kernels on the CPU, one operation at a time."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


class TritonGrid(ProgramKernel):
    """Grids of integer codes, of tables and of 8-bit floats, straight from the packed bytes, on a GPU."""

    name = "triton"
    rank = 60
    nested = True
    description = (
        "GPU code for grids of 1- to 8-bit codes: integers, tables, FP8, stacks of experts, any activation rule"
    )

    def unavailable(self) -> str | None:
        return _unavailable()

    def concerns(self, device: torch.device) -> bool:
        return device.type in (("cpu", "meta") if interpreted() else ("cuda", "xpu"))

    def refuses(self, weight: Weight, device: torch.device) -> str | None:
        if not self.concerns(device):
            return f"runs on GPUs, not on {device.type}"
        try:
            self.scheme_program(weight)
        except Refused as reason:
            return str(reason)
        return None

    def leaf_program(self, tree: Node, space: Workspace) -> dict[str, Any]:
        return programs.leaf_program(tree, space)

    def leaf(self, kind: str, content: Any) -> Program:
        return programs.leaf(kind, content)

    def prepare(self, weight: Weight) -> tuple[str, list[Tensor]]:
        home = weight.device
        if home.type != "meta" and has_group_index(weight.tree):  # columns are moved on the host, once
            weight = weight.to("cpu")
        if weight.activation is not None and home.type != "meta":
            integer_products.probe(home)
        spec, tensors = super().prepare(weight)
        return spec, [tensor.to(home) for tensor in tensors]

    def restore(self, spec: str, tensors: list[Tensor]) -> Weight:
        tensors = list(tensors)
        for form in programs.planes_of(spec):
            tensors[form["slot"]] = planes_form.restored_codes(form, tensors)
        return super().restore(spec, tensors)

    def seen_by_rules(self, spec: str, tensors: list[Tensor]) -> Weight:
        tensors = list(tensors)
        for form in programs.planes_of(spec):  # rules read scales, and 8-bit codes, which are no planes then
            tensors[form["slot"]] = torch.empty(form["shape"], dtype=getattr(torch, form["dtype"]), device="meta")
        return super().restore(spec, tensors)

    def take_rows(self, index: Tensor, spec: str, tensors: list[Tensor]) -> Tensor:
        program = form_of(self, spec).program
        if isinstance(program, programs.PlanesLeaf):
            return program.take_rows(index, tensors)
        return super().take_rows(index, spec, tensors)

    def experts(self, x: Tensor, ends: Tensor, spec: str, tensors: list[Tensor]) -> Tensor:
        form = form_of(self, spec)
        if form.rule is not None or not isinstance(form.program, programs.Leaf):
            return super().experts(x, ends, spec, tensors)
        return form.program.experts(x, ends, tensors)


@functools.lru_cache(maxsize=1)
def _unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; it comes with torch's builds for GPUs"
    if not interpreted() and not (torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available())):
        return "there is no GPU that Triton knows (CUDA, ROCm or XPU)"
    return None


KERNELS = [TritonGrid()]
