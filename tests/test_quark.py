"""Quark where the goldens cannot see it: orders of nibbles, FP6, older and fake-quantized files, other modes, outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import anybit
from anybit.containers.info import TensorInfo
from anybit.errors import ConfigError, InvalidOption, MissingTensor, ShapeMismatch
from anybit.kernels.reference import multiply
from anybit.methods import _quark_layouts as layouts
from anybit.methods.quark import QuarkConfig, QuarkHfQuantizer
from anybit.weight import ModuleInfo

GOLDEN = Path(__file__).parent / "golden" / "quark"
FP8 = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False}


def linear(rows: int, columns: int) -> ModuleInfo:
    return ModuleInfo("model.a", "linear", (rows, columns), "bfloat16")


def read(tensors: dict[str, torch.Tensor], shape: tuple[int, int], **config: Any) -> Any:
    """The layout of these tensors."""
    infos = {
        name: TensorInfo(f"model.a.{name}", str(tensor.dtype)[6:], tuple(tensor.shape), tensor.nbytes, "f")
        for name, tensor in tensors.items()
    }
    return layouts.layout_of(QuarkHfQuantizer(QuarkConfig(**config)), linear(*shape), infos)


def native(weight: Any, inputs: Any = None, **export: Any) -> dict[str, Any]:
    return {"global_quant_config": {"weight": weight, "input_tensors": inputs}, "export": export}


def assert_same(ours: dict[str, torch.Tensor], stored: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == stored.keys()
    for name, tensor in stored.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name


def words(codes: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """Codes [n, out] as int32 words [n, out / 8], one nibble at a time."""
    found = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int64)
    for nibble, output in enumerate(order):
        found |= (codes[:, output::8].long() & 0xF) << (4 * nibble)
    return torch.where(found >= 1 << 31, found - (1 << 32), found).to(torch.int32)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("method", ["order", "reorder"])
@pytest.mark.parametrize("dtype", ["int4", "uint4"])
def test_words_of_either_order_and_sign(dtype: str, method: str, legacy: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    low, high = (-8, 8) if dtype == "int4" else (0, 16)
    codes = torch.randint(low, high, (64, 24), generator=generator)  # [in, out]
    zeros = torch.randint(low, high, (2, 24), generator=generator)
    scales = torch.rand(2, 24, generator=generator)
    order = tuple(range(8)) if method == "order" else (0, 2, 4, 6, 1, 3, 5, 7)
    stored = {
        "weight": words(codes, order),
        "weight_scale": scales.T.contiguous() if legacy else scales,
        "weight_zero_point": words(zeros, order),
    }
    config = native({"dtype": dtype, "qscheme": "per_group", "group_size": 32}, pack_method=method)
    if legacy:
        config = {**config, "export": None, "pack_method": method}
    layout = read(stored, (24, 64), **config)
    wanted = ((codes - zeros.repeat_interleave(32, 0)) * scales.repeat_interleave(32, 0)).T
    assert torch.equal(layout.decode(stored).to_dense(torch.float32), wanted)
    assert_same(layout.encode(layout.decode(stored)), stored)


@pytest.mark.parametrize(("dtype", "bias", "mantissa"), [("fp6_e3m2", 3, 2), ("fp6_e2m3", 1, 3)])
def test_four_fp6_codes_lie_in_three_bytes(dtype: str, bias: int, mantissa: int) -> None:
    codes = torch.arange(64).reshape(2, 32)

    def number(code: int) -> float:
        exponent, fraction = (code & 31) >> mantissa, (code & ((1 << mantissa) - 1)) / (1 << mantissa)
        size = fraction * 2.0 ** (1 - bias) if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - bias)
        return -size if code & 32 else size

    runs = codes.reshape(2, 8, 4)
    whole = sum(runs[..., place] << (6 * place) for place in range(4))
    packed = torch.stack([(whole >> (8 * byte)) & 255 for byte in range(3)], -1).to(torch.uint8).flatten(1)  # type: ignore[operator]
    stored = {"weight": packed, "weight_scale": torch.tensor([[127], [129]], dtype=torch.uint8)}
    spec = {"dtype": dtype, "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0", "is_dynamic": True}
    layout = read(stored, (2, 32), **native(spec, spec))
    dense = layout.decode(stored).to_dense(torch.float32)
    wanted = [[number(int(code)) * (1, 4)[row] for code in codes[row]] for row in range(2)]
    assert torch.equal(dense, torch.tensor(wanted))
    assert_same(layout.encode(layout.decode(stored)), stored)
    assert layout.inputs.rule == f"quark_{dtype}_even"


@pytest.mark.parametrize("shape", [(), (1,), (16,)])
def test_fp8_and_int8_of_a_matrix_or_each_output(shape: tuple[int, ...]) -> None:
    scale = torch.rand(shape) + 0.5
    codes = torch.randint(-128, 128, (16, 32), dtype=torch.int8)
    stored = {"weight": codes, "weight_scale": scale, "weight_zero_point": torch.ones(shape, dtype=torch.int8)}
    layout = read(stored, (16, 32), **native({"dtype": "int8"}))
    dense = layout.decode(stored).to_dense(torch.float32)
    assert torch.equal(dense, (codes.float() - 1) * scale.reshape(-1, 1))
    assert_same(layout.encode(layout.decode(stored)), stored)
    floats = {"weight": torch.randn(16, 32).to(torch.float8_e4m3fn), "weight_scale": scale}
    layout = read(floats, (16, 32), **native(FP8))
    dense = layout.decode(floats).to_dense(torch.float32)
    assert torch.equal(dense, floats["weight"].float() * scale.reshape(-1, 1))


# --- inputs ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "wanted"), [("floor", 2.0), ("ceil", 4.0), ("even", 4.0)])
def test_exponents_of_mx_inputs_round_as_the_configuration_says(mode: str, wanted: float) -> None:
    x = torch.zeros(1, 32)
    x[0, 0], x[0, 1] = 15.0, 0.25 * wanted
    found = layouts.rounded_mx(x, "fp4", mode)  # under 2 the largest is 12, and 1/4 of a scale is a tie
    assert found[0, 0] == (12.0 if wanted == 2.0 else 16.0)
    assert found[0, 1] == 0.0
    assert not layouts.rounded_mx(torch.zeros(2, 64), "fp6_e2m3", mode).any()


def test_dynamic_fp8_inputs_have_one_scale() -> None:
    stored = {"weight": torch.randn(16, 32).to(torch.float8_e4m3fn), "weight_scale": torch.tensor(0.5)}
    layout = read(stored, (16, 32), **native(FP8, {**FP8, "is_dynamic": True}))
    weight, x = layout.decode(stored), torch.randn(4, 32)
    scale = x.abs().amax() / 448
    wanted = ((x / scale).to(torch.float8_e4m3fn).float() * scale) @ weight.to_dense(torch.float32).T
    assert torch.allclose(multiply(weight, x, None), wanted, atol=1e-5)


def test_inputs_without_their_scale_are_refused() -> None:
    stored = {"weight": torch.zeros(16, 32, dtype=torch.float8_e4m3fn), "weight_scale": torch.tensor(0.5)}
    with pytest.raises(MissingTensor, match="input_scale"):
        read(stored, (16, 32), **native(FP8, FP8))
    with pytest.raises(InvalidOption, match="uint8"):
        read(stored, (16, 32), **native(FP8, {"dtype": "uint8", "is_dynamic": True}))
    with pytest.raises(ShapeMismatch, match="no known form"):
        read({**stored, "weight_scale": torch.ones(2, 16)}, (16, 32), **native(FP8))


# --- configuration -----------------------------------------------------------------------------------------------------------------


def test_the_first_pattern_counts_and_exclusion_wins() -> None:
    config = QuarkConfig(
        global_quant_config={"weight": {"dtype": "int8"}},
        layer_quant_config={"*mlp*": {"weight": {"dtype": "uint4"}}, "*up_proj": {"weight": {"dtype": "fp4"}}},
        exclude=["lm_head", "*.0.mlp.down_proj"],
        export={},
    )
    quantizer = QuarkHfQuantizer(config)
    found = {
        name: quantizer.spec_of(name, "weight")
        for name in ("a.mlp.up_proj", "a.q_proj", "x.0.mlp.down_proj", "lm_head")
    }
    assert list(found.values()) == [{"dtype": "uint4"}, {"dtype": "int8"}, None, None]


def test_levels_of_two_and_rounding_behind_the_embedding_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 levels"):
        QuarkHfQuantizer(QuarkConfig(global_quant_config={"weight": [FP8, FP8]}, export={})).spec_of("a", "weight")
    folder = altered(tmp_path, "fp8-kvcache", {"kv_cache_post_rope": True})
    with pytest.raises(ConfigError, match="kv_cache_post_rope"):
        anybit.load(folder)


def altered(folder: Path, variant: str, changes: dict[str, Any], drop: tuple[str, ...] = ()) -> Path:
    """A copy of a golden with another configuration."""
    for file in (GOLDEN / variant).glob("*"):
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    own = {name: value for name, value in config["quantization_config"].items() if name not in drop}
    config["quantization_config"] = {**own, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_files_that_call_themselves_fp8_have_the_same_numbers(tmp_path: Path) -> None:
    names = ("global_quant_config", "layer_quant_config", "exclude", "kv_cache_quant_config")
    changes = {
        "quant_method": "fp8",
        "activation_scheme": "static",
        "ignored_layers": ["lm_head"],
        "kv_cache_scheme": "static",
    }
    folder = altered(tmp_path, "fp8-kvcache", changes, names)
    ids = load_file(folder / "reference.safetensors")["input_ids"]
    ours: Any = anybit.load(folder, dtype=torch.float32)
    native_model: Any = anybit.load(GOLDEN / "fp8-kvcache", dtype=torch.float32)
    assert torch.equal(ours(ids).logits, native_model(ids).logits)
    ours.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]["quant_method"] == "fp8"


def test_keys_and_values_are_rounded_under_their_scales() -> None:
    model: Any = anybit.load(GOLDEN / "fp8-kvcache", dtype=torch.float32)
    layer = model.model.layers[0].self_attn.k_proj
    y = layer(torch.randn(3, layer.in_features) * 4)
    steps = y / layer.output_scale.float()
    assert torch.allclose(steps, steps.to(torch.float8_e4m3fn).float(), rtol=1e-6)
    assert "model.layers.0.self_attn.k_proj.output_scale" in model.state_dict()


def test_fake_quantized_weights_are_used_as_they_are(tmp_path: Path) -> None:
    """transformers reads them as codes."""
    folder = altered(tmp_path, "fp8-kvcache", {"export": {"weight_format": "fake_quantized"}})
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float8_e4m3fn:
            tensors[name] = (tensor.float() * tensors[f"{name}_scale"].float()).to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model: Any = anybit.load(folder)
    layer = model.model.layers[0].mlp.up_proj
    assert torch.equal(layer.dequantize(), tensors["model.layers.0.mlp.up_proj.weight"])
    assert layer.quantized_weight.activation.rule == "e4m3_static"
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in tensors.items())


def test_dynamic_outputs_are_refused_instead_of_left_out():
    from anybit import QuarkConfig
    from anybit.errors import InvalidOption
    from anybit.quantizers import AutoHfQuantizer
    from anybit.weight import ModuleInfo

    spec = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": True}
    config = QuarkConfig(global_quant_config={"weight": {**spec, "is_dynamic": False}, "output_tensors": spec})
    with pytest.raises(InvalidOption, match="are quantized dynamically"):
        AutoHfQuantizer.from_config(config).layout_of(ModuleInfo("a.b", "linear", (8, 8), "float16"), {}, None)
