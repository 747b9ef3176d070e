"""MXFP4 where the laws cannot see it: rounding, what is left dense, folders that transformers saved on a CPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import anybit
from anybit import algorithms
from anybit.containers.info import TensorInfo
from anybit.errors import CorruptFile, MissingTensor, ShapeMismatch
from anybit.methods._mxfp4_layouts import DenseBlocksLayout, Mxfp4Layout, layout_of
from anybit.methods.mxfp4 import Mxfp4Config
from anybit.weight import ModuleInfo
from anybit.weight.levels import table

GOLDEN = Path(__file__).parent / "golden" / "mxfp4" / "gptoss"
EXPERTS = "model.layers.0.mlp.experts"


def made(dense: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes [.., out, in], scale bytes) of a dense stack."""
    layout = Mxfp4Layout(tuple(dense.shape))
    weight = algorithms.get("minifloat")(dense, layout.scheme(), **layout.algorithm_options())
    found = layout.encode(weight)
    blocks = found["_blocks"].flatten(-2)
    return torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2), found["_scales"]


def as_triton_kernels(dense: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """downcast_to_mxfp_torch of gpt-oss-triton-kernels, with thresholds in the place of its bit tricks."""
    groups = dense.to(torch.bfloat16).float().unflatten(-1, (-1, 32))
    scale = (groups.abs().amax(-1) / 6).view(torch.int32)
    bytes_ = (scale + 0x007FFFFF) >> 23
    powers = (bytes_ << 23).view(torch.float32)[..., None]
    numbers = torch.where(powers == 0, torch.zeros_like(groups), groups / powers)
    codes = sum((numbers.abs() >= edge).to(torch.uint8) for edge in (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0))
    return (codes | (torch.signbit(numbers) << 3)).flatten(-2), bytes_.to(torch.uint8)  # type: ignore[union-attr]


def test_codes_and_scales_are_those_of_the_peer() -> None:
    dense = torch.randn(2, 24, 96, generator=torch.Generator().manual_seed(3)) * 0.05
    dense[0, 0, :32] = 0
    dense[1, 1, 32:64] *= 1e-30
    dense[1, 2, :8] = torch.tensor([6, 5, 3.5, 2.5, 1.75, 1.25, 0.75, -0.25])
    codes, scales = made(dense)
    wanted, powers = as_triton_kernels(dense)
    assert torch.equal(scales, powers)
    assert torch.equal(codes, wanted)


def test_ties_go_away_from_zero_and_the_sign_of_zero_stays() -> None:
    dense = torch.zeros(1, 1, 32)
    dense[0, 0, :9] = torch.tensor([6, 5, 3.5, 2.5, 1.75, 1.25, 0.75, -0.25, -0.2])
    codes, scales = made(dense)
    assert scales.item() == 127
    assert codes[0, 0, :10].tolist() == [7, 7, 6, 5, 4, 3, 2, 9, 8, 0]


def test_an_empty_block_has_byte_0_and_codes_0() -> None:
    codes, scales = made(torch.full((1, 2, 32), -0.0))
    assert not codes.any()
    assert not scales.any()


def test_blocks_may_lie_flat() -> None:
    stored = load_file(GOLDEN / "model.safetensors")
    blocks, scales = stored[f"{EXPERTS}.down_proj_blocks"], stored[f"{EXPERTS}.down_proj_scales"]
    flat = blocks.flatten(-2)
    infos: Any = {
        "_blocks": TensorInfo("b", "uint8", tuple(flat.shape), flat.nbytes, "f"),
        "_scales": TensorInfo("s", "uint8", tuple(scales.shape), scales.nbytes, "f"),
    }
    layout = layout_of(ModuleInfo(f"{EXPERTS}.down_proj", "experts", (4, 128, 96), "bfloat16"), infos)
    assert layout is not None
    weight = layout.decode({"_blocks": flat, "_scales": scales})
    lut = table("e2m1")[torch.stack([flat & 15, flat >> 4], -1).flatten(-2).long()]
    assert torch.equal(weight.to_dense(torch.float32), lut * torch.exp2(scales.float() - 127).repeat_interleave(32, -1))
    assert layout.encode(weight)["_blocks"].shape == flat.shape


def test_only_the_experts_of_gpt_oss_are_quantized(tmp_path: Path) -> None:
    anybit.dequantize(GOLDEN, tmp_path / "dense")
    plan = anybit.quantize(tmp_path / "dense", tmp_path / "packed", Mxfp4Config())
    assert {entry.slot.module for entry in plan.entries if entry.action == "quantize"} == {
        f"{EXPERTS}.gate_up_proj",
        f"{EXPERTS}.down_proj",
    }
    # a block whose largest number is not its format's largest may get a smaller scale, but every number stays
    ours, stored = (load_file(folder / "model.safetensors") for folder in (tmp_path / "packed", GOLDEN))
    for name, shape in (("gate_up_proj", (4, 192, 128)), ("down_proj", (4, 128, 96))):
        layout = Mxfp4Layout(shape)
        before, after = (
            layout.decode({own: tensors[f"{EXPERTS}.{name}{own}"] for own in ("_blocks", "_scales")})
            for tensors in (stored, ours)
        )
        assert torch.equal(before.to_dense(), after.to_dense())
    rest = [name for name in stored if not name.endswith(("_blocks", "_scales"))]
    assert all(torch.equal(ours[name], stored[name]) for name in rest)


def test_the_list_can_leave_experts_out(tmp_path: Path) -> None:
    anybit.dequantize(GOLDEN, tmp_path / "dense")
    plan = anybit.plan(tmp_path / "dense", Mxfp4Config(modules_to_not_convert=["model.layers.0.mlp.experts"]))
    assert plan.coverage == 0
    assert any("among the modules not to convert" in entry.reason for entry in plan.entries)


def test_dense_numbers_under_packed_names_are_read_as_what_they_are(tmp_path: Path) -> None:
    """transformers initializes the experts anew when it reads what it saved on a CPU."""
    shutil.copytree(GOLDEN, tmp_path / "model")
    stored, reference = load_file(GOLDEN / "model.safetensors"), load_file(GOLDEN / "reference.safetensors")
    for name in ("gate_up_proj", "down_proj"):
        del stored[f"{EXPERTS}.{name}_scales"]
        stored[f"{EXPERTS}.{name}_blocks"] = reference[f"dense.{EXPERTS}.{name}"].to(torch.bfloat16)
    save_file(stored, tmp_path / "model" / "model.safetensors")
    config = json.loads((GOLDEN / "config.json").read_text())
    config.pop("quantization_config")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    model: Any = anybit.load(tmp_path / "model")
    assert "dense numbers under the name of packed ones" in model.anybit_plan.notes[0]
    with torch.no_grad():
        error = (model(reference["input_ids"]).logits.float() - reference["logits"]).abs().max()
    assert error < 0.1
    model.save_pretrained(tmp_path / "again")
    for name, tensor in load_file(tmp_path / "again" / "model.safetensors").items():
        assert torch.equal(tensor, stored[name]), name


def test_scales_without_blocks_are_refused() -> None:
    module = ModuleInfo(f"{EXPERTS}.down_proj", "experts", (4, 128, 96), "bfloat16")
    with pytest.raises(MissingTensor, match="down_proj_blocks"):
        layout_of(module, {"_scales": TensorInfo("s", "uint8", (4, 128, 3), 1536, "f")})


def test_groups_must_be_whole() -> None:
    module = ModuleInfo(f"{EXPERTS}.down_proj", "experts", (4, 128, 90), "bfloat16")
    with pytest.raises(ShapeMismatch, match="groups of 32"):
        layout_of(module, {"_blocks": TensorInfo("b", "uint8", (4, 128, 3, 16), 24576, "f")})


@pytest.mark.parametrize("byte", [255])
def test_the_byte_that_means_nan_is_damage(byte: int) -> None:
    layout = Mxfp4Layout((1, 1, 32))
    with pytest.raises(CorruptFile, match="_scales"):
        layout.decode({
            "_blocks": torch.zeros(1, 1, 1, 16, dtype=torch.uint8),
            "_scales": torch.full((1, 1, 1), byte, dtype=torch.uint8),
        })  # fmt: skip


def test_dense_blocks_with_nan_are_damage() -> None:
    with pytest.raises(CorruptFile, match="_blocks"):
        DenseBlocksLayout((2, 3, 4)).decode({"_blocks": torch.full((2, 4, 3), torch.nan, dtype=torch.bfloat16)})
