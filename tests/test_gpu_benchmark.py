"""The script that measures on a lent card, from end to end at a tiny size: minutes there are not lost to a slip of the pen."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu" / "products.py"
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_measures_checks_and_goes_on(tmp_path: Path) -> None:
    shapes = ["--shapes", "16x256,9x16x256", "--batches", "1,2", "--only", "int4, groups", "-o", str(tmp_path)]
    run(*shapes)
    rows = json.loads((tmp_path / "products.json").read_text())["products"]
    assert [(row["shape"], row["batch"]) for row in rows] == [
        ("16x256", 1),
        ("16x256", 2),
        ("9x16x256", 1),
        ("9x16x256", 2),
    ]
    assert "| int4, groups of 128" in (tmp_path / "products.md").read_text()
    assert run(*shapes) == ""  # all of it was done
    assert "agrees with the reference" in run(*shapes, "--check-only")
