"""LoRA adapters merged file to file: what PEFT merges into the dense model, in any method's layout."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import anybit
from anybit import BitsAndBytesConfig, GPTQConfig
from anybit.containers import Checkpoint
from anybit.errors import CheckpointError, ConfigError, UnexpectedTensor

TINY = Path(__file__).parent.parent / "examples" / "tiny-llama"
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora, patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 3}},
    "dora": {"use_dora": True},
}  # fmt: skip


def trained(base: Path, folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Train an adapter for three steps and save it; the weights of the dense model that PEFT merges it into."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **options
    )
    model = peft.get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    ids = torch.arange(24).view(2, 12) * 5 % 64
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return dict(model.merge_and_unload().state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_as_peft_merges_into_a_dense_base(kind: str, tmp_path: Path) -> None:
    wanted = trained(TINY, tmp_path / "adapter", **KINDS[kind])
    report = anybit.merge(TINY, tmp_path / "adapter", tmp_path / "out")
    found, before = load_file(tmp_path / "out" / "model.safetensors"), load_file(TINY / "model.safetensors")
    changed = {module.name for module in report.modules}
    assert changed == {
        name.removesuffix(".weight") for name in before if name.endswith(("q_proj.weight", "down_proj.weight"))
    }
    for name, tensor in found.items():
        assert tensor.dtype == before[name].dtype
        if name.removesuffix(".weight") not in changed:
            assert torch.equal(tensor, before[name]), name
            continue
        moved = (wanted[name] - before[name].float()).norm()
        assert moved > 0.01 * before[name].float().norm()
        # to one rounding of the stored dtype
        assert torch.allclose(tensor.float(), wanted[name].to(tensor.dtype).float(), rtol=2**-7, atol=1e-6), name


@pytest.mark.parametrize(
    ("config", "most"),
    [
        (lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), 0.12),
        (lambda: BitsAndBytesConfig(load_in_8bit=True), 0.02),
        (lambda: GPTQConfig(bits=4, group_size=64), 0.15),
    ],
    ids=["nf4", "int8", "gptq"],
)
def test_into_a_quantized_base(config: Any, most: float, tmp_path: Path) -> None:
    anybit.quantize(TINY, tmp_path / "base", config())
    anybit.dequantize(tmp_path / "base", tmp_path / "dense", dtype="float32")
    wanted = trained(tmp_path / "dense", tmp_path / "adapter")
    report = anybit.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    before, after = Checkpoint.open(tmp_path / "base"), Checkpoint.open(tmp_path / "out")
    assert {name: (info.dtype, info.shape) for name, info in before.tensors.items()} == {
        name: (info.dtype, info.shape) for name, info in after.tensors.items()
    }
    changed = {module.name for module in report.modules}
    for name in before.tensors:
        if not any(name.startswith(module + ".") for module in changed):
            assert torch.equal(before.read(name), after.read(name)), name
    anybit.dequantize(tmp_path / "out", tmp_path / "read", dtype="float32")
    read = load_file(tmp_path / "read" / "model.safetensors")
    for module in report.modules:
        own = wanted[f"{module.name}.weight"]
        error = float((read[f"{module.name}.weight"] - own).norm() / own.norm())
        assert error == pytest.approx(module.error, rel=1e-3)  # what is stated is what a reader sees
        assert 0 < error < most
    config_of = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("base", "out")]
    assert config_of[0] == config_of[1]

    anybit.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", dequantize=True)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    for name in wanted:
        if name in merged:
            assert torch.allclose(
                merged[name].float(), wanted[name].to(merged[name].dtype).float(), rtol=2**-7, atol=1e-6
            )


def edited(folder: Path, tensors: Any = None, **keys: Any) -> Path:
    """The adapter with other keys in its configuration, or other tensors."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))
    if tensors is not None:
        save_file(tensors(load_file(folder / "adapter_model.safetensors")), folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("keys", "tensors", "error", "words"),
    [
        ({"peft_type": "IA3"}, None, ConfigError, "only LORA"),
        ({"bias": "all"}, None, ConfigError, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, None, ConfigError, "modules_to_save"),
        ({"r": 7}, None, CheckpointError, "has rank 4; the configuration says rank 7"),
        ({"use_dora": True}, None, CheckpointError, "use_dora is True"),
        ({}, lambda t: {**t, "base_model.model.lm_head.weight": torch.ones(2)}, UnexpectedTensor, "is no part of a LoRA"),
        ({}, lambda t: {n.replace("layers.0", "layers.90"): v for n, v in t.items()}, CheckpointError, "does not have"),
        ({}, lambda t: {n: v[:, :-1].contiguous() if "lora_A" in n else v for n, v in t.items()}, CheckpointError, "another model"),
        ({}, lambda t: {n: v * float("nan") for n, v in t.items()}, CheckpointError, "NaN or infinite"),
    ],
)  # fmt: skip
def test_what_is_refused(keys: Any, tensors: Any, error: Any, words: str, tmp_path: Path) -> None:
    trained(TINY, tmp_path / "adapter")
    edited(tmp_path / "adapter", tensors, **keys)
    with pytest.raises(error, match=words):
        anybit.merge(TINY, tmp_path / "adapter", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_a_folder_without_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json"):
        anybit.merge(TINY, TINY, tmp_path / "out")
