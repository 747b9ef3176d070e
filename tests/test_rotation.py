"""Rotations: the rotated model is the same model, whatever its family; quantized, it is better; what cannot be turned says so."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import anybit
from anybit import AutoModelForCausalLM as AutoLlama
from anybit import CompressedTensorsConfig, GPTQConfig
from anybit.algorithms._hadamard import Turn
from anybit.cli.app import run
from anybit.engine.recipe import quantize_by_recipe, read_recipe
from anybit.errors import ConfigError, InvalidOption, NotRepresentable
from anybit.weight.nodes import hadamard

ROOT = Path(__file__).parent.parent
TINY = ROOT / "examples" / "tiny-llama"
CALIBRATION = ROOT / "examples" / "data" / "calibration.txt"
EVALUATION = (ROOT / "examples" / "data" / "evaluation.txt").read_text(encoding="utf-8")

SMALL: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 96, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 24, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "decoder_sparse_step": 1,
    "shared_expert_intermediate_size": 32, "mlp_only_layers": [],
}  # fmt: skip


def small(folder: Path, family: str, **more: Any) -> Path:
    """A random model in float64, with gains and biases that are no ones and zeros."""
    config = AutoConfig.for_model(family, **{**SMALL, **more})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return folder


def logits(folder: Path) -> torch.Tensor:
    """In float64 throughout: transformers' RMSNorms and routers go through float32, which hides what is asked here."""

    def norm(self: Any, x: torch.Tensor) -> torch.Tensor:
        eps = getattr(self, "variance_epsilon", getattr(self, "eps", 0))
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)  # type: ignore[no-any-return]

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager").eval()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(norm, module)
    tokens = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(tokens).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("size", [1, 2, 12, 64, 80, 96])
def test_turns_are_orthogonal_and_spread_a_spike(size: int) -> None:
    unit = torch.eye(size, dtype=torch.float64)
    matrix = Turn(size, 3).columns(unit)
    assert (matrix @ matrix.T - unit).abs().max() < 1e-13
    assert matrix.abs().max() <= (2 / size) ** 0.5 + 1e-12
    assert torch.allclose(Turn(size, 3).rows(unit), matrix.T, atol=1e-13)
    if size & (size - 1) == 0:
        assert torch.allclose(Turn(size, None).columns(unit).float(), hadamard(size), atol=1e-6)


@pytest.mark.parametrize("rotations", ["r1", "r2", "r1+r2"])
@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {"tie_word_embeddings": True}),
        ("phi3", {}),
        ("granite", {"residual_multiplier": 0.5, "embedding_multiplier": 3.0}),
    ],
)
def test_the_rotated_model_computes_the_same(tmp_path: Path, family: str, more: dict[str, Any], rotations: str) -> None:
    source = small(tmp_path / "dense", family, **more)
    plan = anybit.rotate(source, tmp_path / "rotated", rotations)
    before, after = logits(source), logits(tmp_path / "rotated")
    assert (after - before).abs().max() < 1e-9 * before.abs().max()
    stored, turned = load_file(source / "model.safetensors"), load_file(tmp_path / "rotated" / "model.safetensors")
    down = "model.layers.1.self_attn.o_proj.weight"
    assert (stored[down] - turned[down]).abs().max() > 1e-3
    assert any("rotated" in note for note in plan.notes)
    if "r1" in rotations:
        assert bool((turned["model.norm.weight"] == 1).all())
        assert "lm_head.weight" in turned
        assert json.loads((tmp_path / "rotated" / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_experts_and_routers_are_rotated_too(tmp_path: Path, family: str) -> None:
    source = small(tmp_path / "dense", family, **EXPERTS)
    anybit.rotate(source, tmp_path / "rotated", "r1+r2")
    before, after = logits(source), logits(tmp_path / "rotated")
    # routers of transformers compute in float32
    assert (after - before).abs().max() < 1e-6 * before.abs().max()


@pytest.mark.parametrize(
    ("family", "more", "why"),
    [
        ("gpt_neox", {}, "cannot be rotated"),
        ("opt", {}, "cannot be rotated"),
        ("gemma2", {}, "a norm of a layer's output"),
        ("olmo2", {}, "cannot be rotated"),
        ("starcoder2", {}, "only an RMSNorm commutes|not known"),
        ("cohere", {}, "cannot be rotated"),
    ],
)
def test_what_cannot_be_rotated_is_refused_by_name(tmp_path: Path, family: str, more: dict[str, Any], why: str) -> None:
    source = small(tmp_path / "dense", family, **more)
    with pytest.raises(NotRepresentable, match=why) as caught:
        anybit.quantize(source, tmp_path / "made", GPTQConfig(bits=4, group_size=16), rotate=True)
    assert any(part in str(caught.value) for part in ("layers.0", "embed_", "norm", "model"))
    assert not (tmp_path / "made").exists()


def w4a4() -> CompressedTensorsConfig:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}
    inputs = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return CompressedTensorsConfig(config_groups={"g": group}, ignore=["lm_head"])


def kl_of(folder: Path) -> float:
    return float(anybit.evaluate(folder, EVALUATION, reference=TINY, max_tokens=700).kl)


def test_four_bit_weights_and_inputs_are_better_rotated(tmp_path: Path) -> None:
    found = {}
    for rotate in ("", "r1+r2", "r1+r2+r4"):
        folder = tmp_path / (rotate or "plain")
        anybit.quantize(TINY, folder, w4a4(), rotate=rotate or False)
        found[rotate] = kl_of(folder)
    assert found["r1+r2"] < found[""]
    assert found["r1+r2+r4"] < 0.5 * found[""]  # what comes into down_proj has the outliers
    config = json.loads((tmp_path / "r1+r2+r4" / "config.json").read_text())["quantization_config"]
    (group,) = config["transform_config"]["config_groups"].values()
    assert (group["type"], group["head_dim"]) == ("hadamard", 256)  # 768 inputs = 3 * 256
    assert {use["location"] for use in group["apply"]} == {"input", "weight_input"}


def test_rotated_weights_are_calibrated_under_a_cap(tmp_path: Path) -> None:
    """GPTQ after it sees rotated inputs; r4 as well, which happens in a hook."""
    weights = {"num_bits": 3, "type": "int", "symmetric": True, "strategy": "channel"}
    config = CompressedTensorsConfig(
        config_groups={"g": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"]
    )
    options: dict[str, Any] = {"calibration": CALIBRATION, "algorithm": "gptq", "samples": 48, "sequence_length": 128}
    anybit.quantize(TINY, tmp_path / "nearest", config, rotate="r1+r2+r4")
    anybit.quantize(TINY, tmp_path / "gptq", config, rotate="r1+r2+r4", max_memory="128MiB", **options)
    assert kl_of(tmp_path / "gptq") < 0.92 * kl_of(tmp_path / "nearest")


def test_layouts_that_rotate_by_themselves_do_not_undo_it() -> None:
    """Hadamard twice would be nothing: the signs on both sides keep the spike of one column from coming back."""
    spike = torch.zeros(1, 256)
    spike[0, 5] = 1
    assert (Turn(256, None).columns(spike) @ hadamard(256)).abs().max() > 0.99
    assert (Turn(256, 0).columns(spike) @ hadamard(256)).abs().max() < 0.3


def test_rotations_are_asked_for_by_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match="'r3' is no rotation"):
        anybit.quantize(TINY, tmp_path / "a", GPTQConfig(bits=4), rotate="r1+r3")
    with pytest.raises(ConfigError, match=r"cannot say that model\.layers\.0\.mlp\.down_proj has a rotated input"):
        anybit.quantize(TINY, tmp_path / "a", GPTQConfig(bits=4), rotate="r1+r4")
    with pytest.raises(InvalidOption, match="a dense checkpoint holds r1, r2 or r1"):
        anybit.rotate(TINY, tmp_path / "a", "r4")
    anybit.quantize(TINY, tmp_path / "made", GPTQConfig(bits=4))
    with pytest.raises(ConfigError, match="rotations start from dense weights"):
        anybit.rotate(tmp_path / "made", tmp_path / "a")


def test_a_head_that_is_no_head_is_refused(tmp_path: Path) -> None:
    source = small(tmp_path / "dense", "llama")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.self_attn.gate.weight"] = torch.zeros(4, 96, dtype=torch.float64)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"self_attn\.gate"):
        anybit.rotate(source, tmp_path / "rotated")


def test_the_command_line_rotates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = small(tmp_path / "dense", "llama")
    assert run(["rotate", str(source), "-o", str(tmp_path / "rotated"), "--rotations", "r1", "--quiet"]) == 0
    turned = load_file(tmp_path / "rotated" / "model.safetensors")
    assert bool((turned["model.layers.0.input_layernorm.weight"] == 1).all())
    made = ["quantize", str(source), "-o", str(tmp_path / "made"), "--scheme", "nf4", "--rotate"]
    assert run([*made, "r1+r9", "--quiet"]) == 3
    assert "'r9' is no rotation" in capsys.readouterr().err
    assert run([*made, "r1+r2", "--json"]) == 0
    assert any("rotated: r2" in note for note in json.loads(capsys.readouterr().out)["notes"])


def test_rotated_while_it_is_loaded_and_by_a_recipe(tmp_path: Path) -> None:
    """Three ways to one model: file to file, at load, by a recipe; each says what was rotated."""
    base = small(tmp_path / "base", "llama", hidden_size=64, head_dim=16)
    config = GPTQConfig(bits=8, group_size=16)
    anybit.quantize(base, tmp_path / "files", config, rotate="r1+r2")
    loaded: Any = AutoLlama.from_pretrained(base, quantization_config=config, rotate="r1+r2")
    assert any(note.startswith("rotated: r1") for note in loaded.anybit_plan.notes)
    recipe = tmp_path / "recipe.json"
    wanted = {"method": "gptq", "options": {"bits": 8, "group_size": 16}}
    recipe.write_text(json.dumps({"quantization": wanted, "rotate": "r1+r2"}))
    quantize_by_recipe(base, tmp_path / "recipe", read_recipe(recipe))
    loaded.save_pretrained(tmp_path / "saved")
    first = load_file(tmp_path / "files" / "model.safetensors")
    for other in ("recipe", "saved"):
        again = load_file(tmp_path / other / "model.safetensors")
        packed = [name for name in first if name.endswith("qweight")]
        assert packed
        assert all(torch.equal(first[name], again[name]) for name in packed), other
    recipe.write_text(json.dumps({"quantization": wanted, "rotate": "r9"}))
    with pytest.raises(ConfigError, match=r"rotate cannot be meant.*'r9' is no rotation"):
        read_recipe(recipe)
