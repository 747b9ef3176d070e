"""compressed-tensors from dense weights with data: static parameters by the observers' formulas, GPTQ in both orders."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import anybit
from anybit import CompressedTensorsConfig

IDS = torch.randint(0, 96, (6, 16), generator=torch.Generator().manual_seed(0))
LAYER = "model.layers.0."


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "dense"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, dtype="float32", tie_word_embeddings=False,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def seen(dense: Path) -> dict[str, torch.Tensor]:
    """What enters and leaves the layers of the dense model's first block; keys with their rotation, values."""
    from transformers.models.llama import modeling_llama

    model = transformers.AutoModelForCausalLM.from_pretrained(dense)
    found: dict[str, torch.Tensor] = {}
    for name, module in model.model.layers[0].named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda _, args, out, name=name: found.update({name: args[0], f"{name} out": out})
            )
    turn = modeling_llama.apply_rotary_pos_emb

    def spy(query: torch.Tensor, key: torch.Tensor, *rest: Any, **more: Any) -> Any:
        query, key = turn(query, key, *rest, **more)
        found.setdefault("keys", key)
        return query, key

    modeling_llama.apply_rotary_pos_emb = spy
    try:
        with torch.no_grad():
            model(IDS)
    finally:
        modeling_llama.apply_rotary_pos_emb = turn
    return found


def made(dense: Path, folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    config = CompressedTensorsConfig(ignore=["lm_head"], **options)
    anybit.quantize(dense, folder, config, calibration=IDS)
    model: Any = anybit.load(folder)
    with torch.no_grad():
        assert torch.isfinite(model(IDS).logits).all()
    return load_file(folder / "model.safetensors")


def group(weights: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"config_groups": {"g": {"targets": ["Linear"], "weights": weights, **more}}}


FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}


def test_fp8_inputs_stand_at_448(dense: Path, seen: dict[str, torch.Tensor], tmp_path: Path) -> None:
    stored = made(dense, tmp_path / "made", config_groups={"FP8": ["Linear"]})
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
        scale = stored[f"{LAYER}{name}.input_scale"]
        assert scale.shape == (1,)
        assert torch.allclose(scale, seen[name].abs().max() / 448, rtol=1e-5)
        assert stored[f"{LAYER}{name}.weight"].dtype == torch.float8_e4m3fn
    written = json.loads((tmp_path / "made" / "config.json").read_text())["quantization_config"]
    assert (written["format"], written["quantization_status"]) == ("float-quantized", "compressed")


def test_nvfp4_global_scales_divide_and_are_one_for_joined_layers(
    dense: Path, seen: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    stored = made(dense, tmp_path / "made", config_groups={"NVFP4": ["Linear"]})
    plain = load_file(dense / "model.safetensors")
    for owner, names in (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj"))):
        largest = max(float(plain[f"{LAYER}{owner}.{name}.weight"].abs().max()) for name in names)
        for name in names:
            own = f"{LAYER}{owner}.{name}."
            assert torch.allclose(stored[f"{own}weight_global_scale"], torch.tensor([448 * 6 / largest]), rtol=1e-6)
            wanted = 448 * 6 / seen[f"{owner}.{name}"].abs().max()
            assert torch.allclose(stored[f"{own}input_global_scale"], wanted, rtol=1e-5)


def test_asymmetric_integers_have_a_scale_and_a_zero_point(
    dense: Path, seen: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    inputs = {"num_bits": 8, "strategy": "tensor", "dynamic": False, "symmetric": False}
    stored = made(dense, tmp_path / "made", **group({"num_bits": 8, "strategy": "channel"}, input_activations=inputs))
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        low, high = seen[name].min().clamp(max=0), seen[name].max().clamp(min=0)
        scale = (high - low) / 255
        assert torch.allclose(stored[f"{LAYER}{name}.input_scale"], scale, rtol=1e-5)
        zero = (-128 - low / scale).round().clamp(-128, 127)
        found = stored[f"{LAYER}{name}.input_zero_point"]
        assert found.dtype == torch.int8
        assert abs(int(found) - int(zero)) <= 1  # the scale's last bit may move a tie


@pytest.mark.parametrize("strategy", ["tensor", "attn_head"])
def test_a_cache_has_scales_of_heads_or_one(
    dense: Path, seen: dict[str, torch.Tensor], tmp_path: Path, strategy: str
) -> None:
    scheme = {**FP8, "strategy": strategy}
    stored = made(dense, tmp_path / "made", config_groups={"W8A16": ["Linear"]}, kv_cache_scheme=scheme)
    values = seen["self_attn.v_proj out"].view(6, 16, 2, 16).transpose(1, 2)
    for name, states in (("k_scale", seen["keys"]), ("v_scale", values)):
        largest = states.abs().amax((0, 2, 3)).view(2, 1, 1)
        wanted = (largest if strategy == "attn_head" else largest.max().view(1)) / 448
        assert stored[f"{LAYER}self_attn.{name}"].shape == wanted.shape
        assert torch.allclose(stored[f"{LAYER}self_attn.{name}"], wanted, rtol=1e-5)


def test_groups_that_name_attention_measure_queries_too(dense: Path, tmp_path: Path) -> None:
    groups = {
        "a": {"targets": ["LlamaAttention"], "input_activations": FP8},
        "w": {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}},
    }
    stored = made(dense, tmp_path / "made", config_groups=groups)
    assert all(stored[f"{LAYER}self_attn.{own}_scale"].shape == (1,) for own in "qkv")


def test_outputs_of_layers_are_measured(dense: Path, seen: dict[str, torch.Tensor], tmp_path: Path) -> None:
    stored = made(dense, tmp_path / "made", **group(FP8, input_activations=FP8, output_activations=FP8))
    for name in ("self_attn.k_proj", "mlp.up_proj"):
        wanted = seen[f"{name} out"].abs().max() / 448
        assert torch.allclose(stored[f"{LAYER}{name}.output_scale"], wanted, rtol=1e-5)


def test_averages_move_with_each_sample(dense: Path, seen: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """The observer "minmax": both ends move by averaging_constant of the way to those of the next sample."""
    inputs = {**FP8, "observer": "minmax", "observer_kwargs": {"averaging_constant": 0.25}}
    stored = made(dense, tmp_path / "made", **group(FP8, input_activations=inputs))
    x = seen["mlp.down_proj"]
    low, high = x[0].amin(0), x[0].amax(0)
    for sample in x[1:]:
        low, high = low + 0.25 * (sample.amin(0) - low), high + 0.25 * (sample.amax(0) - high)
    found = float(stored[f"{LAYER}mlp.down_proj.input_scale"])
    assert found == pytest.approx(float(max(-low.min(), high.max())) / 448, rel=1e-4)
    assert found < float(x.abs().max()) / 448


def _moments(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1]).pow(2).sum(0)


def test_gptq_groups_columns_by_what_their_inputs_are(
    dense: Path, seen: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """actorder "group": columns in the order of falling second moments, 32 to a group, told by weight_g_idx."""
    stored = made(dense, tmp_path / "made", **group({"num_bits": 4, "group_size": 32, "actorder": "group"}))
    for name in ("self_attn.q_proj", "mlp.gate_proj"):
        index = stored[f"{LAYER}{name}.weight_g_idx"]
        assert index.dtype == torch.int32
        order = _moments(seen[name]).argsort(descending=True)
        wanted = torch.empty(64, dtype=torch.int32)
        wanted[order] = torch.arange(64, dtype=torch.int32) // 32
        assert (index != wanted).sum() <= 2  # two moments may be as good as equal


def test_gptq_with_static_groups_keeps_the_scales_of_rounding(dense: Path, tmp_path: Path) -> None:
    """actorder "weight": columns are only met in that order; scales are max / 7.5 of the stored groups, and no index is."""
    stored = made(dense, tmp_path / "made", **group({"num_bits": 4, "group_size": 32, "actorder": "weight"}))
    weight = load_file(dense / "model.safetensors")[f"{LAYER}self_attn.q_proj.weight"]
    wanted = weight.view(64, 2, 32).abs().amax(-1) / 7.5
    assert torch.allclose(stored[f"{LAYER}self_attn.q_proj.weight_scale"], wanted, rtol=1e-6)
    assert not any("g_idx" in name for name in stored)


def test_calibrated_codes_beat_rounded_ones(dense: Path, seen: dict[str, torch.Tensor], tmp_path: Path) -> None:
    options = group({"num_bits": 3, "group_size": 32, "actorder": "weight"})
    made(dense, tmp_path / "made", **options)
    anybit.quantize(dense, tmp_path / "rounded", CompressedTensorsConfig(ignore=["lm_head"], **options))
    weight = load_file(dense / "model.safetensors")[f"{LAYER}mlp.up_proj.weight"]
    x = seen["mlp.up_proj"].reshape(-1, 64)
    errors = []
    for folder in ("made", "rounded"):
        layer: Any = anybit.load(tmp_path / folder).model.layers[0].mlp.up_proj  # type: ignore[union-attr]
        errors.append(float((x @ (layer.dequantize(torch.float32) - weight).T).norm()))
    assert errors[0] < 0.8 * errors[1]


def test_without_data_columns_stay_in_order_and_the_index_says_so(dense: Path, tmp_path: Path) -> None:
    config = CompressedTensorsConfig(**group({"num_bits": 4, "group_size": 32, "actorder": "group"}))
    plan = anybit.quantize(dense, tmp_path / "made", config)
    assert any("refuses such files since 0.19" in note for note in plan.notes)
    index = load_file(tmp_path / "made" / "model.safetensors")[f"{LAYER}self_attn.q_proj.weight_g_idx"]
    assert torch.equal(index, torch.arange(64, dtype=torch.int32) // 32)
    anybit.load(tmp_path / "made")
