"""The example plugin, as a user installs it: found by its entry point, held to the laws from outside of the package."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PLUGIN = Path(__file__).parent.parent / "examples" / "plugin"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """What `pip install` leaves behind: the module on the path, and its metadata."""
    info = tmp_path / "anybit_toy8-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: anybit-toy8\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[anybit.methods]\ntoy8 = anybit_toy8\n")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(PLUGIN / "src")])}


def test_the_plugin_passes_the_laws(environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(PLUGIN), str(PLUGIN / "tests")],
        env=environment, capture_output=True, text=True, timeout=600, cwd=PLUGIN,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout, done.stdout


def test_it_is_imported_only_after_a_miss(environment: dict[str, str]) -> None:
    code = """
import sys
from anybit.quantizers import AutoHfQuantizer
AutoHfQuantizer.from_config({"quant_method": "gptq", "bits": 4})
assert "anybit_toy8" not in sys.modules
print(type(AutoHfQuantizer.from_config({"quant_method": "toy8"})).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "Toy8HfQuantizer", done.stderr
