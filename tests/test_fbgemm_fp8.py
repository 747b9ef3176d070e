"""FBGEMM FP8 where the laws cannot see it: the bound on input scales, older files, creation, what stays dense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import anybit
from anybit import algorithms
from anybit.containers.info import TensorInfo
from anybit.errors import MissingTensor, ShapeMismatch
from anybit.kernels.reference import multiply
from anybit.methods import _fbgemm_layouts as layouts
from anybit.methods.fbgemm_fp8 import FbgemmFp8Config
from anybit.weight import ModuleInfo, Weight

GOLDEN = Path(__file__).parent / "golden" / "fbgemm_fp8" / "llama4_experts"
E4M3 = torch.float8_e4m3fn


def made(layout: Any, dense: torch.Tensor) -> Weight:
    weight: Weight = algorithms.get(layout.algorithm)(dense, layout.scheme(), **layout.algorithm_options())
    return weight


def quantize_fp8_row(a: torch.Tensor, bound: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """fbgemm_gpu's fp8_gemm.py, the part that runs without a GPU, with the clamp its Triton code has."""
    largest = a.abs().max(dim=-1)[0].float().clamp(min=1e-12, max=bound)
    scale = 448.0 / largest
    return (a.float() * scale[:, None]).clamp(-448, 448).to(E4M3), 1.0 / scale


def linear(rows: int, columns: int) -> ModuleInfo:
    return ModuleInfo("model.layers.0.mlp.up_proj", "linear", (rows, columns), "bfloat16")


def test_codes_and_scales_are_those_of_the_peer() -> None:
    dense = torch.randn(33, 70, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    dense[5] = 0
    layout = layouts.layout_for(linear(33, 70), 1200.0)
    found = layout.encode(made(layout, dense))
    codes, scales = quantize_fp8_row(dense)
    assert torch.equal(found["weight"].view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(found["weight_scale"], scales[:, None])


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_experts_have_a_scale_for_each_output(name: str) -> None:
    dense = torch.randn(2, 48, 20, generator=torch.Generator().manual_seed(1))
    module = ModuleInfo(f"model.layers.0.feed_forward.experts.{name}", "experts", (2, 48, 20), "bfloat16")
    layout = layouts.layout_for(module, 1200.0)
    found = layout.encode(made(layout, dense))
    assert found[""].shape == (2, 20, 48)
    assert found["_scale"].shape == ((2, 48, 1) if name == "down_proj" else (2, 1, 48))
    for expert in range(2):
        codes, scales = quantize_fp8_row(dense[expert])
        assert torch.equal(found[""][expert].T.contiguous().view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(found["_scale"][expert].reshape(-1), scales)


@pytest.mark.parametrize("bound", [1200.0, 2.0])
def test_inputs_beyond_the_bound_are_clipped_to_it(bound: float) -> None:
    layout = layouts.layout_for(linear(16, 64), bound)
    weight = made(layout, torch.randn(16, 64))
    x = torch.randn(4, 64).to(torch.bfloat16)
    x[0, 3] = 5000.0
    codes, scales = quantize_fp8_row(x, bound)
    wanted = (codes.double() * scales[:, None].double()) @ weight.to_dense(torch.float32).double().T
    assert (codes.float() * scales[:, None]).abs().max() <= bound * 1.0001
    assert (multiply(weight, x, None) - wanted).abs().max() < 2**-7 * wanted.abs().max()


def test_the_bound_can_be_changed_at_load() -> None:
    model: Any = anybit.load(GOLDEN, FbgemmFp8Config(activation_scale_ub=3.0))
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.quantized_weight.activation.limit == 3.0


def test_the_bound_in_older_files_is_kept_and_not_used() -> None:
    dense = layouts.layout_for(linear(8, 32), 1200.0)
    tensors = {**dense.encode(made(dense, torch.randn(8, 32))), "input_scale_ub": torch.tensor([7.0])}
    infos = {
        name: TensorInfo(name, str(tensor.dtype)[6:], tuple(tensor.shape), tensor.nbytes, "f")
        for name, tensor in tensors.items()
    }
    layout = layouts.layout_of(linear(8, 32), infos, 1200.0)
    assert layout is not None
    weight = layout.decode(tensors)
    assert weight.activation is not None
    assert weight.activation.limit == 1200.0
    assert torch.equal(layout.encode(weight)["input_scale_ub"], tensors["input_scale_ub"])


@pytest.mark.parametrize("shape", [(8,), (1, 8), (1, 1)])
def test_other_scales_are_refused(shape: tuple[int, ...]) -> None:
    infos = {
        "weight": TensorInfo("a.weight", "float8_e4m3fn", (8, 32), 256, "f"),
        "weight_scale": TensorInfo("a.weight_scale", "float32", shape, 32, "f"),
    }
    with pytest.raises(ShapeMismatch, match=r"a\.weight_scale"):
        layouts.layout_of(linear(8, 32), infos, 1200.0)
    with pytest.raises(MissingTensor, match="weight_scale"):
        layouts.layout_of(linear(8, 32), {"weight": infos["weight"]}, 1200.0)


def test_a_dense_llama_4_is_quantized_as_transformers_does(tmp_path: Path) -> None:
    anybit.dequantize(GOLDEN, tmp_path / "dense")
    config = FbgemmFp8Config(modules_to_not_convert=["lm_head", "router"])
    plan = anybit.quantize(tmp_path / "dense", tmp_path / "packed", config)
    dense = {entry.slot.module: entry.reason for entry in plan.entries if entry.action == "dense"}
    assert set(dense) == {"model.embed_tokens", "lm_head"}  # the router is no layer that could be packed
    assert anybit.load(tmp_path / "packed").anybit_plan.coverage == plan.coverage


def test_experts_of_other_models_stay_dense_and_say_why() -> None:
    module = ModuleInfo("m.experts.gate_up_proj", "experts", (2, 8, 8), "bfloat16", class_name="Qwen3MoeExperts")
    assert "Llama 4" in str(layouts.stays_dense(module))
    assert "one by one" in str(layouts.stays_dense(ModuleInfo("m.experts.0.w1", "linear", (8, 8), "bfloat16")))
