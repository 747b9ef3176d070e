"""Triton kernels: the laws of triton_laws.py in a process of their own, and whether they compile for cards nobody has here."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triton_laws import WEIGHTS

from anybit.kernels import get
from anybit.weight import Weight

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks" / "gpu"))
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed; it has builds for Linux only"
)


def run_laws(wanted: str) -> None:
    """On the GPU, or else in the interpreter, for which Triton wants to be told before it is imported."""
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    laws = Path(__file__).with_name("triton_laws.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(laws), "-k", wanted],
        env={**os.environ, **interpreted}, capture_output=True, text=True, timeout=1800, cwd=laws.parent.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_laws() -> None:
    run_laws("not vendors and not pieces and not experts")


@pytest.mark.slow
@pytest.mark.parametrize("wanted", ["vendors", "pieces or experts"])
def test_further_laws(wanted: str) -> None:
    run_laws(wanted)


SHARED = {"86": 99 << 10, "90": 227 << 10, "gfx942": 64 << 10}  # bytes a block may have
# instructions for a weight in the inner loop, one row of input: 30e12 of them a second on an H200 that copies 4.3e12 bytes
PER_WEIGHT = {"int4 g128": 3.5, "int4 g32": 4.2, "int8 rows": 3.5, "fp8 rows": 5.2, "int2 g64": 3.8}


def check_compiled(name: str, target: str) -> None:
    """Every tile of the table compiles, with what a processor of the target has."""
    import compiling

    found = compiling.compile_family(compiling.families()[name](), target)
    assert len(found) >= 3
    for one in found:
        assert one["shared"] <= SHARED[target], f"{name}: {one}"
        assert one["spilled"] <= 64, f"{name}: {one}"
    if target == "90" and name in PER_WEIGHT:
        assert found[0]["form"] == "planes"
        assert 0 < found[0]["per_weight"] <= PER_WEIGHT[name], f"{name}: {found[0]}"


@pytest.mark.parametrize(("name", "target"), [("int4 g128", "90"), ("int4 g128", "86"), ("int8 rows", "gfx942")])
def test_compiles_for_cards(name: str, target: str) -> None:
    check_compiled(name, target)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["90", "86"])
@pytest.mark.parametrize(
    "name", ["int4 g32", "nf4", "mxfp4", "q4_K", "q6_K", "int8 rows", "fp8 rows", "fp8 blocks", "int1 g128", "int2 g64",
             "int3 g128", "hqq (bfloat16 arithmetic)", "aqlm 1x16", "iq2_xxs"],
)  # fmt: skip
def test_every_family_compiles(name: str, target: str) -> None:
    check_compiled(name, target)


def test_where_it_does_not_run_it_says_why() -> None:
    kernel = get("triton")
    weight = Weight(WEIGHTS["NF4"]())
    if not torch.cuda.is_available():
        assert "no GPU" in str(kernel.unavailable())
        assert "not on cpu" in str(kernel.refuses(weight, torch.device("cpu")))
    assert "not on mps" in str(kernel.refuses(weight, torch.device("mps")))
