"""LoRA adapters merged file to file: what PEFT merges into the dense model, in any method's layout."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

import anybit
from anybit import BitsAndBytesConfig, GPTQConfig
from anybit.cli.schemes import from_scheme
from anybit.containers import Checkpoint
from anybit.errors import CheckpointError, ConfigError, UnexpectedTensor
from anybit.weight.regridding import on_same_grid

TINY = Path(__file__).parent.parent / "examples" / "tiny-llama"
GOLDEN = Path(__file__).parent / "golden"
Q = "base_model.model.model.layers.0.self_attn.q_proj"
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora, patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 3}},
    "dora": {"use_dora": True},
}  # fmt: skip


def trained(base: Path, folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Train an adapter for three steps and save it; the weights of the dense model that PEFT merges it into."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"target_modules": ["q_proj", "down_proj"], **options}
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings)
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


def small(folder: Path) -> Path:
    """A model with biases and an output layer of its own."""
    torch.manual_seed(0)
    settings = Qwen2Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=96, tie_word_embeddings=False, dtype="float32", initializer_range=0.1,
    )  # fmt: skip
    Qwen2ForCausalLM(settings).save_pretrained(folder)
    return folder


BEYOND: dict[str, dict[str, Any]] = {
    "embeddings and output layer": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "modules saved whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "biases trained": {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"},
    "biases of the adapter": {"target_modules": ["q_proj", "v_proj"], "lora_bias": True},
}


@pytest.mark.parametrize("kind", BEYOND)
def test_beyond_linear_layers_as_peft_merges(kind: str, tmp_path: Path) -> None:
    base = small(tmp_path / "base")
    wanted = trained(base, tmp_path / "adapter", **BEYOND[kind])
    report = anybit.merge(base, tmp_path / "adapter", tmp_path / "out")
    found, before = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "base"))
    changed = {module.name + ".weight" for module in report.modules} | set(report.plain)
    assert len(changed) >= 2
    for name, tensor in found.items():
        assert torch.allclose(tensor, wanted[name], rtol=1e-5, atol=1e-6), name
        assert torch.equal(tensor, before[name]) == (name not in changed), name


def test_embeddings_and_norms_of_a_quantized_base(tmp_path: Path) -> None:
    anybit.quantize(small(tmp_path / "base"), tmp_path / "mlx", from_scheme("mlx-8bit-g32"))
    anybit.dequantize(tmp_path / "mlx", tmp_path / "dense", dtype="float32")
    options = {"target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["norm"]}
    wanted = trained(tmp_path / "dense", tmp_path / "adapter", **options)
    report = anybit.merge(tmp_path / "mlx", tmp_path / "adapter", tmp_path / "out")
    anybit.dequantize(tmp_path / "out", tmp_path / "read", dtype="float32")
    read = load_file(tmp_path / "read" / "model.safetensors")
    assert {module.name for module in report.modules} == {"model.embed_tokens", "model.layers.0.self_attn.q_proj"}
    for name, weight in wanted.items():
        assert (read[name] - weight).norm() <= 0.02 * weight.norm(), name


@pytest.mark.parametrize("scheme", ["gptq-4bit-g32", "nf4", "ct-nvfp4a16", "int8"])
def test_the_better_of_two_grids_is_stored(scheme: str, tmp_path: Path) -> None:
    """A small change on the grid it was rounded to keeps most codes; what is stated is measured, and never the worse way."""
    anybit.quantize(small(tmp_path / "base"), tmp_path / "q", from_scheme(scheme))
    anybit.dequantize(tmp_path / "q", tmp_path / "dense", dtype="float32")
    trained(tmp_path / "dense", tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    report = anybit.merge(tmp_path / "q", tmp_path / "adapter", tmp_path / "out")
    for module in report.modules:
        assert module.grid in ("its grid kept", "a grid found anew")
        assert module.other_error is not None
        assert module.error <= module.other_error
    if scheme == "gptq-4bit-g32":
        assert {module.grid for module in report.modules} == {"its grid kept"}


def test_the_same_numbers_on_their_own_grid_are_the_same_codes() -> None:
    for variant in ("gptq/w4_g32_asym_desc_act", "metal/8bit-g32-f16", "fp_quant/mxfp4_real_awkward", "sinq/4bit-g64"):
        model: Any = anybit.load(GOLDEN / variant)
        weight = next(m for m in model.modules() if hasattr(m, "quantized_weight")).quantized_weight
        dense = weight.to_dense(torch.float32)
        again = on_same_grid(weight, dense).to_dense(torch.float32)
        assert (again - dense).abs().max() <= 1e-6 * dense.abs().max(), variant


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
        ({"bias": "some"}, None, ConfigError, "bias is 'some'"),
        ({"modules_to_save": ["lm_head"]}, None, CheckpointError, "names 'lm_head', of which .* has no tensor"),
        ({"target_parameters": ["experts"]}, None, ConfigError, "target_parameters is"),
        ({"trainable_token_indices": [3]}, None, ConfigError, "trainable_token_indices is"),
        ({"layer_replication": [[0, 1]]}, None, ConfigError, "layer_replication is"),
        ({"something_new": 2}, None, ConfigError, "something_new is 2, which is not merged"),
        ({"init_lora_weights": "pissa_niter_4"}, None, ConfigError, "path_initial_model_for_weight_conversion"),
        ({"bias": "lora_only"}, lambda t: {**t, f"{Q}.bias": torch.ones(64)}, ConfigError, "which the base does not store"),
        ({}, lambda t: {**t, f"{Q}.lora_B.bias": torch.ones(64)}, ConfigError, "which the base does not store"),
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
