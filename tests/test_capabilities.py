"""The table of methods is what the conformance suite measured, and the README shows it."""

import importlib.util
import json
import re
from pathlib import Path

from anybit.quantizers.registry import config_class, method_names, quantizer_class
from anybit.quantizers.summary import MEASURED, methods

ROOT = Path(__file__).parent.parent


def test_the_readme_shows_the_measured_table() -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert generate.with_table(text) == text, "make capabilities renews it"
    assert text.count("| `") == len(method_names())


def test_every_method_that_loads_was_measured_by_its_conformance_test() -> None:
    measured = json.loads(MEASURED.read_text())
    tested = {
        name
        for file in (ROOT / "tests").glob("test_conformance_*.py")
        for name in re.findall(r'^    method = "([^"]+)"', file.read_text(), re.M)
    }
    assert set(measured) == tested
    for name in method_names():
        config = config_class(name)
        assert config is not None
        known = {name, config.method} & set(measured)
        assert quantizer_class(name).layouts_available == bool(known), name


def test_what_loads_reads_runs_saves_and_trains() -> None:
    for info in methods():
        if info.loads:
            assert info.reads, info.name
            assert info.runs, info.name
            assert info.saves, info.name
            assert info.trains, info.name
            assert info.checkpoints > 0, info.name
        else:
            claimed = [info.reads, info.runs, info.saves, info.creates, info.trains]
            assert not any(claimed), info.name
