"""Quark where the goldens cannot see it: orders of nibbles, FP6, older and fake-quantized files, other modes, outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import anybit
from anybit import algorithms
from anybit.containers.info import TensorInfo
from anybit.errors import (
    CalibrationNeeded,
    ConfigError,
    CorruptFile,
    InvalidOption,
    MissingTensor,
    NotRepresentable,
    ShapeMismatch,
)
from anybit.kernels.reference import multiply
from anybit.methods import _quark_layouts as layouts
from anybit.methods import _quark_states as states
from anybit.methods.quark import QuarkConfig, QuarkHfQuantizer, specification
from anybit.quantizers.named import from_scheme
from anybit.weight import ModuleInfo, levels

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


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_bytes_in_groups_lie_the_other_way_round(dtype: str, legacy: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    element, low = getattr(torch, dtype), -128 if dtype == "int8" else 0
    codes = torch.randint(low, low + 256, (64, 12), generator=generator)  # [in, out]
    zeros = torch.randint(low, low + 256, (2, 12), generator=generator)
    scales = torch.rand(2, 12, generator=generator)
    stored = {
        "weight": codes.to(element),
        "weight_scale": scales.T.contiguous() if legacy else scales,
        "weight_zero_point": zeros.to(element),
    }
    config = native({"dtype": dtype, "qscheme": "per_group", "group_size": 32})
    layout = read(stored, (12, 64), **({**config, "export": None} if legacy else config))
    dense = layout.decode(stored).to_dense(torch.float32)
    for row in range(12):
        wanted = [float(codes[i, row] - zeros[i // 32, row]) * scales[i // 32, row] for i in range(64)]
        assert dense[row].tolist() == [float(number) for number in wanted]
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
    found = states.rounded_mx(x, "fp4", mode)  # under 2 the largest is 12, and 1/4 of a scale is a tie
    assert found[0, 0] == (12.0 if wanted == 2.0 else 16.0)
    assert found[0, 1] == 0.0
    assert not states.rounded_mx(torch.zeros(2, 64), "fp6_e2m3", mode).any()


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


@pytest.mark.parametrize("rows", [False, True])
def test_int4_of_fp8_has_both_scales(rows: bool) -> None:
    """weight_scale is that of the FP8 the codes came from, weight_scale_2 that of int4: q * s2 * s."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (64, 24), generator=generator)  # [in, out]
    stored = {
        "weight": words(codes, (0, 2, 4, 6, 1, 3, 5, 7)),
        "weight_scale": torch.rand(24, generator=generator) if rows else torch.tensor(0.25),
        "weight_scale_2": torch.rand(2, 24, generator=generator),
        "weight_zero_point_2": words(torch.zeros(2, 24), (0, 2, 4, 6, 1, 3, 5, 7)),
    }
    int4 = {"dtype": "int4", "qscheme": "per_group", "group_size": 32}
    layout = read(stored, (24, 64), **native([{"dtype": "fp8_e4m3", "qscheme": "per_tensor"}, int4]))
    weight = layout.decode(stored)
    wanted = codes.T * stored["weight_scale_2"].T.repeat_interleave(32, 1) * stored["weight_scale"].reshape(-1, 1)
    assert torch.equal(weight.to_dense(torch.float32), wanted)
    assert_same(layout.encode(weight), stored)
    del stored["weight_scale_2"]
    with pytest.raises(MissingTensor, match="weight_scale_2"):
        read(stored, (24, 64), **native([FP8, int4]))


def test_fp4_whose_scales_are_quantized_is_nvfp4() -> None:
    generator = torch.Generator().manual_seed(0)
    stored = {
        "weight": torch.randint(0, 256, (8, 32), generator=generator, dtype=torch.uint8),
        "weight_scale": (torch.rand(8, 4, generator=generator) + 0.5).to(torch.float8_e4m3fn),
        "weight_scale_2": torch.tensor(0.125),
    }
    fp4 = {"dtype": "fp4", "qscheme": "per_group", "group_size": 16}
    scales = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_scale_quant": True}
    layout = read(stored, (8, 64), **native([fp4, scales]))
    weight = layout.decode(stored)
    numbers = levels.table("e2m1", "cpu")[
        torch.stack([stored["weight"] & 15, stored["weight"] >> 4], -1).flatten(1).long()
    ]
    wanted = numbers * (stored["weight_scale"].float() * 0.125).repeat_interleave(16, 1)
    assert torch.equal(weight.to_dense(torch.float32), wanted)
    assert all(torch.equal(layout.encode(weight)[name].float(), tensor.float()) for name, tensor in stored.items())
    with pytest.raises(ShapeMismatch, match="inputs as they are"):
        read(stored, (8, 64), **native([fp4, scales], [fp4, scales]))
    with pytest.raises(ConfigError, match="2 levels"):
        QuarkHfQuantizer(QuarkConfig(**native([fp4, scales]))).spec_of("a", "weight")


def test_a_cache_behind_the_embedding_rounds_keys_with_their_rotation(tmp_path: Path, monkeypatch: Any) -> None:
    """kv_cache_post_rope: the same scales, k_proj.output_scale and v_proj.output_scale, where states enter the cache."""
    from transformers.models.llama import modeling_llama

    folder = altered(tmp_path, "fp8-kvcache", {"kv_cache_post_rope": True})
    ids = load_file(folder / "reference.safetensors")["input_ids"]
    stored = load_file(folder / "model.safetensors")
    model: Any = anybit.load(folder)
    with torch.no_grad():
        found = model(ids).logits
        before: Any = anybit.load(GOLDEN / "fp8-kvcache")
        assert not torch.equal(found, before(ids).logits)
    before.model.layers[0].self_attn.k_proj._forward_hooks.clear()  # what is left to do is done by hand
    turn = modeling_llama.apply_rotary_pos_emb
    layer = iter(range(100))

    def rounded(query: torch.Tensor, key: torch.Tensor, *rest: Any, **more: Any) -> Any:
        query, key = turn(query, key, *rest, **more)
        scale = stored[f"model.layers.{next(layer)}.self_attn.k_proj.output_scale"].float()
        return query, ((key.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale).to(key.dtype)

    for own in before.model.layers:
        own.self_attn.k_proj._forward_hooks.clear()
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rounded)
    with torch.no_grad():
        assert torch.equal(found, before(ids).logits)
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == stored.keys()
    with pytest.raises(InvalidOption, match="kv_cache_post_rope"):
        QuarkHfQuantizer(QuarkConfig(**native(FP8), kv_cache_post_rope=True), pre_quantized=False)


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


# --- creating: Quark's observers, one weight at a time ---------------------------------------------------------------------------


def made(weight: torch.Tensor, spec: Any, inputs: Any = None, **config: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """The layout that a dense weight gets, and what is stored of it."""
    settings = {"weight": spec, "input_tensors": inputs}
    quantizer = QuarkHfQuantizer(QuarkConfig(global_quant_config=settings, **config), pre_quantized=False)
    module = ModuleInfo("model.a", "linear", tuple(weight.shape), str(weight.dtype)[6:])
    layout: Any = quantizer.layout_for(module)
    assert layout is not None, quantizer.skip_reasons
    found = algorithms.get(layout.algorithm)(weight, layout.scheme(), **layout.algorithm_options())
    stored = layout.encode(found)
    infos = {
        name: TensorInfo(f"model.a.{name}", str(tensor.dtype)[6:], tuple(tensor.shape), tensor.nbytes, "f")
        for name, tensor in stored.items()
    }
    again: Any = layouts.layout_of(QuarkHfQuantizer(quantizer.quantization_config), module, infos)
    assert again == layout  # what was written is read as what was meant
    return layout, stored


def nibbles(words_: torch.Tensor) -> list[list[int]]:
    """Unsigned codes of int32 words [n, m], one at a time, in the order of "reorder"."""
    found = []
    for row in words_.tolist():
        codes = [0] * (8 * len(row))
        for number, word in enumerate(row):
            for place, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                codes[8 * number + output] = (word >> (4 * place)) & 15
        found.append(codes)
    return found


INTEGERS = [
    (dtype, scheme, symmetric)
    for dtype in ("int4", "uint4", "int8", "uint8", "uint2")
    for scheme in ("per_tensor", "per_channel", "per_group")
    for symmetric in (True, False)
    if not (symmetric and dtype.startswith("u")) and not (dtype == "uint2" and scheme != "per_group")
]


@pytest.mark.parametrize("model_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("dtype", "scheme", "symmetric"), INTEGERS)
def test_integers_are_those_of_the_observers(
    dtype: str, scheme: str, symmetric: bool, model_dtype: torch.dtype
) -> None:
    """Scale and zero point of minimum and maximum, rounded to the model's dtype at each step; codes in float32."""
    generator = torch.Generator().manual_seed(3)
    weight = (torch.randn(16, 64, generator=generator) + 0.4).to(model_dtype)
    weight[3, :32] = 0.0
    spec = specification(dtype, scheme, symmetric=symmetric, group_size=32 if scheme == "per_group" else None)
    layout, stored = made(weight, spec)
    bits, signed = int(dtype[-1]), not dtype.startswith("u")
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)

    def parameters(block: torch.Tensor) -> tuple[torch.Tensor, int]:
        least, most = block.amin().clamp(max=0), block.amax().clamp(min=0)
        scale = torch.maximum(-least, most) / ((high - low) / 2) if symmetric else (most - least) / float(high - low)
        if scheme == "per_tensor":
            scale = scale.float()
        scale = scale.clamp(min=2.0**-23)
        zero = 0 if symmetric else int((low - torch.round(least.to(scale.dtype) / scale)).clamp(low, high))
        return scale, zero

    across = {"per_tensor": 64, "per_channel": 64, "per_group": 32}[scheme]
    values = layout.decode(stored).to_dense(torch.float32)
    for row in range(16):
        for start in range(0, 64, across):
            block = weight if scheme == "per_tensor" else weight[row, start : start + across]
            scale, zero = parameters(block)
            numbers = weight[row, start : start + across].float()
            codes = torch.round(numbers * (1.0 / scale.float()) + zero).clamp(low, high)
            assert torch.equal(values[row, start : start + across], (codes - zero) * scale.float())
            if bits == 4 and scheme == "per_group":
                packed = [nibbles(stored["weight"])[start + place][row] for place in range(across)]
                assert packed == [int(code) & 15 for code in codes]
                assert nibbles(stored["weight_zero_point"])[start // 32][row] == zero & 15
                assert stored["weight_scale"][start // 32, row] == scale
            elif scheme == "per_group" and bits == 8:
                assert stored["weight"][start : start + across, row].tolist() == codes.tolist()
                assert stored["weight_zero_point"][start // 32, row] == zero
            elif bits == 2:
                for place, code in enumerate(codes.tolist()):
                    assert (int(stored["weight"][start + place, row // 4]) >> (6 - 2 * (row % 4))) & 3 == code
                assert (int(stored["weight_zero_point"][start // 32, row // 4]) >> (6 - 2 * (row % 4))) & 3 == zero
            elif bits == 4:
                assert nibbles(stored["weight"])[row] == [int(code) & 15 for code in codes]
            else:
                assert stored["weight"][row].tolist() == codes.tolist()
    assert stored["weight_scale"].dtype == (torch.float32 if scheme == "per_tensor" else model_dtype)


@pytest.mark.parametrize("model_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scheme", ["per_tensor", "per_channel"])
@pytest.mark.parametrize(
    ("dtype", "top", "element"),
    [("fp8_e4m3", 448, torch.float8_e4m3fn), ("fp8_e5m2", 57344, torch.float8_e5m2)],
)
def test_fp8_codes_are_quotients_in_the_weights_dtype(
    dtype: str, top: int, element: torch.dtype, scheme: str, model_dtype: torch.dtype
) -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(5)).to(model_dtype)
    weight[3] = 0.0
    layout, stored = made(weight, specification(dtype, scheme, ch_axis=0))
    if scheme == "per_tensor":
        scale = weight.abs().amax() / top
    else:
        scale = weight.abs().amax(1) / top
        scale[3] = 2.0**-23
    assert torch.equal(stored["weight_scale"], scale)
    wanted = (weight / scale.reshape(-1, 1)).clamp(-top, top).to(element)
    assert torch.equal(stored["weight"].view(torch.uint8), wanted.view(torch.uint8))
    assert layout.inputs is None
    values = stored["weight"].float() * scale.float().reshape(-1, 1)
    assert torch.equal(layout.decode(stored).to_dense(torch.float32), values)
    damaged = stored["weight"].clone()
    damaged.view(torch.uint8)[1, 2] = 0x7F
    with pytest.raises(CorruptFile, match="weight"):
        layout.decode({**stored, "weight": damaged})


@pytest.mark.parametrize("mode", ["even", "floor", "ceil"])
@pytest.mark.parametrize(("dtype", "mantissa", "emax"), [("fp4", 1, 2), ("fp6_e2m3", 3, 2), ("fp6_e3m2", 2, 4)])
def test_mx_exponents_and_elements(dtype: str, mantissa: int, emax: int, mode: str) -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(7)) * 3
    spec = specification(dtype, "per_group", group_size=32, scale_format="e8m0", scale_calculation_mode=mode)
    layout, stored = made(weight, spec, {**spec, "is_dynamic": True})
    assert layout.inputs.rule == f"quark_{dtype}_{mode}"
    values = layout.decode(stored).to_dense(torch.float32)
    level = {"fp4": "e2m1", "fp6_e2m3": "e2m3", "fp6_e3m2": "e3m2"}[dtype]
    table = sorted(set(levels.table(level, "cpu").tolist()))
    for row in range(8):
        for group in range(2):
            block = weight[row, 32 * group : 32 * group + 32]
            amax = block.abs().amax()
            if mode == "even":
                bits = amax.view(torch.int32) + (1 << (23 - mantissa - 1))
                exponent = int(bits >> 23) - 127 - emax
            else:
                exponent = int(getattr(torch, mode)(torch.log2(amax))) - emax
            assert int(stored["weight_scale"][row, group]) == exponent + 127
            for number, value in zip(block.tolist(), values[row, 32 * group : 32 * group + 32].tolist(), strict=True):
                nearest = min(abs(number / 2.0**exponent - entry) for entry in table)
                assert abs(number / 2.0**exponent - value / 2.0**exponent) == pytest.approx(nearest, abs=1e-7)


def test_codes_of_the_peer_come_again_from_their_values() -> None:
    """MXFP4 blocks are their own nearest codes: bytes and exponents of a file of Quark's."""
    tensors = load_file(GOLDEN / "mxfp4" / "model.safetensors")
    config = json.loads((GOLDEN / "mxfp4" / "config.json").read_text())["quantization_config"]
    name = "model.layers.0.mlp.up_proj"
    stored = {own: tensors[f"{name}.{own}"] for own in ("weight", "weight_scale")}
    settings = config["global_quant_config"]
    layout = read(stored, (stored["weight"].shape[0], 2 * stored["weight"].shape[1]), **native(settings["weight"]))
    dense = layout.decode(stored).to_dense(torch.float32)
    _, ours = made(dense, settings["weight"])
    same = ours["weight_scale"] == stored["weight_scale"]
    assert same.float().mean() > 0.9  # a block whose largest was rounded down may get the next smaller exponent
    mine, theirs = (one.reshape(*same.shape, 16)[same] for one in (ours["weight"], stored["weight"]))
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("scheme", sorted(QuarkConfig.schemes))
def test_schemes_make_checkpoints_that_load(scheme: str, tmp_path: Path) -> None:
    anybit.dequantize(GOLDEN / "fp8-kvcache", tmp_path / "dense", dtype="bfloat16")
    config = from_scheme(scheme)
    anybit.quantize(tmp_path / "dense", tmp_path / "made", config)
    assert config.exclude is None  # the caller's configuration can be used for another model
    written = json.loads((tmp_path / "made" / "config.json").read_text())["quantization_config"]
    assert written["export"]["pack_method"] == "reorder"
    assert "lm_head" in written["exclude"]
    ids = load_file(GOLDEN / "fp8-kvcache" / "reference.safetensors")["input_ids"]
    model: Any = anybit.load(tmp_path / "made")
    dense: Any = anybit.load(tmp_path / "dense")
    layer = model.model.layers[0].mlp.up_proj
    assert layer.quantized_weight.tree is not None
    wanted = dense.model.layers[0].mlp.up_proj.weight.float()
    error = (layer.dequantize(torch.float32) - wanted).norm() / wanted.norm()
    assert error < 0.3
    assert torch.isfinite(model(ids).logits).all()


def test_what_only_data_tells_is_refused_with_a_cure() -> None:
    def create(**config: Any) -> QuarkHfQuantizer:
        return QuarkHfQuantizer(QuarkConfig(**config), pre_quantized=False)

    weight = {"weight": FP8}
    dynamic = {**FP8, "is_dynamic": True}
    with pytest.raises(InvalidOption, match=r"layer_quant_config\['\*v'\].output_tensors is dynamic"):
        create(global_quant_config=weight, layer_quant_config={"*v": {**weight, "output_tensors": dynamic}})
    with pytest.raises(InvalidOption, match="kv_cache_scheme is 'static'"):
        create(quant_method="fp8", kv_cache_scheme="static", export={})
    with pytest.raises(CalibrationNeeded, match="algo_config, which needs data"):
        create(global_quant_config=weight, algo_config=[{"name": "gptq"}])
    with pytest.raises(InvalidOption, match="no weight to quantize"):
        create(global_quant_config={})
    with pytest.raises(InvalidOption, match="AwqConfig"):
        create(quant_method="awq", bits=4, export={})
    with pytest.raises(NotRepresentable, match="fake_quantized"):
        create(global_quant_config=weight, export={"weight_format": "fake_quantized"})
    with pytest.raises(InvalidOption, match="no code below zero"):
        made(torch.ones(8, 32), specification("uint4", "per_channel"))
    with pytest.raises(InvalidOption, match="is not made here"):
        made(torch.ones(8, 32), specification("int3", "per_tensor"))


def test_modules_that_do_not_fit_stay_dense_and_the_file_says_so() -> None:
    spec = specification("int4", "per_group", group_size=32)
    quantizer = QuarkHfQuantizer(QuarkConfig(global_quant_config={"weight": spec}), pre_quantized=False)
    for shape, reason in (((8, 48), "no multiple"), ((12, 64), "eight outputs share a word")):
        module = ModuleInfo(f"model.{shape[0]}", "linear", shape, "bfloat16")
        assert quantizer.layout_for(module) is None
        assert reason in quantizer.skip_reasons[module.name]
        assert module.name in quantizer.quantization_config.exclude
    table = ModuleInfo("model.embed", "embedding", (64, 64), "bfloat16")
    assert quantizer.layout_for(table) is None
    assert "does not quantize its weight" in quantizer.skip_reasons["model.embed"]
    stack = ModuleInfo("model.experts", "experts", (2, 64, 64), "bfloat16")
    assert quantizer.layout_for(stack) is None
    assert "not of kind 'experts'" in quantizer.skip_reasons["model.experts"]


def test_settings_of_a_class_reach_embeddings(tmp_path: Path) -> None:
    """An embedding is quantized where its class is named, and only there."""
    anybit.dequantize(GOLDEN / "fp8-kvcache", tmp_path / "dense", dtype="bfloat16")
    parts = {"weight": specification("int8", "per_channel", ch_axis=0)}
    config = QuarkConfig(
        global_quant_config={"weight": specification("fp8_e4m3", "per_tensor")},
        layer_type_quant_config={"Embedding": parts},
        exclude=["lm_head"],
    )
    anybit.quantize(tmp_path / "dense", tmp_path / "made", config)
    dense = load_file(tmp_path / "dense" / "model.safetensors")["model.embed_tokens.weight"]
    stored = load_file(tmp_path / "made" / "model.safetensors")
    scale = dense.abs().amax(1) / 127.5
    codes = torch.round(dense.float() * (1.0 / scale.float())[:, None]).clamp(-128, 127)
    assert torch.equal(stored["model.embed_tokens.weight"], codes.to(torch.int8))
    model: Any = anybit.load(tmp_path / "made")
    values = model.model.embed_tokens(torch.arange(8))
    assert torch.equal(values, (codes * scale.float()[:, None])[:8].to(values.dtype))
    assert stored["model.layers.0.mlp.up_proj.weight"].dtype == torch.float8_e4m3fn


def test_files_of_the_fp8_mode_can_be_made() -> None:
    config = QuarkConfig(quant_method="fp8", activation_scheme="dynamic", ignored_layers=["lm_head"], export={})
    quantizer = QuarkHfQuantizer(config, pre_quantized=False)
    layout: Any = quantizer.layout_for(linear(16, 32))
    assert (layout.scale_form, layout.inputs.rule) == ("scalar", "quark_fp8_tensor")
    assert quantizer.layout_for(ModuleInfo("lm_head", "linear", (16, 32), "bfloat16")) is None


# --- files that call themselves "awq" ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mistaken", [False, True])
def test_files_that_call_themselves_awq_have_the_same_numbers(mistaken: bool, tmp_path: Path) -> None:
    """Quark 0.13 under transformers 5.6 and later puts one more q before every name."""
    names = ("global_quant_config", "layer_quant_config", "exclude", "kv_cache_quant_config")
    changes = {
        "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "modules_to_not_convert": ["lm_head"],
    }  # fmt: skip
    golden = GOLDEN / "uint4-g32-reorder"
    folder = altered(tmp_path, golden.name, changes, names)
    stored, tensors = load_file(golden / "model.safetensors"), {}
    for name, tensor in stored.items():
        owner, _, own = name.rpartition(".")
        if f"{owner}.weight_scale" in stored:
            own = {"weight": "qweight", "weight_scale": "scales", "weight_zero_point": "qzeros"}[own]
            own = {"scales": "qscales", "qzeros": "qqzeros"}.get(own, own) if mistaken else own
        elif mistaken:
            own = own.replace("weight", "qweight")
        tensors[f"{owner}.{own}"] = tensor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model: Any = anybit.load(folder, dtype=torch.float32)
    ids = load_file(golden / "reference.safetensors")["input_ids"]
    native_model: Any = anybit.load(golden, dtype=torch.float32)
    assert torch.equal(model(ids).logits, native_model(ids).logits)
    name = "model.layers.0.mlp.up_proj"
    codes, zeros = nibbles(stored[f"{name}.weight"]), nibbles(stored[f"{name}.weight_zero_point"])
    scales = stored[f"{name}.weight_scale"].float()
    ours = model.model.layers[0].mlp.up_proj.dequantize(torch.float32)
    for row in (0, 5, 255):
        wanted = [(codes[i][row] - zeros[i // 32][row]) * scales[i // 32, row] for i in range(ours.shape[1])]
        assert ours[row].tolist() == torch.stack(wanted).tolist()
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert torch.equal(saved[f"{name}.scales"], stored[f"{name}.weight_scale"])
    assert torch.equal(saved[f"{name}.qweight"], stored[f"{name}.weight"])
    assert torch.equal(saved["model.norm.weight"], stored["model.norm.weight"])


def test_awq_tensors_that_contradict_the_configuration_are_refused() -> None:
    stored = {"qweight": torch.zeros(64, 2, dtype=torch.int32), "scales": torch.ones(2, 16)}

    def layout(**config: Any) -> Any:
        quantizer = QuarkHfQuantizer(QuarkConfig(quant_method="awq", export={}, **config))
        infos = {
            name: TensorInfo(f"model.a.{name}", str(tensor.dtype)[6:], tuple(tensor.shape), tensor.nbytes, "f")
            for name, tensor in stored.items()
        }
        return quantizer.layout_of(linear(16, 64), infos, lambda name: None)

    with pytest.raises(MissingTensor, match="qzeros"):
        layout(bits=4, group_size=32)
    with pytest.raises(InvalidOption, match="bits is 3"):
        layout(bits=3, group_size=32)
    with pytest.raises(InvalidOption, match="group_size is 0"):
        layout(bits=4, group_size=0)
    stored["qzeros"] = torch.zeros(1, 2, dtype=torch.int32)
    with pytest.raises(ShapeMismatch, match="scales"):
        layout(bits=4, group_size=64)
