"""A sample of docs/conversions.md, file to file: what a reader of the written checkpoint gets are the source's values."""

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import anybit
from anybit.cli.schemes import from_scheme, schemes

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"


def values(folder: Path) -> dict[str, torch.Tensor]:
    model: Any = anybit.load(folder, dtype=torch.float32)
    return {
        name: module.dequantize(torch.float32)
        for name, module in model.named_modules()
        if hasattr(module, "quantized_weight")
    }


@pytest.mark.parametrize(
    ("source", "scheme", "kind", "most"),
    [
        ("awq/w4_g128_zp_gemm", "auto-round-4bit-g32", "exact", 0.0),
        ("awq/w4_g128_zp_gemm", "ct-w4a16-asym", "exact", 0.0),
        ("awq/w4_g128_zp_gemm", "torchao-intx4-g32", "exact", 0.0),
        ("awq/w4_g128_zp_gemm", "metal-4bit-g32", "rescaled", 2e-3),
        ("awq/w4_g128_zp_gemm", "quanto-int4", "rescaled", 2e-3),
    ],
)
def test_values_and_stated_errors_are_what_a_reader_gets(
    source: str, scheme: str, kind: str, most: float, tmp_path: Path
) -> None:
    report = anybit.convert(GOLDEN / source, tmp_path / "out", from_scheme(scheme))
    assert set(report.counts) == {kind}, report.counts
    before, after = values(GOLDEN / source), values(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, wanted in before.items():
        error = float((after[name] - wanted).norm() / wanted.norm())
        assert error <= most, name
    assert report.largest_error <= most


def test_the_page_covers_every_method_that_can_be_written() -> None:
    page = (ROOT / "docs" / "conversions.md").read_text(encoding="utf-8")
    head = next(line for line in page.splitlines() if line.startswith("| from"))
    columns = {cell.strip() for cell in head.split("|")[2:-1]}
    assert columns == {str(cls.method) for cls, _ in schemes().values()}


def test_no_pair_is_called_rescaled_beyond_what_rounding_explains() -> None:
    page = (ROOT / "docs" / "conversions.md").read_text(encoding="utf-8")
    errors = [float(found) for found in re.findall(r"rescaled(?:\\\*)? ([0-9.e+-]+) \|", page)]
    assert len(errors) > 20
    assert max(errors) <= 2**-7  # what rounding a scale and an offset to bfloat16 can do


def test_fp8_mx_and_nv_families_are_exact_among_themselves() -> None:
    """One format under several names: the same codes and scales, as each package's own files show."""
    page = (ROOT / "docs" / "conversions.md").read_text(encoding="utf-8")
    head, *rows = [line for line in page.partition("## Everything")[0].splitlines() if line.startswith("| ")]
    columns = [cell.strip() for cell in head.split("|")[2:-1]]
    cells = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]] for row in rows}
    for source, targets in {
        "fp8": ("fbgemm_fp8", "modelopt", "quark", "compressed-tensors"),
        "compressed-tensors": ("fbgemm_fp8", "fouroversix", "modelopt", "nvfp4", "quark"),
        "nvfp4": ("modelopt", "compressed-tensors", "fouroversix"),
        "quark": ("compressed-tensors", "fouroversix", "metal", "modelopt", "fbgemm_fp8"),
        "mxfp8": ("fp8", "modelopt", "compressed-tensors"),
        "mxfp4": ("gguf", "fp8"),
    }.items():
        for target in targets:
            assert cells[source][columns.index(target)] in ("exact", r"exact\*"), (source, target)


def test_the_page_is_what_its_script_measures() -> None:
    """One file again: AWQ's first in every scheme; a cell of the page is the best of several files."""
    spec = importlib.util.spec_from_file_location("conversions", ROOT / "docs" / "conversions.py")
    assert spec is not None and spec.loader is not None  # noqa: PT018
    script: Any = importlib.util.module_from_spec(spec)
    sys.modules["conversions"] = script  # dataclasses look their module up
    spec.loader.exec_module(script)
    _, source = next(iter(script.sources("awq")))
    found = dict(script.measure(source))
    page = (ROOT / "docs" / "conversions.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith("| awq |"))
    head = next(line for line in page.splitlines() if line.startswith("| from"))
    cells = dict(
        zip([c.strip() for c in head.split("|")[2:-1]], [c.strip() for c in row.split("|")[2:-1]], strict=True)
    )
    for target, item in found.items():
        if item.kind == "exact":
            assert cells[target] == "exact", target
    assert sum(item.kind == "exact" for item in found.values()) >= 5
