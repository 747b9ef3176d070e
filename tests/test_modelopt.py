"""ModelOpt and NVFP4 where the laws cannot see them: every algorithm's tensors, what configurations say and do not say, caches,
scaled inputs, creation.
"""

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
from anybit.errors import CalibrationNeeded, CorruptFile, InvalidOption, MissingTensor, ShapeMismatch
from anybit.kernels.reference import multiply
from anybit.methods._modelopt_layouts import Int4AwqLayout, ModelOptFp8Layout
from anybit.methods._scaled_floats import NvFp4Layout
from anybit.methods.modelopt import ModelOptConfig
from anybit.methods.nvfp4 import NVFP4Config
from anybit.quantizers import AutoHfQuantizer, AutoQuantizationConfig
from anybit.weight import ModuleInfo, Weight
from anybit.weight.levels import table

GOLDEN = Path(__file__).parent / "golden" / "modelopt"
E4M3 = torch.float8_e4m3fn
IDS = torch.tensor([[3, 17, 60, 4, 99, 1, 0, 42]])


def linear(rows: int, columns: int, name: str = "model.layers.0.mlp.up_proj") -> ModuleInfo:
    return ModuleInfo(name, "linear", (rows, columns), "bfloat16")


def read(config: dict[str, Any], module: ModuleInfo, **tensors: torch.Tensor) -> tuple[Any, Weight, Any]:
    quantizer: Any = AutoHfQuantizer.from_config({"quant_method": "modelopt", **config})
    infos = {
        name: TensorInfo(
            f"{module.name}.{name}", str(tensor.dtype)[6:], tuple(tensor.shape), tensor.nbytes, "model.safetensors"
        )
        for name, tensor in tensors.items()
    }
    layout = quantizer.layout_of(module, infos, tensors.__getitem__)
    weight = layout.decode(tensors)
    encoded = layout.encode(weight)
    assert {name: tensor.dtype for name, tensor in encoded.items()} == {
        name: tensor.dtype for name, tensor in tensors.items()
    }
    assert all(
        torch.equal(encoded[name].reshape(-1).view(torch.uint8), tensors[name].reshape(-1).view(torch.uint8))
        for name in tensors
    )
    return layout, weight, quantizer


def codes(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(E4M3)


def nibbles(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def rule(weight: Weight) -> str | None:
    return weight.activation.rule if weight.activation is not None else None


# --- every algorithm's tensors ---------------------------------------------------------------------------------------------


def test_fp8_with_one_scale() -> None:
    tensors = {"weight": codes(8, 24), "weight_scale": torch.tensor(0.5), "input_scale": torch.tensor(0.25)}
    _, weight, quantizer = read({"quant_algo": "FP8"}, linear(8, 24), **tensors)
    assert torch.equal(weight.to_dense(torch.float32), tensors["weight"].float() * 0.5)
    assert rule(weight) == "e4m3_static"
    assert not quantizer.decisions


def test_fp8_with_a_scale_for_each_row() -> None:
    weight, scale = codes(8, 24), torch.rand(8) + 0.5
    _, decoded, _ = read({"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, linear(8, 24), weight=weight, weight_scale=scale)
    assert torch.equal(decoded.to_dense(torch.float32), weight.float() * scale[:, None])
    assert rule(decoded) == "e4m3_token"


@pytest.mark.parametrize("shape", [(3, 1, 2, 1), (3, 2)])
def test_fp8_in_blocks_of_two_dimensions(shape: tuple[int, ...]) -> None:
    weight, scale = codes(300, 160), torch.rand(shape) + 0.5
    _, decoded, _ = read({"quant_algo": "fp8_pb_wo"}, linear(300, 160), weight=weight, weight_scale=scale)
    wanted = scale.view(3, 2).repeat_interleave(128, 0)[:300].repeat_interleave(128, 1)[:, :160]
    assert torch.equal(decoded.to_dense(torch.float32), weight.float() * wanted)
    assert decoded.activation is None


def test_mxfp8() -> None:
    weight, scale = codes(8, 96), torch.randint(110, 130, (8, 3), dtype=torch.uint8)
    _, decoded, _ = read({"quant_algo": "MXFP8"}, linear(8, 96), weight=weight, weight_scale=scale)
    wanted = weight.float() * torch.exp2(scale.float() - 127).repeat_interleave(32, 1)
    assert torch.equal(decoded.to_dense(torch.float32), wanted)
    assert rule(decoded) == "mx_e4m3"


@pytest.mark.parametrize("size", [16, 32])
def test_nvfp4_for_weights_alone_in_groups_of_two_sizes(size: int) -> None:
    weight, scale, common = nibbles(8, 48), (torch.rand(8, 96 // size) + 0.5).to(E4M3), torch.tensor(0.125)
    config = {"quant_algo": "W4A16_NVFP4", "group_size": size}
    tensors = {"weight": weight, "weight_scale": scale, "weight_scale_2": common}
    _, decoded, _ = read(config, linear(8, 96), **tensors)
    numbers = table("e2m1")[torch.stack([weight & 15, weight >> 4], -1).flatten(1).long()]
    wanted = numbers * (scale.float() * 0.125).repeat_interleave(size, 1)
    assert torch.equal(decoded.to_dense(torch.float32), wanted)
    assert decoded.activation is None


@pytest.mark.parametrize("size", [128, 32])
def test_int4_is_packed_along_the_output(size: int) -> None:
    weight, scale = nibbles(4, 256), torch.rand(8, 256 // size) + 0.5
    config = {"quant_algo": "W4A16_AWQ", "group_size": size, "has_zero_point": False, "pre_quant_scale": True}
    _, decoded, _ = read(config, linear(8, 256), weight=weight, weight_scale=scale)
    signed = torch.stack([weight & 15, weight >> 4], 1).reshape(8, 256).int()
    signed = torch.where(signed > 7, signed - 16, signed)
    assert torch.equal(decoded.to_dense(torch.float32), signed * scale.repeat_interleave(size, 1))


def test_w4a8_quantizes_inputs_too() -> None:
    tensors = {
        "weight": nibbles(4, 128), "weight_scale": torch.rand(8, 1), "weight_scale_2": torch.tensor(0.01),
        "input_scale": torch.tensor(0.05),
    }  # fmt: skip
    _, decoded, quantizer = read({"quant_algo": "W4A8_AWQ"}, linear(8, 128), **tensors)
    x = torch.randn(3, 128)
    rounded = (x / 0.05).clamp(-448, 448).to(E4M3).double() * torch.tensor(0.05).double()
    wanted = rounded @ decoded.to_dense(torch.float32).double().T
    assert (multiply(decoded, x, None) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert not quantizer.decisions


def test_inputs_of_nvfp4_have_scales_below_a_stored_one() -> None:
    tensors = {
        "weight": nibbles(8, 32), "weight_scale": (torch.rand(8, 4) + 0.5).to(E4M3), "weight_scale_2": torch.tensor(0.1),
        "input_scale": torch.tensor(0.002),
    }  # fmt: skip
    _, decoded, _ = read({"quant_algo": "NVFP4"}, linear(8, 64), **tensors)
    x = torch.randn(3, 64)
    x[1, :16] = 0
    groups = x.view(3, 4, 16)
    scales = (groups.abs().amax(-1, keepdim=True) / 6 / 0.002).clamp(max=448).to(E4M3).float() * torch.tensor(0.002)
    levels = table("e2m1")[:8]
    numbers = (groups / scales).nan_to_num(0)
    distance = (numbers.abs()[..., None] - levels).abs()
    rounded = levels[distance.argmin(-1)] * numbers.sign() * scales
    wanted = rounded.view(3, 64).double() @ decoded.to_dense(torch.float32).double().T
    assert (multiply(decoded, x, None) - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("rows", [True, False])
def test_int8_with_scales_of_rows_or_one(rows: bool) -> None:
    weight = torch.randint(-128, 128, (8, 24), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    scale = torch.rand(8) + 0.5 if rows else torch.tensor(0.5)
    _, decoded, quantizer = read({"quant_algo": "W8A16"}, linear(8, 24), weight=weight, weight_scale=scale)
    assert torch.equal(decoded.to_dense(torch.float32), weight.float() * scale.reshape(-1, 1))
    assert decoded.activation is None
    assert not quantizer.decisions


def test_int8_inputs_are_whole_numbers_of_their_scale() -> None:
    weight = torch.randint(-128, 128, (8, 24), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    tensors = {"weight": weight, "weight_scale": torch.rand(8) + 0.5, "input_scale": torch.tensor(0.02)}
    _, decoded, quantizer = read({"quant_algo": "W8A8_SQ_PER_CHANNEL"}, linear(8, 24), **tensors)
    assert not quantizer.decisions
    x = torch.randn(3, 24) * 2
    wanted = (x / 0.02).round().clamp(-128, 127).double() * torch.tensor(0.02).double()
    wanted = wanted @ decoded.to_dense(torch.float32).double().T
    assert (multiply(decoded, x, None) - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_nvfp4_weights_with_fp8_inputs() -> None:
    tensors = {
        "weight": nibbles(8, 32), "weight_scale": (torch.rand(8, 2) + 0.5).to(E4M3), "weight_scale_2": torch.tensor(0.1),
        "input_scale": torch.tensor(0.05),
    }  # fmt: skip
    _, decoded, quantizer = read({"quant_algo": "W4A8_NVFP4_FP8", "group_size": 32}, linear(8, 64), **tensors)
    assert not quantizer.decisions
    x = torch.randn(3, 64)
    rounded = (x / 0.05).clamp(-448, 448).to(E4M3).double() * torch.tensor(0.05).double()
    wanted = rounded @ decoded.to_dense(torch.float32).double().T
    assert (multiply(decoded, x, None) - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize(
    ("algo", "used"), [("W4A8_MXFP4_FP8", "e4m3_tensor"), ("mxfp4", "mx_e2m1"), ("FP8", "mx_e2m1")]
)
def test_mxfp4_and_what_its_name_says_of_inputs(algo: str, used: str) -> None:
    weight, scale = nibbles(8, 48), torch.randint(110, 130, (8, 3), dtype=torch.uint8)
    config = {"quant_algo": algo} if algo != "FP8" else {}
    _, decoded, quantizer = read(config, linear(8, 96), weight=weight, weight_scale=scale)
    numbers = table("e2m1")[torch.stack([weight & 15, weight >> 4], -1).flatten(1).long()]
    wanted = numbers * torch.exp2(scale.float() - 127).repeat_interleave(32, 1)
    assert torch.equal(decoded.to_dense(torch.float32), wanted)
    assert rule(decoded) == used
    assert bool(quantizer.decisions) == (algo == "FP8")  # said where the configuration is silent


def test_one_dynamic_scale_for_all_tokens() -> None:
    """W4A8_MXFP4_FP8, exported without input scales: the largest magnitude of a call stands at 448."""
    weight, scale = nibbles(8, 16), torch.full((8, 1), 127, dtype=torch.uint8)
    _, decoded, _ = read({"quant_algo": "W4A8_MXFP4_FP8"}, linear(8, 32), weight=weight, weight_scale=scale)
    x = torch.randn(3, 32)
    step = x.abs().max() / 448
    wanted = ((x / step).to(E4M3).double() * step.double()) @ decoded.to_dense(torch.float32).double().T
    assert (multiply(decoded, x, None) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert not multiply(decoded, torch.zeros(2, 32), None).any()


@pytest.mark.parametrize("algo", ["NVFP4_AWQ", "W8A8_SQ_PER_CHANNEL", "W4A8_AWQ"])
def test_experts_scale_their_inputs_before_they_quantize_them(algo: str) -> None:
    module, factors = (
        linear(8, 128, "model.layers.0.mlp.experts.1.down_proj"),
        (torch.rand(128) + 0.5).to(torch.bfloat16),
    )
    own = {
        "NVFP4_AWQ": {"weight": nibbles(8, 64), "weight_scale": torch.rand(8, 8).to(E4M3), "weight_scale_2": torch.tensor(0.1)},
        "W8A8_SQ_PER_CHANNEL": {"weight": codes(8, 128).view(torch.int8), "weight_scale": torch.rand(8)},
        "W4A8_AWQ": {"weight": nibbles(4, 128), "weight_scale": torch.rand(8, 1), "weight_scale_2": torch.tensor(0.01)},
    }[algo]  # fmt: skip
    own["input_scale"] = torch.tensor(0.01)
    _, scaled, _ = read({"quant_algo": algo}, module, **own, pre_quant_scale=factors)
    _, plain, _ = read({"quant_algo": algo}, module, **own)
    x = torch.randn(5, 128).to(torch.bfloat16)
    assert torch.equal(multiply(scaled, x, None), multiply(plain, x * factors, None))
    assert not torch.equal(multiply(scaled, x, None), multiply(plain, x, None))


# --- configurations --------------------------------------------------------------------------------------------------------


def test_a_folder_with_nothing_but_the_side_file(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "fp8", tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in config.items() if key != "quantization_config"}))
    with torch.no_grad():
        ours = anybit.load(tmp_path / "model")(IDS).logits
        wanted = anybit.load(GOLDEN / "fp8")(IDS).logits
    assert torch.equal(ours, wanted)


def test_a_wrong_algorithm_is_told_from_tensors_and_said(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "nvfp4-qwen3moe", tmp_path / "model")
    for name in ("config.json", "hf_quant_config.json"):
        file = tmp_path / "model" / name
        file.write_text(file.read_text().replace('"NVFP4"', '"W4A16_AWQ"'))
    model: Any = anybit.load(tmp_path / "model")
    note = next(note for note in model.anybit_plan.notes if "stored as NVFP4" in note)
    assert "the configuration says W4A16_AWQ" in note
    assert "more)" in note
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, anybit.load(GOLDEN / "nvfp4-qwen3moe")(IDS).logits)


def test_mixed_precision_names_an_algorithm_for_each_module() -> None:
    layers = {
        "model.layers.0.mlp.up_proj": {"quant_algo": "MXFP8"},
        "model.layers.1": {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
    }
    config = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    quantizer: Any = AutoHfQuantizer.from_config({"quant_method": "modelopt", **config})
    assert quantizer.algo_of("model.layers.0.mlp.up_proj") == "MXFP8"
    assert quantizer.algo_of("model.layers.1.mlp.up_proj") == "FP8_PER_CHANNEL_PER_TOKEN"
    assert quantizer.algo_of("model.layers.10.mlp.up_proj") is None
    scale = torch.randint(110, 130, (8, 3), dtype=torch.uint8)
    _, _, quantizer = read(config, linear(8, 96), weight=codes(8, 96), weight_scale=scale)
    assert not quantizer.decisions


def test_static_inputs_need_their_scale() -> None:
    with pytest.raises(MissingTensor, match="input_scale"):
        read({"quant_algo": "FP8"}, linear(8, 24), weight=codes(8, 24), weight_scale=torch.tensor(0.5))


def test_files_that_disagree_are_said(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "nvfp4", tmp_path / "model")
    file = tmp_path / "model" / "hf_quant_config.json"
    file.write_text(file.read_text().replace('"NVFP4"', '"FP8"'))
    plan = anybit.plan(tmp_path / "model")
    assert any("'NVFP4' in config.json and 'FP8' in the side file" in note for note in plan.notes)


def test_layers_that_stay_as_their_fp8_source_had_them() -> None:
    weight, scale = codes(130, 256), torch.rand(2, 2) + 0.5
    _, decoded, quantizer = read({"quant_algo": "NVFP4"}, linear(130, 256), weight=weight, weight_scale_inv=scale)
    wanted = scale.repeat_interleave(128, 0)[:130].repeat_interleave(128, 1)
    assert torch.equal(decoded.to_dense(torch.float32), weight.float() * wanted)
    assert rule(decoded) == "e4m3_group"
    assert "FP8 in blocks" in next(iter(quantizer.decisions))


@pytest.mark.parametrize("named", ["modelopt_fp4", "modelopt"])
def test_names_of_the_method(named: str) -> None:
    config = AutoQuantizationConfig.from_dict({"quant_method": named, "quant_algo": "NVFP4"})
    assert isinstance(config, ModelOptConfig)
    assert config.cache_algo is None
    assert AutoQuantizationConfig.from_dict({"quant_algo": "FP8", "kv_cache_quant_algo": "fp8"}).cache_algo == "FP8"


# --- keys and values -------------------------------------------------------------------------------------------------------


@pytest.fixture
def with_cache(tmp_path: Path) -> Path:
    """The FP8 golden with scales for keys and values."""
    shutil.copytree(GOLDEN / "fp8", tmp_path / "model")
    tensors = load_file(GOLDEN / "fp8" / "model.safetensors")
    layers = {name.split(".self_attn")[0] for name in tensors if ".self_attn" in name}
    for layer in layers:
        tensors[f"{layer}.self_attn.k_proj.k_scale"] = torch.tensor(0.02)
        tensors[f"{layer}.self_attn.v_proj.v_scale"] = torch.tensor(0.01)
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    set_config(tmp_path / "model", kv_cache_scheme={"dynamic": False, "num_bits": 8, "type": "float"})
    return tmp_path / "model"


def set_config(folder: Path, **changed: Any) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"].update(changed)
    file.write_text(json.dumps(config))


def as_fp8(states: torch.Tensor, scale: float) -> torch.Tensor:
    factor = torch.tensor(scale)
    return ((states.float() / factor).clamp(-448, 448).to(E4M3).float() * factor).to(states.dtype)


def test_keys_and_values_are_rounded_as_the_cache_holds_them(with_cache: Path, monkeypatch: Any) -> None:
    from transformers.models.llama import modeling_llama

    model: Any = anybit.load(with_cache)
    assert not model.anybit_plan.notes
    with torch.no_grad():
        ours = model(IDS).logits
        steps = torch.cat([model(IDS[:, :5], use_cache=True).logits, ours[:, 5:]], 1)
        again = model.generate(IDS, max_new_tokens=2, do_sample=False)
        plain: Any = anybit.load(GOLDEN / "fp8")
        unrounded = plain(IDS).logits
        turn = modeling_llama.apply_rotary_pos_emb

        def rounded(query: torch.Tensor, key: torch.Tensor, *rest: Any, **more: Any) -> Any:
            query, key = turn(query, key, *rest, **more)
            return query, as_fp8(key, 0.02)

        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rounded)
        for layer in plain.model.layers:
            layer.self_attn.v_proj.register_forward_hook(lambda _, __, output: as_fp8(output, 0.01))
        wanted = plain(IDS).logits
    assert torch.equal(ours, wanted)
    assert not torch.equal(ours, unrounded)
    assert torch.allclose(steps, ours, atol=0.05)
    assert again.shape == (1, 10)


def test_scales_of_the_cache_are_saved_and_not_left_in_a_dense_model(with_cache: Path, tmp_path: Path) -> None:
    anybit.load(with_cache).save_pretrained(tmp_path / "again")  # type: ignore[operator]
    before, after = (load_file(folder / "model.safetensors") for folder in (with_cache, tmp_path / "again"))
    assert set(before) == set(after)
    anybit.dequantize(with_cache, tmp_path / "dense")
    assert not any("_scale" in name for name in load_file(tmp_path / "dense" / "model.safetensors"))


def test_a_cache_of_another_kind_is_kept_and_said(with_cache: Path) -> None:
    set_config(with_cache, kv_cache_scheme=None, kv_cache_quant_algo="INT8")
    model: Any = anybit.load(with_cache)
    assert any("INT8 is not supported" in note for note in model.anybit_plan.notes)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, anybit.load(GOLDEN / "fp8")(IDS).logits)


def test_nvfp4_keys_and_values_have_scales_below_the_stored_one(with_cache: Path) -> None:
    """Runs of 16 along the head: e4m3(max / 6 / stored) * stored, then the nearest of E2M1."""
    set_config(with_cache, kv_cache_scheme="NVFP4")
    model: Any = anybit.load(with_cache)
    assert not model.anybit_plan.notes
    seen: dict[str, torch.Tensor] = {}
    plain: Any = anybit.load(GOLDEN / "fp8")
    plain.model.layers[0].self_attn.v_proj.register_forward_hook(lambda _, __, out: seen.update(before=out))
    with torch.no_grad():
        found = model(IDS, use_cache=True).past_key_values.layers[0].values[0]  # [heads, length, head_dim]
        plain(IDS)
    heads, length, width = found.shape
    before = seen["before"][0].view(length, heads, width).transpose(0, 1).float().unflatten(-1, (-1, 16))
    stored = torch.tensor(0.01)
    scales = (before.abs().amax(-1, keepdim=True) / 6 / stored).clamp(max=448).to(E4M3).float() * stored
    levels, numbers = table("e2m1")[:8], (before / scales).nan_to_num(0)
    wanted = levels[(numbers.abs()[..., None] - levels).abs().argmin(-1)] * numbers.sign() * scales
    assert torch.equal(found, wanted.flatten(-2).to(found.dtype))


@pytest.mark.parametrize("kind", ["FP8", "NVFP4"])
def test_a_cache_without_stored_scales_has_scales_of_one(with_cache: Path, kind: str) -> None:
    """As engines run such files: vLLM takes 1.0 for scales that a checkpoint does not have."""
    tensors = load_file(with_cache / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("k_scale", "v_scale"))]:
        del tensors[name]
    save_file(tensors, with_cache / "model.safetensors", metadata={"format": "pt"})
    set_config(with_cache, kv_cache_scheme=None, kv_cache_quant_algo=kind)
    model: Any = anybit.load(with_cache)
    assert any(
        f"{kind} without stored scales" in note and "layers.0.self_attn" in note for note in model.anybit_plan.notes
    )
    with torch.no_grad():
        found = model(IDS, use_cache=True).past_key_values.layers[0].values
    if kind == "FP8":
        assert torch.equal(found, found.to(E4M3).to(found.dtype))
    else:
        assert all(len(run.unique()) <= 15 for run in found.float().reshape(-1, 16))
    model.save_pretrained(with_cache.parent / "again")
    assert set(load_file(with_cache.parent / "again" / "model.safetensors")) == set(tensors)


@pytest.mark.parametrize("number", [float("nan"), 0.0])
def test_a_scale_of_the_cache_that_cannot_be_one(with_cache: Path, number: float) -> None:
    tensors = load_file(with_cache / "model.safetensors")
    tensors["model.layers.0.self_attn.k_proj.k_scale"] = torch.tensor(number)
    save_file(tensors, with_cache / "model.safetensors")
    with pytest.raises(CorruptFile, match=r"k_proj\.k_scale"):
        anybit.plan(with_cache)


# --- scaled inputs ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def scaled(tmp_path: Path) -> Path:
    """The FP8 golden's model in int4, with factors for the inputs of two layers."""
    anybit.dequantize(GOLDEN / "fp8", tmp_path / "dense")
    config = ModelOptConfig(quant_algo="W4A16_AWQ", group_size=64)
    anybit.quantize(tmp_path / "dense", tmp_path / "int4", config)
    tensors = load_file(tmp_path / "int4" / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name in ("mlp.down_proj", "self_attn.o_proj"):
        columns = tensors[f"model.layers.0.{name}.weight"].shape[1]
        tensors[f"model.layers.0.{name}.pre_quant_scale"] = (
            torch.rand(columns, generator=generator) + 0.5
        ).to(torch.bfloat16)  # fmt: skip
    save_file(tensors, tmp_path / "int4" / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "int4"


def test_inputs_are_scaled_before_the_product(scaled: Path) -> None:
    tensors = load_file(scaled / "model.safetensors")
    model: Any = anybit.load(scaled)
    layer = model.model.layers[0].mlp.down_proj
    x = torch.randn(4, 256).to(torch.bfloat16)
    factors = tensors["model.layers.0.mlp.down_proj.pre_quant_scale"]
    with torch.no_grad():
        ours = layer(x)
    wanted = (x * factors).double() @ layer.dequantize(torch.float32).double().T
    assert (ours - wanted).abs().max() < 2**-7 * wanted.abs().max()
    model.save_pretrained(scaled.parent / "again")
    after = load_file(scaled.parent / "again" / "model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in tensors.items())


def test_a_dense_model_needs_no_factors(scaled: Path, tmp_path: Path) -> None:
    with torch.no_grad():
        packed: Any = anybit.load(scaled, dtype=torch.float32)
        wanted = packed(IDS).logits
        in_place = packed.dequantize()(IDS).logits
        anybit.dequantize(scaled, tmp_path / "plain", dtype=torch.float32)
        from_file = anybit.load(tmp_path / "plain", dtype=torch.float32)(IDS).logits
    assert (in_place - wanted).abs().max() < 1e-4
    assert (from_file - wanted).abs().max() < 1e-4


def test_an_expert_keeps_its_factors_in_the_weight() -> None:
    weight, scale = nibbles(4, 128), torch.rand(8, 1) + 0.5
    factors = (torch.rand(128) + 0.5).to(torch.bfloat16)
    module = linear(8, 128, "model.layers.0.mlp.experts.1.down_proj")
    plain = Int4AwqLayout((8, 128)).decode({"weight": weight, "weight_scale": scale}).to_dense(torch.float32)
    _, decoded, _ = read(
        {"quant_algo": "W4A16_AWQ"}, module, weight=weight, weight_scale=scale, pre_quant_scale=factors
    )
    assert torch.equal(decoded.to_dense(torch.float32), plain * factors.float())


# --- SVDQuant --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def svd(tmp_path: Path) -> Path:
    """The NVFP4 golden's model with scaled inputs and two thin matrices beside one layer."""
    shutil.copytree(GOLDEN / "nvfp4", tmp_path / "svd")
    set_config(tmp_path / "svd", quant_algo="NVFP4_SVD", pre_quant_scale=True)
    file = tmp_path / "svd" / "hf_quant_config.json"
    file.write_text(file.read_text().replace('"NVFP4"', '"NVFP4_SVD"'))
    tensors = load_file(tmp_path / "svd" / "model.safetensors")
    rows, half = tensors["model.layers.0.mlp.down_proj.weight"].shape
    generator = torch.Generator().manual_seed(2)
    prefix = "model.layers.0.mlp.down_proj"
    tensors[f"{prefix}.pre_quant_scale"] = (torch.rand(2 * half, generator=generator) + 0.5).to(torch.bfloat16)
    tensors[f"{prefix}.svdquant_lora_a"] = torch.randn(4, 2 * half, generator=generator).to(torch.bfloat16) / 8
    tensors[f"{prefix}.svdquant_lora_b"] = torch.randn(rows, 4, generator=generator).to(torch.bfloat16) / 8
    save_file(tensors, tmp_path / "svd" / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "svd"


def test_svdquant_adds_what_codes_do_not_hold(svd: Path) -> None:
    """y = NVFP4(x * s) + ((x * s) a^T) b^T, in float32 here so that order and rounding play no part."""
    tensors = load_file(svd / "model.safetensors")
    model: Any = anybit.load(svd, dtype="float32")
    assert not model.anybit_plan.notes
    layer, plain = (
        own.model.layers[0].mlp.down_proj for own in (model, anybit.load(GOLDEN / "nvfp4", dtype="float32"))
    )
    factors, first, second = (
        tensors[f"model.layers.0.mlp.down_proj.{name}"].float()
        for name in ("pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b")
    )
    x = torch.randn(3, len(factors))
    with torch.no_grad():
        assert torch.allclose(layer(x), plain(x * factors) + (x * factors) @ first.T @ second.T, atol=1e-5)
    model.save_pretrained(svd.parent / "again")
    after = load_file(svd.parent / "again" / "model.safetensors")
    assert after.keys() == tensors.keys()
    assert all(torch.equal(after[name].reshape(-1), tensors[name].reshape(-1)) for name in tensors)


def test_svdquant_becomes_dense_with_its_residual(svd: Path, tmp_path: Path) -> None:
    tensors = load_file(svd / "model.safetensors")
    anybit.dequantize(svd, tmp_path / "plain", dtype=torch.float32)
    anybit.dequantize(GOLDEN / "nvfp4", tmp_path / "without", dtype=torch.float32)
    name = "model.layers.0.mlp.down_proj"
    found, codes_alone = (
        load_file(tmp_path / own / "model.safetensors")[f"{name}.weight"] for own in ("plain", "without")
    )
    first, second = tensors[f"{name}.svdquant_lora_a"].float(), tensors[f"{name}.svdquant_lora_b"].float()
    assert torch.allclose(found, (codes_alone + second @ first) * tensors[f"{name}.pre_quant_scale"].float(), atol=1e-6)


def test_svdquant_with_one_of_two_matrices_is_refused(svd: Path) -> None:
    tensors = load_file(svd / "model.safetensors")
    del tensors["model.layers.0.mlp.down_proj.svdquant_lora_b"]
    save_file(tensors, svd / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MissingTensor, match=r"down_proj\.svdquant_lora_b"):
        anybit.plan(svd)


# --- creating --------------------------------------------------------------------------------------------------------------


def made(layout: Any, dense: torch.Tensor) -> dict[str, torch.Tensor]:
    weight = algorithms.get(layout.algorithm)(dense, layout.scheme(), **layout.algorithm_options())
    return dict(layout.encode(weight))


@pytest.mark.parametrize("name", ["mlp.down_proj", "self_attn.o_proj"])
def test_nvfp4_of_the_vendors_numbers_gives_back_the_vendors_bytes(name: str) -> None:
    stored = load_file(GOLDEN / "nvfp4" / "model.safetensors")
    own = {key: stored[f"model.layers.0.{name}.{key}"] for key in ("weight", "weight_scale", "weight_scale_2")}
    rows, half = own["weight"].shape
    layout = NvFp4Layout((rows, 2 * half), "float32")
    found = made(layout, layout.decode(own).to_dense(torch.float32))
    assert torch.equal(found["weight_scale_2"], own["weight_scale_2"])
    assert torch.equal(found["weight_scale"].view(torch.uint8), own["weight_scale"].view(torch.uint8))
    ours, vendors = (layout.decode(one).to_dense() for one in (found, own))
    assert torch.equal(ours, vendors)
    # codes of zero may differ in their sign, which dense numbers do not keep
    zero = torch.tensor([0, 8], dtype=torch.uint8)
    both = [torch.stack([one["weight"] & 15, one["weight"] >> 4], -1) for one in (found, own)]
    assert torch.equal(both[0][~torch.isin(both[1], zero)], both[1][~torch.isin(both[1], zero)])


def test_nvfp4_ties_signs_and_empty_blocks() -> None:
    dense = torch.zeros(1, 48)
    dense[0, :9] = torch.tensor([6, 5, 3.5, 2.5, 1.75, 1.25, 0.75, 0.25, -0.2])
    dense[0, 9] = -0.0
    dense[0, 16] = 6 * 448.0  # the largest of all: weight_scale_2 is 1
    found = made(NvFp4Layout((1, 48)), dense)
    assert found["weight_scale_2"] == 1.0
    assert found["weight_scale"].float().tolist() == [[1.0, 448.0, 1.0]]
    numbers = torch.stack([found["weight"] & 15, found["weight"] >> 4], -1).flatten()
    assert numbers[:10].tolist() == [7, 6, 6, 4, 4, 2, 2, 0, 8, 0]


def test_fp8_divides_in_the_models_dtype() -> None:
    dense = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    layout = ModelOptFp8Layout((16, 64), "bfloat16", scale_form="scalar")
    found = made(layout, dense)
    scale = dense.abs().max().float() / 448
    assert found["weight_scale"] == scale
    assert torch.equal(found["weight"].view(torch.uint8), (dense / scale).to(E4M3).view(torch.uint8))


def test_a_tile_alone_is_stored_as_one_scale() -> None:
    """fp8_pb_wo of a weight no larger than 128 x 128, as ModelOpt exports it; read without a remark."""
    config = ModelOptConfig(quant_algo="fp8_pb_wo")
    quantizer: Any = AutoHfQuantizer.from_config(config, pre_quantized=False)
    quantizer.skip_reasons = {}
    dense = torch.randn(96, 128, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    found = made(quantizer.layout_for(linear(96, 128)), dense)
    assert torch.equal(found["weight_scale"], dense.float().abs().max() / 448)
    _, weight, reader = read({"quant_algo": "fp8_pb_wo"}, linear(96, 128), **found)
    assert weight.activation is None
    assert not reader.decisions
    assert quantizer.layout_for(linear(129, 128)).scale_spec() == (2, 1, 1, 1)


def test_int4_of_group_extremes() -> None:
    dense = torch.randn(6, 128, generator=torch.Generator().manual_seed(0))
    found = made(Int4AwqLayout((6, 128), "float32", 64), dense)
    groups = dense.view(6, 2, 64)
    scale = groups.abs().amax(-1) / 7
    assert torch.equal(found["weight_scale"], scale)
    wanted = torch.round(groups / scale[..., None]).clamp(-8, 7).view(6, 128).int() & 15
    assert torch.equal(found["weight"].int(), wanted[0::2] | (wanted[1::2] << 4))


FREE = sorted(
    name
    for name, own in ModelOptConfig.schemes.items()
    if own["quant_algo"] not in ("FP8", "NVFP4", "W4A8_AWQ", "W8A8_SQ_PER_CHANNEL")
)


@pytest.mark.parametrize("scheme", FREE)
def test_what_needs_no_data_is_made_and_read(scheme: str, tmp_path: Path) -> None:
    anybit.dequantize(GOLDEN / "fp8", tmp_path / "dense")
    plan = anybit.quantize(tmp_path / "dense", tmp_path / "packed", ModelOptConfig(**ModelOptConfig.schemes[scheme]))
    model: Any = anybit.load(tmp_path / "packed")
    assert model.anybit_plan.coverage == plan.coverage > 0.6
    assert not model.anybit_plan.notes
    assert model.hf_quantizer.quantization_config.ignore == ["lm_head"]
    source = load_file(tmp_path / "dense" / "model.safetensors")
    for name in ("mlp.down_proj", "self_attn.k_proj"):
        dense = source[f"model.layers.0.{name}.weight"].float()
        error = model.model.layers[0].get_submodule(name).dequantize(torch.float32) - dense
        assert error.norm() / dense.norm() < (0.35 if "w4" in scheme else 0.05)  # the golden has outliers


def test_what_needs_data_says_so(tmp_path: Path) -> None:
    anybit.dequantize(GOLDEN / "fp8", tmp_path / "dense")
    with pytest.raises(CalibrationNeeded, match=r"q_proj and 6 more.*--calib"):
        anybit.plan(tmp_path / "dense", ModelOptConfig(quant_algo="NVFP4"))
    with pytest.raises(InvalidOption, match="quant_algo"):
        anybit.plan(tmp_path / "dense", ModelOptConfig(quant_algo="NVFP5"))


def test_ignored_modules_are_names_or_end_in_a_star(tmp_path: Path) -> None:
    anybit.dequantize(GOLDEN / "fp8", tmp_path / "dense")
    config = ModelOptConfig(quant_algo="MXFP8", ignore=["lm_head", "model.layers.0.self_attn*", "up_proj"])
    plan = anybit.plan(tmp_path / "dense", config)
    dense = {entry.slot.module.rpartition(".")[2] for entry in plan.entries if entry.action == "dense"}
    assert dense == {"embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "o_proj"}


# --- nvfp4, as transformers calls it ---------------------------------------------------------------------------------------


def test_nvfp4_is_made_stored_and_read(tmp_path: Path) -> None:
    anybit.dequantize(GOLDEN / "fp8", tmp_path / "dense")
    plan = anybit.quantize(
        tmp_path / "dense", tmp_path / "packed", NVFP4Config(modules_to_not_convert=["lm_head", "k_proj"])
    )
    dense = {entry.slot.module.rpartition(".")[2] for entry in plan.entries if entry.action == "dense"}
    assert dense == {"embed_tokens", "lm_head", "k_proj"}
    model: Any = anybit.load(tmp_path / "packed")
    assert model.anybit_plan.method == "nvfp4"
    source = load_file(tmp_path / "dense" / "model.safetensors")
    layer = model.model.layers[0].mlp.up_proj
    wanted = made(NvFp4Layout((256, 128), "bfloat16"), source["model.layers.0.mlp.up_proj.weight"])
    own = {name: tensor for name, tensor in layer.state_dict().items() if name != "bias"}
    assert set(own) == set(wanted)
    assert all(torch.equal(own[name].view(torch.uint8), wanted[name].view(torch.uint8)) for name in ("weight",))
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("packed", "again"))
    assert all(
        torch.equal(before[name].reshape(-1).view(torch.uint8), after[name].reshape(-1).view(torch.uint8))
        for name in before
    )


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (ModuleInfo("a.q_proj", "linear", (32, 24), "bfloat16"), "multiples of 16"),
        (ModuleInfo("a.q_proj", "linear", (32, 32), "bfloat16", has_bias=True), "bias"),
        (ModuleInfo("a.experts.0.w1", "linear", (32, 32), "bfloat16"), "experts"),
    ],
)
def test_what_transformers_leaves_dense_stays_dense(module: ModuleInfo, why: str) -> None:
    quantizer: Any = AutoHfQuantizer.from_config(NVFP4Config(), pre_quantized=False)
    assert quantizer.layout_for(module) is None
    assert why in quantizer.skip_reasons[module.name]


def test_nvfp4_without_its_scales_is_refused() -> None:
    quantizer: Any = AutoHfQuantizer.from_config({"quant_method": "nvfp4"})
    info = TensorInfo("m.weight", "uint8", (32, 16), 512, "f")
    with pytest.raises(MissingTensor, match="weight_scale"):
        quantizer.layout_of(linear(32, 32), {"weight": info}, None)
    shape = TensorInfo("m.weight_scale", "float8_e4m3fn", (32, 5), 160, "f")
    with pytest.raises(ShapeMismatch, match="NVFP4"):
        quantizer.layout_of(linear(32, 64), {"weight": info, "weight_scale": shape}, None)
