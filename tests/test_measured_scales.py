"""Static scales of inputs, keys and values, measured on calibration data: against the dense model's own numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import anybit
from anybit.errors import CalibrationNeeded
from anybit.methods.modelopt import ModelOptConfig
from anybit.methods.quark import QuarkConfig, specification

IDS = torch.randint(0, 96, (6, 16), generator=torch.Generator().manual_seed(0))
SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "dtype": "float32", "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measured") / "dense"
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measured") / "experts"
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SIZES, num_local_experts=8, num_experts_per_tok=1)
    transformers.MixtralForCausalLM(config).save_pretrained(folder)
    return folder


def largest_inputs(folder: Path, ids: torch.Tensor, layer: int = 0) -> dict[str, float]:
    """The largest magnitude that enters each linear of a layer of the dense model; of keys with their rotation, of values."""
    from transformers.models.llama import modeling_llama

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    found: dict[str, float] = {}
    for name, module in model.model.layers[layer].named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: found.update({name: float(args[0].abs().max())})
            )
    block = model.model.layers[layer].self_attn
    block.v_proj.register_forward_hook(lambda _, __, out: found.update(values=float(out.abs().max())))
    keys: list[float] = []
    turn = modeling_llama.apply_rotary_pos_emb

    def spy(query: torch.Tensor, key: torch.Tensor, *rest: Any, **more: Any) -> Any:
        query, key = turn(query, key, *rest, **more)
        keys.append(float(key.abs().max()))
        return query, key

    modeling_llama.apply_rotary_pos_emb = spy
    try:
        with torch.no_grad():
            model(ids)
    finally:
        modeling_llama.apply_rotary_pos_emb = turn
    return {**found, "keys": keys[layer]}


@pytest.mark.parametrize(("algo", "top"), [("FP8", 448.0), ("NVFP4", 6 * 448.0)])
def test_input_scales_are_of_the_largest_number_seen(dense: Path, tmp_path: Path, algo: str, top: float) -> None:
    config = ModelOptConfig(quant_algo=algo, kv_cache_quant_algo="FP8")
    plan = anybit.quantize(dense, tmp_path / "made", config, calibration=IDS)
    stored, seen = load_file(tmp_path / "made" / "model.safetensors"), largest_inputs(dense, IDS)
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        assert float(stored[f"model.layers.0.{name}.input_scale"]) == pytest.approx(seen[name] / top, rel=1e-5), name
    assert float(stored["model.layers.0.self_attn.k_proj.k_scale"]) == pytest.approx(seen["keys"] / 448, rel=1e-5)
    assert float(stored["model.layers.0.self_attn.v_proj.v_scale"]) == pytest.approx(seen["values"] / 448, rel=1e-5)
    # the second layer sees what the quantized first one gives: not the same numbers, but near
    second = largest_inputs(dense, IDS, 1)["self_attn.q_proj"] / top
    own = float(stored["model.layers.1.self_attn.q_proj.input_scale"])
    assert own != pytest.approx(second, rel=1e-6)
    assert own == pytest.approx(second, rel=0.2)
    reasons = {entry.reason for entry in plan.entries if entry.action == "quantize"}
    assert reasons == {"its input measured on 96 tokens"}


def test_the_checkpoint_is_read_with_its_scales(dense: Path, tmp_path: Path) -> None:
    anybit.quantize(
        dense, tmp_path / "made", ModelOptConfig(quant_algo="FP8", kv_cache_quant_algo="FP8"), calibration=IDS
    )
    model: Any = anybit.load(tmp_path / "made")
    assert not model.anybit_plan.notes
    with torch.no_grad():
        wanted = transformers.AutoModelForCausalLM.from_pretrained(dense)(IDS).logits
        found = model(IDS).logits
    assert ((found - wanted).norm() / wanted.norm()) < 0.06
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(tmp_path / own / "model.safetensors") for own in ("made", "again"))
    assert before.keys() == after.keys()
    beside = json.loads((tmp_path / "made" / "hf_quant_config.json").read_text())
    assert beside["quantization"] == {
        "quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"],
    }  # fmt: skip
    config = json.loads((tmp_path / "made" / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "float"}


def test_experts_that_no_token_met_take_the_scale_of_all(experts: Path, tmp_path: Path) -> None:
    few = IDS[:1, :4]
    anybit.quantize(experts, tmp_path / "made", ModelOptConfig(quant_algo="FP8"), calibration=few)
    stored = load_file(tmp_path / "made" / "model.safetensors")
    prefix = "model.layers.0.block_sparse_moe.experts"
    scales = [float(stored[f"{prefix}.{number}.w1.input_scale"]) for number in range(8)]
    assert scales == [float(stored[f"{prefix}.{number}.w3.input_scale"]) for number in range(8)]
    model = transformers.AutoModelForCausalLM.from_pretrained(experts)
    rows: list[torch.Tensor] = []
    chosen: list[torch.Tensor] = []
    block = model.model.layers[0].mlp
    block.register_forward_pre_hook(lambda _, args: rows.append(args[0].reshape(-1, 64)))
    block.gate.register_forward_hook(lambda _, __, out: chosen.append(out[2].reshape(-1)))
    with torch.no_grad():
        model(few)
    whole = float(rows[0].abs().max())
    for number in range(8):
        own = rows[0][chosen[0] == number]
        wanted = float(own.abs().max()) if len(own) else whole
        assert scales[number] == pytest.approx(wanted / 448, rel=1e-5), number
    assert len(set(chosen[0].tolist())) < 8
    with torch.no_grad():
        assert torch.isfinite(anybit.load(tmp_path / "made")(IDS).logits).all()


def test_two_level_scales_of_layers_that_engines_join_are_one(dense: Path, experts: Path, tmp_path: Path) -> None:
    for source, owner, joined in (
        (dense, "self_attn", ("q_proj", "k_proj", "v_proj")),
        (dense, "mlp", ("gate_proj", "up_proj")),
        (experts, "block_sparse_moe.experts.3", ("w1", "w3")),
    ):
        out = tmp_path / owner
        anybit.quantize(source, out, ModelOptConfig(quant_algo="W4A16_NVFP4"))
        stored, plain = load_file(out / "model.safetensors"), _dense_tensors(source)
        names = [f"model.layers.1.{owner}.{own}" for own in joined]
        largest = max(float(plain[name].abs().max()) for name in names)
        found = {float(stored[f"{name}.weight_scale_2"]) for name in names}
        assert found == {float(torch.tensor(largest) / (6 * 448))}


def test_fp8_of_experts_has_one_scale_for_what_engines_join(dense: Path, experts: Path, tmp_path: Path) -> None:
    """As ModelOpt's export: gate and up of an expert share it, q, k and v of attention do not."""
    for source, names, one in (
        (experts, [f"block_sparse_moe.experts.3.{own}" for own in ("w1", "w3")], True),
        (dense, [f"self_attn.{own}" for own in ("q_proj", "k_proj", "v_proj")], False),
    ):
        out = tmp_path / source.name
        anybit.quantize(source, out, ModelOptConfig(quant_algo="FP8"), calibration=IDS)
        stored, plain = load_file(out / "model.safetensors"), _dense_tensors(source)
        full = [f"model.layers.1.{name}" for name in names]
        largest = [float(plain[name].abs().max()) for name in full]
        wanted = [max(largest)] * len(full) if one else largest
        for name, number in zip(full, wanted, strict=True):
            assert float(stored[f"{name}.weight_scale"]) == float(torch.tensor(number) / 448)


def _dense_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """By names that checkpoints have: transformers stores experts one by one."""
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            found[f"{name.removesuffix('.weight')}"] = tensor
    return found


def test_without_data_the_first_layer_and_the_cure_are_named(dense: Path, tmp_path: Path) -> None:
    for call in (
        lambda: anybit.load(dense, ModelOptConfig(quant_algo="FP8")),
        lambda: anybit.plan(dense, ModelOptConfig(quant_algo="FP8")),
        lambda: anybit.quantize(dense, tmp_path / "no", ModelOptConfig(quant_algo="FP8")),
    ):
        with pytest.raises(CalibrationNeeded, match=r"layers\.0\.self_attn\.q_proj and 13 more.*--calib"):
            call()
    config = ModelOptConfig(quant_algo="MXFP8", kv_cache_quant_algo="FP8")
    with pytest.raises(CalibrationNeeded, match=r"k_scale, v_proj\.v_scale of model\.layers\.0\.self_attn"):
        anybit.quantize(dense, tmp_path / "no", config)
    assert not list(tmp_path.iterdir())


def test_what_lies_outside_of_the_blocks_cannot_be_measured(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationNeeded, match="input of lm_head"):
        anybit.quantize(dense, tmp_path / "no", ModelOptConfig(quant_algo="FP8", ignore=[]), calibration=IDS)


def test_recipes_with_a_search_fold_before_they_measure(dense: Path, tmp_path: Path) -> None:
    """W8A8_SQ_PER_CHANNEL: SmoothQuant moves scales into norms, so inputs are smaller than those of the dense model."""
    config = ModelOptConfig(quant_algo="W8A8_SQ_PER_CHANNEL")
    anybit.quantize(dense, tmp_path / "made", config, calibration=IDS)
    stored, plain = load_file(tmp_path / "made" / "model.safetensors"), load_file(dense / "model.safetensors")
    norm = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(stored[norm], plain[norm])
    x = torch.nn.functional.rms_norm(plain["model.embed_tokens.weight"][IDS], (64,), None, 1e-6)
    largest = float((x * stored[norm]).abs().max())
    assert float(stored["model.layers.0.self_attn.q_proj.input_scale"]) == pytest.approx(largest / 127, rel=1e-4)


def _quark(inputs: dict[str, Any], outputs: dict[str, Any] | None = None) -> QuarkConfig:
    weight = specification("fp8_e4m3", "per_tensor")
    cache = (
        {} if outputs is None else {"kv_cache_quant_config": {"*k_proj": {"weight": weight, "output_tensors": outputs}}}
    )
    named = {"layer_quant_config": {"*k_proj": {"weight": weight, "input_tensors": inputs, "output_tensors": outputs}}}
    return QuarkConfig(
        global_quant_config={"weight": weight, "input_tensors": inputs}, **(named if outputs else {}), **cache
    )


def test_quark_measures_inputs_and_outputs(dense: Path, tmp_path: Path) -> None:
    """FP8: max / 448. int8: max / 127.5 and 0, or (max - min) / 255 and -128 - round(min / scale)."""
    fp8 = specification("fp8_e4m3", "per_tensor")
    anybit.quantize(dense, tmp_path / "fp8", _quark(fp8, fp8), calibration=IDS)
    stored, seen = load_file(tmp_path / "fp8" / "model.safetensors"), largest_inputs(dense, IDS)
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        assert float(stored[f"model.layers.0.{name}.input_scale"]) == pytest.approx(seen[name] / 448, rel=1e-5)
    # keys before their rotation, which changes no length of a pair of numbers by more than the square root of two
    scale = float(stored["model.layers.0.self_attn.k_proj.output_scale"])
    assert seen["keys"] / 448 / 2**0.5 <= scale <= seen["keys"] / 448 * 2**0.5
    assert sum("output_scale" in name for name in stored) == 2
    model: Any = anybit.load(tmp_path / "fp8")
    with torch.no_grad():
        wanted = transformers.AutoModelForCausalLM.from_pretrained(dense)(IDS).logits
        assert ((model(IDS).logits - wanted).norm() / wanted.norm()) < 0.06
    for symmetric in (True, False):
        int8 = specification("int8", "per_tensor", symmetric=symmetric)
        folder = tmp_path / f"int8-{symmetric}"
        anybit.quantize(dense, folder, _quark(int8), calibration=IDS)
        stored = load_file(folder / "model.safetensors")
        own = {name: stored[f"model.layers.0.mlp.down_proj.input_{name}"] for name in ("scale", "zero_point")}
        if symmetric:
            assert float(own["scale"]) == pytest.approx(seen["mlp.down_proj"] / 127.5, rel=1e-5)
            assert int(own["zero_point"]) == 0
        else:
            assert float(own["scale"]) <= 2 * seen["mlp.down_proj"] / 255 * (1 + 1e-5)
            # the larger end stands at the end of the codes
            ends = [(code - int(own["zero_point"])) * float(own["scale"]) for code in (-128, 127)]
            assert max(map(abs, ends)) == pytest.approx(seen["mlp.down_proj"], rel=0.01)
        with torch.no_grad():
            assert torch.isfinite(anybit.load(folder)(IDS).logits).all()


def test_quark_without_data_says_what_is_missing(dense: Path, tmp_path: Path) -> None:
    fp8 = specification("fp8_e4m3", "per_tensor")
    with pytest.raises(CalibrationNeeded, match="--calib"):
        anybit.quantize(dense, tmp_path / "no", _quark(fp8))
    config = QuarkConfig(quant_method="fp8", activation_scheme="static", export={})
    with pytest.raises(CalibrationNeeded, match="--calib"):
        anybit.plan(dense, config)
    anybit.quantize(dense, tmp_path / "made", config, calibration=IDS)
    assert "model.layers.0.mlp.up_proj.input_scale" in load_file(tmp_path / "made" / "model.safetensors")
