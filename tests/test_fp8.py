"""Fine-grained FP8 where the laws cannot see it: what transformers loads wrong, what configurations do not say, creation."""

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
from anybit.errors import CalibrationNeeded, CorruptFile, MissingTensor, NotRepresentable, ShapeMismatch
from anybit.kernels.reference import multiply
from anybit.methods._fp8_layouts import Fp4ExpertLayout, Fp8Layout
from anybit.methods._scaled_floats import Inputs
from anybit.methods.fp8 import FineGrainedFP8Config
from anybit.quantizers import AutoHfQuantizer, AutoQuantizationConfig
from anybit.weight import ModuleInfo, Weight

GOLDEN = Path(__file__).parent / "golden" / "fp8"
E4M3 = torch.float8_e4m3fn


def linear(rows: int, columns: int, name: str = "model.layers.0.mlp.up_proj") -> ModuleInfo:
    return ModuleInfo(name, "linear", (rows, columns), "bfloat16")


def infos(**tensors: torch.Tensor) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(name, str(tensor.dtype)[6:], tuple(tensor.shape), tensor.nbytes, "model.safetensors")
        for name, tensor in tensors.items()
    }


def read(config: dict[str, Any], module: ModuleInfo, **tensors: torch.Tensor) -> tuple[Any, Weight, Any]:
    quantizer: Any = AutoHfQuantizer.from_config({"quant_method": "fp8", **config})
    layout = quantizer.layout_of(module, infos(**tensors), tensors.__getitem__)
    return layout, layout.decode(tensors), quantizer


def codes(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(E4M3)


# --- what transformers loads wrong -----------------------------------------------------------------------------------------


def test_short_last_blocks_keep_the_block_of_the_configuration() -> None:
    """transformers divides 160 rows by 2 scales and 448 columns by 4, and takes blocks of 80 x 112."""
    weight, scale = codes(160, 448), torch.rand(2, 4) + 0.5
    _, decoded, _ = read({"weight_block_size": [128, 128]}, linear(160, 448), weight=weight, weight_scale_inv=scale)
    wanted = weight.float() * scale.repeat_interleave(128, 0)[:160].repeat_interleave(128, 1)[:, :448]
    assert torch.equal(decoded.to_dense(torch.float32), wanted)


def test_a_folder_without_configuration_is_recognized_by_its_tensors(tmp_path: Path) -> None:
    """transformers writes such folders when it saves what it loaded on a CPU, and then reads codes as numbers."""
    shutil.copytree(GOLDEN / "block128_awkward", tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in config.items() if key != "quantization_config"}))
    found: Any = AutoQuantizationConfig.from_pretrained(tmp_path / "model")
    assert (found.quant_method, found.weight_block_size) == ("fp8", [128, 128])
    ids = torch.arange(8)[None]
    with torch.no_grad():
        ours = anybit.load(tmp_path / "model")(ids).logits
        wanted = anybit.load(GOLDEN / "block128_awkward")(ids).logits
    assert torch.equal(ours, wanted)


def test_a_dense_folder_is_not_taken_for_fp8(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"a.weight": torch.zeros(2, 2), "a.weight_scale_inv": torch.ones(1, 1)}, tmp_path / "model.safetensors")
    assert AutoQuantizationConfig.find(tmp_path) is None


# --- names and forms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["weight_scale_inv", "scale", "qscale_weight"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_names_and_shapes_of_one_scale_for_the_matrix(name: str, shape: tuple[int, ...]) -> None:
    weight, scale = codes(48, 80), torch.full(shape, 0.25)
    tensors = {"weight": weight, name: scale}
    layout, decoded, _ = read({"weight_block_size": None}, linear(48, 80), **tensors)
    assert torch.equal(decoded.to_dense(torch.float32), weight.float() * 0.25)
    assert {key: tuple(tensor.shape) for key, tensor in layout.encode(decoded).items()} == {
        "weight": (48, 80), name: shape,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", ["uint8", "float8_e8m0fnu"])
def test_powers_of_two_in_both_spellings(dtype: str) -> None:
    weight, bytes_ = codes(256, 130), torch.tensor([[127, 0], [130, 254]], dtype=torch.uint8)
    scale = bytes_.view(getattr(torch, dtype))
    _, decoded, _ = read({"scale_fmt": "ue8m0"}, linear(256, 130), weight=weight, scale=scale)
    numbers = torch.exp2(bytes_.double() - 127).float()
    assert torch.equal(
        decoded.to_dense(torch.float32),
        weight.float() * numbers.repeat_interleave(128, 0).repeat_interleave(128, 1)[:, :130],
    )


def test_bytes_in_groups_of_32_are_mxfp8_whatever_the_configuration_says() -> None:
    weight, scale = codes(40, 96), torch.randint(120, 130, (40, 3), dtype=torch.uint8)
    _, decoded, quantizer = read({}, linear(40, 96), weight=weight, weight_scale_inv=scale)
    assert decoded.activation is not None
    assert decoded.activation.rule == "mx_e4m3"
    assert torch.equal(
        decoded.to_dense(torch.float32), weight.float() * torch.exp2(scale.float() - 127).repeat_interleave(32, 1)
    )
    assert "1 x 32" in next(iter(quantizer.decisions))


def test_fused_experts_with_a_scale_for_gate_and_one_for_up() -> None:
    weight, scale = codes(3, 128, 64), torch.rand(3, 2, 1) + 0.5
    module = ModuleInfo("model.layers.0.mlp.experts.gate_up_proj", "experts", (3, 128, 64), "bfloat16")
    layout, decoded, _ = read({"weight_block_size": None}, module, **{"": weight, "_scale_inv": scale})
    assert torch.equal(decoded.to_dense(torch.float32), weight.float() * scale.repeat_interleave(64, 1))
    assert set(layout.specs()) == {"", "_scale_inv"}


def test_experts_that_are_nvfp4_under_an_fp8_configuration() -> None:
    """Published checkpoints have quant_method fp8, and experts that ModelOpt quantized."""
    tensors = {
        "weight": torch.randint(0, 256, (32, 32), dtype=torch.uint8),
        "weight_scale": (torch.rand(32, 4) + 0.5).to(E4M3),
        "weight_scale_2": torch.tensor(0.01),
        "input_scale": torch.tensor(0.02),
    }
    config = {"moe_quant_algo": "NVFP4", "weight_block_size": [128, 128]}
    layout, decoded, quantizer = read(config, linear(32, 64, "model.layers.0.mlp.experts.3.up_proj"), **tensors)
    assert type(layout).__name__ == "NvFp4Layout"
    assert decoded.activation is not None
    assert (decoded.activation.rule, decoded.activation.group_size) == ("nvfp4", 16)
    assert "NvFp4Layout although quant_method is 'fp8'" in next(iter(quantizer.decisions))
    assert quantizer.quantization_config.to_dict()["moe_quant_algo"] == "NVFP4"


def test_an_embedding_in_fp8() -> None:
    weight = codes(50, 24)
    module = ModuleInfo("model.embed_tokens", "embedding", (50, 24), "bfloat16", class_name="Embedding")
    config = {"modules_to_convert": ["embed_tokens"]}
    _, decoded, _ = read(config, module, weight=weight, weight_scale=torch.tensor([0.5]))
    assert decoded.activation is None
    assert torch.equal(decoded.tree.take_rows(torch.tensor([3, 0])), weight.float()[[3, 0]] * 0.5)


# --- refusals --------------------------------------------------------------------------------------------------------------


def test_a_grid_of_no_known_block_is_refused_with_the_numbers() -> None:
    with pytest.raises(ShapeMismatch, match=r"weight_scale_inv.*\(7, 3\)"):
        read({}, linear(256, 256), weight=codes(256, 256), weight_scale_inv=torch.ones(7, 3))


def test_fp8_without_a_scale_is_refused() -> None:
    with pytest.raises(MissingTensor, match="weight_scale_inv"):
        read({}, linear(64, 64), weight=codes(64, 64))


def test_a_nan_among_the_codes_is_damage() -> None:
    weight = codes(64, 64)
    weight.view(torch.uint8)[5, 7] = 0xFF
    with pytest.raises(CorruptFile, match="row 5, column 7"):
        read({}, linear(64, 64), weight=weight, weight_scale_inv=torch.ones(1, 1))


def test_static_scales_are_measured(tmp_path: Path) -> None:
    """activation_scale: the largest input over 448; where a weight has one scale transformers ignores it, so it is not made."""
    anybit.dequantize(GOLDEN / "block128_awkward", tmp_path / "dense")
    config = FineGrainedFP8Config(activation_scheme="static", weight_block_size=[64, 64])
    with pytest.raises(CalibrationNeeded, match="--calib"):
        anybit.plan(tmp_path / "dense", config)
    ids = torch.randint(0, 96, (2, 8), generator=torch.Generator().manual_seed(0))
    anybit.quantize(tmp_path / "dense", tmp_path / "made", config, calibration=ids)
    stored = load_file(tmp_path / "made" / "model.safetensors")
    model: Any = anybit.load(tmp_path / "dense")
    seen: list[torch.Tensor] = []
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(ids)
        assert torch.isfinite(anybit.load(tmp_path / "made")(ids).logits).all()
    scale = stored["model.layers.0.self_attn.q_proj.activation_scale"]
    assert torch.allclose(scale, seen[0].float().abs().max() / 448, rtol=1e-6)
    for block in (None, [1, 32]):
        config = FineGrainedFP8Config(activation_scheme="static", weight_block_size=block)
        with pytest.raises(NotRepresentable, match=r"ModelOptConfig\(quant_algo='FP8'\)"):
            anybit.plan(tmp_path / "dense", config)


# --- inputs ----------------------------------------------------------------------------------------------------------------


def static_layer(**config: Any) -> tuple[Any, Weight, Any]:
    name = config.pop("name", "activation_scale")
    tensors = {"weight": codes(48, 256), "weight_scale_inv": torch.full((1, 2), 0.5), name: torch.tensor(0.125)}
    if config.get("weight_block_size", 0) is None:
        tensors["weight_scale_inv"] = torch.tensor(0.5)
    return read({"activation_scheme": "static", **config}, linear(48, 256), **tensors)


def test_a_static_scale_divides_and_clips() -> None:
    _, weight, _ = static_layer(weight_block_size=[128, 128])
    x = torch.randn(5, 256) * 40
    x[0, 0] = 1e4
    rounded = (x / 0.125).clamp(-448, 448).to(E4M3).float() * 0.125
    wanted = rounded.double() @ weight.to_dense(torch.float32).double().T
    assert (multiply(weight, x, None) - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_a_static_scale_beside_one_scale_for_the_matrix_is_kept_but_not_used() -> None:
    """As transformers, whose kernel for these weights measures every token."""
    layout, weight, quantizer = static_layer(weight_block_size=None)
    assert weight.activation is not None
    assert weight.activation.rule == "e4m3_token"
    assert "kept but not used" in next(iter(quantizer.decisions))
    assert torch.equal(layout.encode(weight)["activation_scale"], torch.tensor(0.125))


def test_input_scale_is_used() -> None:
    _, weight, _ = static_layer(weight_block_size=None, name="input_scale")
    assert weight.activation is not None
    assert weight.activation.rule == "e4m3_static"


@pytest.mark.parametrize(("scheme", "wanted"), [({}, "e4m3_static"), ({"activation_scheme": "dynamic"}, "e4m3_token")])
def test_input_scale_where_the_configuration_is_vague_or_is_not(scheme: dict[str, str], wanted: str) -> None:
    tensors = {"weight": codes(48, 256), "weight_scale": torch.tensor(0.5), "input_scale": torch.tensor(0.125)}
    _, weight, _ = read({"quant_algo": "MIXED_PRECISION", **scheme}, linear(48, 256), **tensors)
    assert weight.activation is not None
    assert weight.activation.rule == wanted


@pytest.mark.parametrize("named", [{"kv_cache_scheme": "static"}, {"kv_cache_quant_algo": "FP8"}, {}])
def test_scales_of_keys_and_values(named: dict[str, str], tmp_path: Path) -> None:
    source = GOLDEN / "block128_awkward"
    shutil.copytree(source, tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    for name in ("k", "v"):
        tensors[f"model.layers.0.self_attn.{name}_scale"] = torch.tensor([0.05])
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"].update(named)
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    model: Any = anybit.load(tmp_path / "model")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        rounded = not torch.equal(model(ids).logits, anybit.load(source)(ids).logits)
    assert rounded == bool(named)
    assert any("kept and not used" in note for note in model.anybit_plan.notes) == (not named)
    model.save_pretrained(tmp_path / "again")
    assert set(load_file(tmp_path / "again" / "model.safetensors")) == set(tensors)


def test_inputs_are_measured_in_the_runs_of_the_blocks() -> None:
    layout = Fp8Layout((8, 200), block=(128, 128), inputs=Inputs("e4m3_group", "e4m3", "group", 128))
    weight = algorithms.get("minifloat")(torch.randn(8, 200), layout.scheme(), **layout.algorithm_options())
    x = torch.randn(3, 200) * torch.tensor([1.0, 100.0, 1e-3])[:, None]
    x[1, 128:] *= 1e-4
    parts = []
    for part in (x[:, :128], x[:, 128:]):
        scale = part.abs().amax(1, keepdim=True) / 448
        parts.append((part / scale).to(E4M3).float() * scale)
    wanted = torch.cat(parts, 1).double() @ weight.to_dense(torch.float32).double().T
    assert ((multiply(weight, x, None) - wanted).abs() < 1e-5 * wanted.abs().amax(1, keepdim=True)).all()


# --- creating --------------------------------------------------------------------------------------------------------------


def made(layout: Any, dense: torch.Tensor) -> dict[str, torch.Tensor]:
    weight = algorithms.get(layout.algorithm)(dense, layout.scheme(), **layout.algorithm_options())
    return dict(layout.encode(weight))


def as_transformers(block: torch.Tensor, powers: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """integrations/finegrained_fp8.py: Fp8Quantize, of one block."""
    largest = block.abs().max()
    factor = 448.0 / (largest if largest > 0 else torch.tensor(448.0))
    inverse = 1.0 / factor
    if powers:
        inverse = torch.exp2(torch.ceil(torch.log2(inverse)))
        factor = 1.0 / inverse
    return (block * factor).clamp(-448, 448).to(E4M3), inverse


@pytest.mark.parametrize("powers", [False, True])
@pytest.mark.parametrize("block", [(128, 128), (1, 32), (64, 48), (0, 0)])
def test_codes_and_scales_are_those_of_transformers(block: tuple[int, int], powers: bool) -> None:
    dense = torch.randn(200, 160, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    dense[:128, 128:] = 0
    layout = Fp8Layout((200, 160), block=block, scale_dtype="float8_e8m0fnu" if powers else "float32", powers=powers)
    found = made(layout, dense)
    scales = found["weight_scale_inv"].view(torch.uint8) if powers else found["weight_scale_inv"]
    for row in range(0, 200, block[0] or 200):
        for column in range(0, 160, block[1] or 160):
            place = (slice(row, row + (block[0] or 200)), slice(column, column + (block[1] or 160)))
            wanted, scale = as_transformers(dense[place].float(), powers)
            assert torch.equal(found["weight"][place].view(torch.uint8), wanted.view(torch.uint8))
            own = scales[row // (block[0] or 200), column // (block[1] or 160)]
            assert own == (torch.log2(scale) + 127 if powers else scale)


def test_fp4_experts_round_half_to_even_and_never_clip() -> None:
    dense = torch.zeros(1, 64)
    dense[0, :8] = torch.tensor([6.0, 5.0, 3.5, 2.5, 1.75, 1.25, 0.75, -0.25])
    dense[0, 32] = 7.0
    found = made(Fp4ExpertLayout((1, 64)), dense)
    assert found["weight_scale_inv"].view(torch.uint8).tolist() == [[127, 128]]  # 7 / 6 is rounded up to 2
    assert found["weight"].view(torch.uint8)[0, :4].tolist() == [0x67, 0x46, 0x24, 0x82]
    assert found["weight"].view(torch.uint8)[0, 16] == 6  # 3.5 is rounded to 4


def test_a_dense_model_becomes_one_that_the_quantizer_reads(tmp_path: Path) -> None:
    anybit.dequantize(GOLDEN / "qwen3moe_fp4_experts_scale_name", tmp_path / "dense")
    config = FineGrainedFP8Config(expert_dtype="fp4", scale_fmt="ue8m0", modules_to_not_convert=["lm_head", "gate"])
    anybit.quantize(tmp_path / "dense", tmp_path / "again", config)
    stored = load_file(GOLDEN / "qwen3moe_fp4_experts_scale_name" / "model.safetensors")
    again = load_file(tmp_path / "again" / "model.safetensors")
    expert = "model.layers.0.mlp.experts.0.up_proj"
    before = Fp4ExpertLayout((128, 128), scale_name="scale").decode(
        {name: stored[f"{expert}.{name}"] for name in ("weight", "scale")}
    )
    after = Fp4ExpertLayout((128, 128)).decode(
        {name: again[f"{expert}.{name}"] for name in ("weight", "weight_scale_inv")}
    )
    assert torch.equal(before.to_dense(torch.float32), after.to_dense(torch.float32))
    assert again["lm_head.weight"].dtype == torch.bfloat16
    plan = anybit.load(tmp_path / "again").anybit_plan
    assert plan.coverage > 0.8
    assert not plan.notes
