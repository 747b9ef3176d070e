"""Against transformers' own code for FP8, MXFP8 and MXFP4, on the CPU: what it quantizes, what it makes of stored weights.

Run it with transformers 5.23: python -m pytest -m interop tests/interop/test_float_methods.py
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import anybit
from anybit import algorithms
from anybit.methods._fp8_layouts import Fp8Layout
from anybit.methods.fp8 import FineGrainedFP8Config
from anybit.methods.mxfp4 import Mxfp4Config

transformers = pytest.importorskip("transformers")
finegrained = pytest.importorskip("transformers.integrations.finegrained_fp8")
pytestmark = pytest.mark.interop

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("powers", [False, True])
@pytest.mark.parametrize("block", [(128, 128), (1, 32), (64, 32)])
@pytest.mark.parametrize("size", [1.0, 1e-12, 1e8])
def test_fp8_codes_and_scales(block: tuple[int, int], powers: bool, size: float) -> None:
    dense = torch.randn(384, 512, generator=torch.Generator().manual_seed(0)) * size
    dense[:128, :128] = 0
    dense[128:256, :] *= torch.exp2(torch.randint(-20, 20, (128, 1)).float())
    dense = dense.to(torch.bfloat16)
    config = SimpleNamespace(weight_block_size=block, scale_fmt="ue8m0" if powers else "float")
    theirs = finegrained.Fp8Quantize(SimpleNamespace(quantization_config=config)).convert({"a.weight": dense})
    layout = Fp8Layout((384, 512), block=block, scale_dtype="float8_e8m0fnu" if powers else "float32", powers=powers)
    weight = algorithms.get("minifloat")(dense, layout.scheme(), **layout.algorithm_options())
    ours = layout.encode(weight)
    for own, name in (("weight", "a.weight"), ("weight_scale_inv", "a.weight_scale_inv")):
        assert ours[own].dtype == theirs[name].dtype
        assert torch.equal(ours[own].view(torch.uint8), theirs[name].view(torch.uint8)), own


def dense_by_transformers(folder: Path) -> dict[str, torch.Tensor]:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return dict(model.state_dict())


@pytest.mark.parametrize(
    "golden",
    ["fp8/qwen3moe_fp4_experts_scale_name", "mxfp8/u8_scales", "mxfp4/gptoss"],
    ids=lambda name: name.split("/")[0],
)
def test_goldens_become_the_same_dense_weights(golden: str) -> None:
    theirs = dense_by_transformers(GOLDEN / golden)
    ours = anybit.load(GOLDEN / golden, dtype=torch.bfloat16, dequantize=True).state_dict()
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize(
    ("source", "config"),
    [
        ("fp8/qwen3moe_fp4_experts_scale_name", FineGrainedFP8Config(weight_block_size=[64, 64])),
        ("fp8/qwen3moe_fp4_experts_scale_name", FineGrainedFP8Config(scale_fmt="ue8m0")),
        ("fp8/qwen3moe_fp4_experts_scale_name", FineGrainedFP8Config(weight_block_size=None)),
        (
            "fp8/qwen3moe_fp4_experts_scale_name",
            FineGrainedFP8Config(quant_method="mxfp8", weight_block_size=[1, 32], scale_fmt="ue8m0"),
        ),
        ("mxfp4/gptoss", Mxfp4Config()),
    ],
)
def test_transformers_reads_what_anybit_makes(source: str, config: Any, tmp_path: Path) -> None:
    anybit.dequantize(GOLDEN / source, tmp_path / "dense")
    anybit.quantize(tmp_path / "dense", tmp_path / "packed", config)
    theirs = dense_by_transformers(tmp_path / "packed")
    ours = anybit.load(tmp_path / "packed", dtype=torch.bfloat16, dequantize=True).state_dict()
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
