"""Triton kernels: the laws of triton_laws.py in a process of their own, and whether they compile for cards nobody has here."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_laws import WEIGHTS

from anybit.kernels import get
from anybit.weight import Weight

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed; it has builds for Linux only"
)


def test_laws() -> None:
    """On the GPU, or else in the interpreter, for which Triton wants to be told before it is imported."""
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    laws = Path(__file__).with_name("triton_laws.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(laws)],
        env={**os.environ, **interpreted}, capture_output=True, text=True, timeout=900, cwd=laws.parent.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("name", ["int4, zeros", "3 bits", "NF4", "IQ2_XXS"])
def test_compiles_for_cards(name: str) -> None:
    """With every tile of the table, within the shared memory of the smallest card that Triton compiles for (sm_86: 99 KB)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from anybit.kernels._programs import form_of
    from anybit.kernels.triton import grid as functions
    from anybit.kernels.triton import tuning

    weight = Weight(WEIGHTS[name]())
    kernel: Any = get("triton")
    spec, tensors = kernel.prepare(weight)
    leaf: Any = form_of(kernel, spec).program
    function = functions._product_kernel
    sizes = {"count", "X_ROW", "X_COLUMN", "Y_PART", "Y_ROW"}
    done = 0
    for entry in tuning.entries():
        if entry["codebook"] != (leaf.constants["BOOKS"] > 0) or leaf.bits not in (entry["bits"] or (leaf.bits,)):
            continue
        tile = tuning.Tile(entry["inputs"], entry["rows"], entry["runs"], 1, entry["warps"], entry["stages"])
        x = torch.empty(tile.inputs, weight.shape[1], dtype=torch.bfloat16)
        y = torch.empty(tile.inputs, weight.shape[0], dtype=torch.bfloat16)
        found = leaf.arguments(x, tensors, None, y, tile, 1, None)
        pointers = {
            torch.float32: "*fp32",
            torch.bfloat16: "*bf16",
            torch.float16: "*fp16",
            torch.uint8: "*u8",
            torch.int8: "*i8",
        }
        types = {
            key: pointers[value.dtype] if isinstance(value, Tensor) else "i32" if key in sizes else "constexpr"
            for key, value in found.items()
        }
        order = {key: types[key] for key in function.arg_names}
        constants = {key: found[key] for key in order if order[key] == "constexpr"}
        compiled = triton.compile(
            ASTSource(fn=function, signature=order, constexprs=constants), target=GPUTarget("cuda", 86, 32),
            options={"num_warps": tile.warps, "num_stages": tile.stages},
        )  # fmt: skip
        assert "ptx" in compiled.asm
        assert compiled.metadata.shared <= 99 << 10, f"{entry}: {compiled.metadata.shared} bytes of shared memory"
        done += 1
    assert done >= 3


def test_where_it_does_not_run_it_says_why() -> None:
    kernel = get("triton")
    weight = Weight(WEIGHTS["NF4"]())
    if not torch.cuda.is_available():
        assert "no GPU" in str(kernel.unavailable())
        assert "not on cpu" in str(kernel.refuses(weight, torch.device("cpu")))
    assert "not on mps" in str(kernel.refuses(weight, torch.device("mps")))
