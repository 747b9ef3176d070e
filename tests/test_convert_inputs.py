"""What conversions keep beside codes: static scales of inputs, scales of LLM.int8, codes behind pseudo-quantized floats."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import anybit
from anybit.cli.schemes import from_scheme
from anybit.errors import NotRepresentable

GOLDEN = Path(__file__).parent / "golden"
NAME = "model.layers.0.mlp.down_proj"


def converted(source: str, folder: Path, scheme: str, **options: Any) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """(report, stored before, stored after)."""
    report = anybit.convert(GOLDEN / source, folder, from_scheme(scheme), **options)
    return report, load_file(GOLDEN / source / "model.safetensors"), load_file(folder / "model.safetensors")


def test_modelopts_input_scale_is_the_inverse_of_compressed_tensors(tmp_path: Path) -> None:
    """The largest input becomes 6 * 448: ModelOpt stores largest / 2688, compressed-tensors 2688 / largest."""
    report, before, after = converted("modelopt/nvfp4", tmp_path / "ct", "ct-nvfp4")
    assert set(report.counts) <= {"exact", "rescaled"}
    assert report.largest_error < 1e-6
    given = before[f"{NAME}.input_scale"].double()
    assert float(given) not in (0.0, 1.0)
    found = after[f"{NAME}.input_global_scale"].double()
    assert torch.allclose(found * given, torch.ones(()).double(), rtol=1e-6)
    _, _, back = converted(str(tmp_path / "ct"), tmp_path / "back", "modelopt-nvfp4")
    assert torch.allclose(back[f"{NAME}.input_scale"].double(), given, rtol=1e-6)


@pytest.mark.parametrize(("source", "scheme"), [("quark/fp8-kvcache", "modelopt-fp8"), ("quark/fp8-kvcache", "ct-fp8")])
def test_static_fp8_scales_are_the_same_number(source: str, scheme: str, tmp_path: Path) -> None:
    report, before, after = converted(source, tmp_path / "out", scheme)
    assert set(report.counts) == {"exact"}
    wanted = before[f"{NAME}.input_scale"].float().reshape(-1)
    assert torch.allclose(after[f"{NAME}.input_scale"].float().reshape(-1), wanted, rtol=1e-6)


def test_scales_of_inputs_that_nobody_measured_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(NotRepresentable, match=r"stores scales of its inputs .*which the source .* does not have"):
        converted("nvfp4/modelopt_qwen3moe", tmp_path / "out", "modelopt-nvfp4")


@pytest.mark.parametrize(("source", "scale"), [("eetq/sm80", "weight_scales"), ("quark/int8-tensor", "weight_scale")])
def test_llm_int8_takes_rows_of_integers_as_they_are(source: str, scale: str, tmp_path: Path) -> None:
    """SCB is the largest magnitude of a row, 127 steps. Inputs become 8 bits too, so it must be allowed."""
    with pytest.raises(NotRepresentable, match=r"'llm_int8'.*allow_requantize"):
        converted(source, tmp_path / "out", "int8")
    report, before, after = converted(source, tmp_path / "out", "int8", allow_requantize=True)
    assert set(report.counts) <= {"exact", "rescaled"}
    assert report.largest_error < 1e-6
    wanted = before[f"{NAME}.{scale}"].float().reshape(-1) * 127
    assert torch.allclose(after[f"{NAME}.SCB"], wanted.expand_as(after[f"{NAME}.SCB"]), rtol=1e-6)
    assert after[f"{NAME}.weight"].dtype == torch.int8


def test_codes_behind_fp_quants_floats_are_found_again(tmp_path: Path) -> None:
    report, before, after = converted("fp_quant/nvfp4_pseudo", tmp_path / "out", "fp-quant-nvfp4")
    assert set(report.counts) == {"rescaled"}
    assert report.largest_error < 2**-9  # what rounding the floats to bfloat16 did
    assert after[f"{NAME}.qweight"].dtype == torch.uint8
    assert torch.equal(before[f"{NAME}.act_global_scale"], after[f"{NAME}.act_global_scale"])
