"""Metal and MLX beyond the laws: codes as the vendors choose them, settings told from tensors, stacked experts, refusals."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import anybit
from anybit import algorithms
from anybit.errors import ConfigError, CorruptFile, InvalidOption, ShapeMismatch
from anybit.methods._metal_layout import MetalLayout, MlxFloatLayout

GOLDEN = Path(__file__).parent / "golden"
VECTORS = load_file(GOLDEN / "mlx_vectors" / "vectors.safetensors")
DENSE_MODEL = Path(__file__).parents[1] / "examples" / "tiny-llama"


def vector_layout(key: str) -> Any:
    dtype, mode, bits, size, _ = key.split(".")
    if mode == "affine":
        return MetalLayout((24, 128), dtype, int(bits), int(size), dtype, "biases")
    return MlxFloatLayout((24, 128), dtype, int(bits), int(size), mode)


CASES = sorted(key.removesuffix(".weight") for key in VECTORS if key.endswith(".weight"))


@pytest.mark.parametrize("case", CASES)
def test_codes_and_scales_are_mlx_own(case: str) -> None:
    layout = vector_layout(f"{case}.weight")
    dense = VECTORS[f"{case.partition('.')[0]}.dense"]
    made = layout.encode(algorithms.get(layout.algorithm)(dense, layout.scheme(), **layout.algorithm_options()))
    for name, tensor in made.items():
        wanted = VECTORS[f"{case}.{name}"]
        assert (tensor.dtype, tensor.shape) == (wanted.dtype, wanted.shape)
        assert torch.equal(tensor.view(torch.uint8), wanted.view(torch.uint8)), name


@pytest.mark.parametrize("case", [key.removesuffix(".back") for key in sorted(VECTORS) if key.endswith(".back")])
def test_numbers_are_rounded_as_mlx_rounds_them(case: str) -> None:
    layout = vector_layout(f"{case}.back")
    back = VECTORS[f"{case}.back"]
    ours = layout.decode({name: VECTORS[f"{case}.{name}"] for name in layout.specs()}).to_dense(torch.float32)
    assert torch.equal(ours, back.float())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_and_scales_are_those_of_transformers(bits: int, dtype: torch.dtype) -> None:
    from transformers.integrations.metal_quantization import _affine_dequantize_tensor, _affine_quantize_tensor

    dense = VECTORS["float32.dense"].to(dtype)
    words, scales, offsets = _affine_quantize_tensor(dense, 32, bits)
    layout = MetalLayout((24, 128), "float32", bits, 32, str(dtype).removeprefix("torch."))
    weight = algorithms.get("rtn")(dense, layout.scheme(), **layout.algorithm_options())
    made = layout.encode(weight)
    assert torch.equal(made["weight"].view(torch.int32), words.view(torch.int32))
    assert torch.equal(made["scales"], scales.to(dtype))
    assert torch.equal(made["qbiases"], offsets.to(dtype))
    back = _affine_dequantize_tensor(words, scales.to(dtype), offsets.to(dtype), 32, bits)
    assert torch.equal(weight.to_dense(torch.float32), back)


def test_transformers_reads_what_is_written(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    anybit.quantize(DENSE_MODEL, tmp_path / "made", anybit.MetalConfig(bits=4, group_size=32))
    ids = torch.arange(16)[None] + 5
    ours: Any = anybit.load(tmp_path / "made")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "made", device_map="cpu")
    with torch.no_grad():
        difference = (ours(ids).logits.float() - theirs(ids).logits.float()).abs().max()
    assert difference < 0.1, "both round in the model's dtype"
    assert ours.anybit_plan.coverage > 0.5


def headers(folder: Path) -> Any:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return file.metadata()


def test_a_new_mlx_checkpoint_is_marked_as_one(tmp_path: Path) -> None:
    settings = anybit.MetalConfig(bits=6, group_size=64, mode="affine")
    plan = anybit.quantize(DENSE_MODEL, tmp_path / "made", settings)
    assert plan.coverage == 1.0, "MLX quantizes embeddings and the output layer, too"
    model: Any = anybit.load(DENSE_MODEL, quantization_config=settings)
    model.save_pretrained(tmp_path / "saved")
    for folder in (tmp_path / "made", tmp_path / "saved"):
        config = json.loads((folder / "config.json").read_text())
        assert (
            config["quantization"] == config["quantization_config"] == {"bits": 6, "group_size": 64, "mode": "affine"}
        )
        assert headers(folder) == {"format": "mlx"}
    left, right = (
        load_file(tmp_path / "made" / "model.safetensors"),
        load_file(tmp_path / "saved" / "model.safetensors"),
    )
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name].view(torch.uint8), right[name].view(torch.uint8)) for name in left)


def test_a_dense_model_carries_no_trace(tmp_path: Path) -> None:
    model: Any = anybit.load(GOLDEN / "metal" / "mlx-4bit-g64")
    model.dequantize()
    model.save_pretrained(tmp_path / "dense")
    assert "quantization" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert anybit.plan(tmp_path / "dense").method is None


# --- configurations ------------------------------------------------------------------------------------------------------


def changed(tmp_path: Path, variant: str, config: dict[str, Any] | None = None, **keys: Any) -> Path:
    """A copy of a golden with other keys in config.json; None removes one."""
    folder = tmp_path / "changed"
    shutil.copytree(GOLDEN / "metal" / variant, folder)
    found = {**json.loads((folder / "config.json").read_text()), **keys}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in found.items() if value is not None}))
    return folder


def logits(path: Path) -> torch.Tensor:
    model: Any = anybit.load(path)
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(8)[None]).logits
    return found


def test_old_files_have_one_key_and_no_mode(tmp_path: Path) -> None:
    folder = changed(tmp_path, "mlx-4bit-g64", quantization={"group_size": 64, "bits": 4}, quantization_config=None)
    assert torch.equal(logits(folder), logits(GOLDEN / "metal" / "mlx-4bit-g64"))


def test_tensors_count_where_the_file_says_something_else(tmp_path: Path) -> None:
    wrong = {"group_size": 32, "bits": 8}
    folder = changed(tmp_path, "mlx-4bit-g64", quantization=wrong, quantization_config=wrong)
    assert torch.equal(logits(folder), logits(GOLDEN / "metal" / "mlx-4bit-g64"))
    assert any("tensors say (4, 64, 'affine')" in note for note in anybit.plan(folder).notes)


def test_a_modules_own_settings_are_taken_at_their_word(tmp_path: Path) -> None:
    wrong = {"group_size": 64, "bits": 4, "model.layers.0.mlp.up_proj": {"bits": 8, "group_size": 64}}
    folder = changed(tmp_path, "mlx-4bit-g64", quantization=wrong, quantization_config=wrong)
    with pytest.raises(ShapeMismatch, match=r"up_proj\.weight.*needs uint32 \(256, 32\)"):
        anybit.plan(folder)


def test_transformers_files_are_taken_at_their_word(tmp_path: Path) -> None:
    settings = {"quant_method": "metal", "bits": 4, "group_size": 32, "modules_to_not_convert": None}
    folder = changed(tmp_path, "8bit-g32-f16", quantization_config=settings)
    with pytest.raises(ShapeMismatch, match=r"proj\.weight.*uint32"):
        anybit.plan(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "mxfp4", "group_size": 64}, "mode 'mxfp4' has groups of 32"),
        ({"mode": "affine", "group_size": 48}, "groups of 32, 64 or 128"),
        ({"mode": "nvfp4", "bits": 8, "group_size": 16}, "bits is 8; it must be 4"),
    ],
)
def test_settings_mlx_does_not_have(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOption, match=message):
        anybit.MetalConfig(**options)


def test_settings_of_a_module_mlx_does_not_have(tmp_path: Path) -> None:
    wrong = {"group_size": 64, "bits": 4, "model.layers.0.mlp.up_proj": {"bits": 7}}
    folder = changed(tmp_path, "mlx-4bit-g64", quantization=wrong, quantization_config=wrong)
    with pytest.raises(InvalidOption, match=r"up_proj' has 7 bits in groups of 64"):
        anybit.plan(folder)


def test_quantized_inputs_are_refused(tmp_path: Path) -> None:
    folder = changed(tmp_path, "mlx-mixed", quantize_activations=True)
    with pytest.raises(ConfigError, match="quantize_activations"):
        anybit.load(folder)
    assert any("quantize_activations" in problem for problem in anybit.inspect(folder).problems)


def test_scales_that_are_no_number() -> None:
    for mode, byte in (("mxfp4", 255), ("nvfp4", 0x7F)):
        size, bits = {"mxfp4": (32, 4), "nvfp4": (16, 4)}[mode]
        layout = vector_layout(f"float32.{mode}.{bits}.{size}.x")
        stored = {name: VECTORS[f"float32.{mode}.{bits}.{size}.{name}"].clone() for name in layout.specs()}
        stored["scales"][3, 1] = byte
        with pytest.raises(CorruptFile, match=rf"'scales' holds the byte {byte} at \[3, 1\]"):
            layout.decode(stored)


def test_layers_that_groups_do_not_divide_stay_dense(tmp_path: Path) -> None:
    plan = anybit.quantize(DENSE_MODEL, tmp_path / "made", anybit.MetalConfig(bits=4, group_size=96))
    linears = [entry for entry in plan.entries if "layers" in entry.slot.module]
    assert {entry.slot.shape[1] % 96 == 0 for entry in linears} == {True, False}
    for entry in linears:
        assert entry.action == ("dense" if entry.slot.shape[1] % 96 else "quantize")
        assert ("no multiple of groups of 96" in entry.reason) == (entry.action == "dense")


# --- experts ---------------------------------------------------------------------------------------------------------------


def make_experts(folder: Path) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=64, intermediate_size=64, moe_intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, vocab_size=64, num_experts=3, num_experts_per_tok=2, dtype="float32",
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(folder)


def stacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts as MLX keeps them: one tensor of each kind for all."""
    made = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for name in tensors:
        if ".experts.0." in name:
            own = [tensors[name.replace(".experts.0.", f".experts.{expert}.")] for expert in range(3)]
            made[name.replace(".experts.0.", ".switch_mlp.")] = torch.stack(own)
    return made


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_experts_stacked_under_one_name(tmp_path: Path, mode: str) -> None:
    make_experts(tmp_path / "dense")
    settings = anybit.MetalConfig(bits=4, group_size=32, mode=mode)
    plan = anybit.quantize(tmp_path / "dense", tmp_path / "apart", settings)
    assert plan.coverage == 1.0
    tensors = stacked(load_file(tmp_path / "apart" / "model.safetensors"))
    assert tensors["model.layers.0.mlp.switch_mlp.up_proj.scales"].shape == (3, 96, 2)
    shutil.copytree(tmp_path / "apart", tmp_path / "stacked")
    save_file(tensors, tmp_path / "stacked" / "model.safetensors", metadata={"format": "mlx"})
    wanted = logits(tmp_path / "apart")
    model: Any = anybit.load(tmp_path / "stacked")
    assert torch.equal(logits(tmp_path / "stacked"), wanted)
    assert model.anybit_plan.coverage == 1.0
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[name].view(torch.uint8), tensors[name].view(torch.uint8)) for name in saved)
    anybit.dequantize(tmp_path / "stacked", tmp_path / "again")
    assert (
        load_file(tmp_path / "again" / "model.safetensors").keys()
        == load_file(tmp_path / "dense" / "model.safetensors").keys()
    )
    assert torch.allclose(logits(tmp_path / "again"), wanted, atol=1e-5)


def test_a_router_may_be_packed_too(tmp_path: Path) -> None:
    """mlx-lm keeps routers in 8 bits; transformers' router is a class of its own, not a linear layer."""
    make_experts(tmp_path / "dense")
    config = anybit.MetalConfig(bits=4, group_size=32, mode="affine")
    anybit.quantize(tmp_path / "dense", tmp_path / "apart", config)
    folder, name = tmp_path / "packed", "model.layers.0.mlp.gate"
    shutil.copytree(tmp_path / "apart", folder)
    tensors = load_file(folder / "model.safetensors")
    layout = MetalLayout((3, 64), "float32", 8, 64, "float32", "biases")
    dense = tensors.pop(f"{name}.weight")
    router = algorithms.get("rtn")(dense, layout.scheme(), **layout.algorithm_options())
    tensors.update({f"{name}.{part}": tensor for part, tensor in layout.encode(router).items()})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "mlx"})
    found = json.loads((folder / "config.json").read_text())
    for key in ("quantization", "quantization_config"):
        found[key][name] = {"group_size": 64, "bits": 8}
    (folder / "config.json").write_text(json.dumps(found))
    model: Any = anybit.load(folder)
    entry = next(entry for entry in model.anybit_plan.entries if entry.slot.module == name)
    assert (entry.action, entry.slot.kind, entry.bits_per_weight) == ("packed", "router", 9.0)
    plain = load_file(tmp_path / "apart" / "model.safetensors")
    plain[f"{name}.weight"] = router.to_dense(torch.float32)
    save_file(plain, tmp_path / "apart" / "model.safetensors")
    assert torch.allclose(logits(folder), logits(tmp_path / "apart"), atol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert all(torch.equal(saved[key].view(torch.uint8), tensor.view(torch.uint8)) for key, tensor in tensors.items())
    model.dequantize()
    model.save_pretrained(tmp_path / "again")
    assert torch.allclose(logits(tmp_path / "again"), logits(folder), atol=1e-5)


def test_dense_stacked_experts_beside_quantized_layers(tmp_path: Path) -> None:
    make_experts(tmp_path / "dense")
    settings = {"bits": 4, "group_size": 32, "mode": "affine"}
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    folder = tmp_path / "stacked"
    shutil.copytree(tmp_path / "dense", folder)
    save_file(stacked(dense), folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization": settings}))
    assert torch.equal(logits(folder), logits(tmp_path / "dense"))
    model: Any = anybit.load(folder)
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == stacked(dense).keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in stacked(dense).items())
