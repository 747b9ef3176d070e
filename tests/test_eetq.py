"""EETQ beyond the laws: the order of the bytes element by element, Volta's order, codes as EETQ chooses them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import anybit
from anybit import algorithms
from anybit.errors import InvalidOption, NotRepresentable, ShapeMismatch
from anybit.methods._eetq_layout import EetqLayout, bytes_of, codes_of

GOLDEN = Path(__file__).parent / "golden" / "eetq" / "sm80"
PERMUTED = (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)


def slow_codes(stored: torch.Tensor) -> torch.Tensor:
    """One element at a time: where in the bytes is the code of input r and output c?"""
    inputs, outputs = stored.shape
    flat = stored.contiguous().view(torch.uint8).flatten().tolist()
    found = torch.empty(outputs, inputs, dtype=torch.int8)
    for r in range(inputs):
        row = 16 * (r // 16) + PERMUTED.index(r % 16)
        for c in range(outputs):
            place = (c // 2) * 2 * inputs + (row // 64) * 128 + (c % 2) * 64 + row % 64
            place = 4 * (place // 4) + (0, 2, 1, 3)[place % 4]
            found[c, r] = flat[place] - 128
    return found


@pytest.mark.parametrize("shape", [(64, 64), (192, 64), (64, 128), (128, 192)])
def test_order_of_the_bytes(shape: tuple[int, int]) -> None:
    stored = torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(0)).to(torch.int8)
    assert torch.equal(codes_of(stored, volta=False), slow_codes(stored))
    assert torch.equal(bytes_of(slow_codes(stored), volta=False), stored)


def test_voltas_order_of_the_bytes() -> None:
    stored = torch.randint(-128, 128, (6, 10), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    flat = [byte - 128 for byte in stored.view(torch.uint8).flatten().tolist()]
    wanted = [flat[4 * (place // 4) + (0, 2, 1, 3)[place % 4]] for place in range(60)]
    assert torch.equal(codes_of(stored, volta=True), torch.tensor(wanted, dtype=torch.int8).view(6, 10).T)
    assert torch.equal(bytes_of(codes_of(stored, volta=True), volta=True), stored)


def test_codes_are_eetqs() -> None:
    dense = torch.zeros(64, 64)
    dense[0, :6] = torch.tensor([-128.0, 2.5, -2.5, 3.5, 127.4, 0.49999997])  # halves go away from zero
    dense[1, :3] = torch.tensor([128.0, -127.5, 1.0])  # the largest positive weight is cut
    dense[2, :2] = torch.tensor([1e-3, -3e-4])
    layout = EetqLayout((64, 64), "float32")
    weight = algorithms.get("rtn")(dense, layout.scheme(), **layout.algorithm_options())
    stored = layout.encode(weight)
    codes = codes_of(stored["weight"], volta=False)
    assert codes[0, :6].tolist() == [-128, 3, -3, 4, 127, 0]
    assert codes[1, :3].tolist() == [127, -128, 1]
    assert codes[2, :2].tolist() == [127, -38]
    assert not codes[3:].any()
    assert stored["weight_scales"][:2].tolist() == [1.0, 1.0]
    assert stored["weight_scales"][2] == torch.tensor(1e-3 / 128).half()
    assert torch.isfinite(weight.to_dense(torch.float32)).all()


def test_made_again_the_checkpoint_is_the_same(tmp_path: Path) -> None:
    anybit.dequantize(GOLDEN, tmp_path / "dense", dtype="float32")
    anybit.quantize(tmp_path / "dense", tmp_path / "made", anybit.EetqConfig())
    ours, wanted = (load_file(folder / "model.safetensors") for folder in (tmp_path / "made", GOLDEN))
    packed = [name for name in wanted if name.endswith("weight") and wanted[name].dtype == torch.int8]
    assert packed
    for name in packed:
        # where 127 is a code that was cut, its scale is found again only from a -128
        codes, again = codes_of(wanted[name], False).int(), codes_of(ours[name], False).int()
        kept = (codes == -128).any(1)
        assert kept.any()
        assert torch.equal(again[kept], codes[kept])
        assert torch.equal(ours[f"{name}_scales"][kept], wanted[f"{name}_scales"][kept])


def on_volta(folder: Path) -> Path:
    """The golden with its weights in the order for sm70."""
    shutil.copytree(GOLDEN, folder)
    tensors = load_file(GOLDEN / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dtype == torch.int8:
            tensors[name] = bytes_of(codes_of(tensor, volta=False), volta=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def logits(path: Path, **options: Any) -> torch.Tensor:
    model: Any = anybit.load(path, **options)
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(8)[None]).logits
    return found


def test_a_checkpoint_from_volta_is_told_by_its_numbers(tmp_path: Path) -> None:
    folder = on_volta(tmp_path / "volta")
    assert torch.equal(logits(folder), logits(GOLDEN))
    assert any("Volta (sm70)" in note for note in anybit.plan(folder).notes)
    assert not any("Volta" in note for note in anybit.plan(GOLDEN).notes)


def test_the_user_may_say_the_architecture(tmp_path: Path) -> None:
    folder = on_volta(tmp_path / "volta")
    assert torch.equal(logits(folder, quantization_config=anybit.EetqConfig(gpu_arch=70)), logits(GOLDEN))
    wrong = logits(folder, quantization_config=anybit.EetqConfig(gpu_arch=80))
    assert not torch.allclose(wrong, logits(GOLDEN), atol=0.1)
    with pytest.raises(InvalidOption, match="gpu_arch is 90"):
        anybit.EetqConfig(gpu_arch=90)


def test_new_checkpoints_for_volta(tmp_path: Path) -> None:
    anybit.dequantize(GOLDEN, tmp_path / "dense", dtype="float32")
    for arch in (70, 80):
        anybit.quantize(tmp_path / "dense", tmp_path / str(arch), anybit.EetqConfig(gpu_arch=arch))
    assert json.loads((tmp_path / "70" / "config.json").read_text())["quantization_config"]["gpu_arch"] == 70
    left, right = (load_file(tmp_path / arch / "model.safetensors") for arch in ("70", "80"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(left[name], right[name])
    assert torch.equal(codes_of(left[name], volta=True), codes_of(right[name], volta=False))
    assert torch.equal(logits(tmp_path / "70"), logits(tmp_path / "80"))


def test_sizes_that_have_no_order(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=1, head_dim=64,
        num_key_value_heads=1, attention_bias=True, dtype="float16",
    )  # fmt: skip
    LlamaForCausalLM(config).half().save_pretrained(tmp_path / "dense")
    plan = anybit.quantize(tmp_path / "dense", tmp_path / "made", anybit.EetqConfig())
    actions = {entry.slot.module.rpartition(".")[2]: entry for entry in plan.entries}
    assert actions["q_proj"].action == "quantize"
    assert actions["up_proj"].action == "dense"
    assert "64 inputs and outputs together" in actions["up_proj"].reason
    assert actions["lm_head"].action == "dense"
    assert (logits(tmp_path / "made") - logits(tmp_path / "dense")).abs().max() < 0.05
    # such a layer can only come from Volta
    anybit.quantize(tmp_path / "dense", tmp_path / "volta", anybit.EetqConfig(gpu_arch=70))
    assert "model.layers.0.mlp.up_proj.weight_scales" in load_file(tmp_path / "volta" / "model.safetensors")
    with pytest.raises(NotRepresentable, match=r"up_proj|gate_proj|down_proj"):
        anybit.plan(tmp_path / "volta", anybit.EetqConfig(gpu_arch=80))
    assert torch.isfinite(logits(tmp_path / "volta")).all()


def test_a_shape_that_is_not_the_models(tmp_path: Path) -> None:
    folder = tmp_path / "wrong"
    shutil.copytree(GOLDEN, folder)
    tensors = load_file(GOLDEN / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].T.contiguous()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ShapeMismatch, match=r"up_proj\.weight.*int8 \(128, 256\)"):
        anybit.plan(folder)
