"""BitNet where the laws cannot see it: transformers' own layers, norms and biases, online weights, creation, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import anybit
from anybit import algorithms
from anybit.errors import CalibrationNeeded, CorruptFile, MissingTensor, NotRepresentable, ShapeMismatch
from anybit.kernels.reference import multiply
from anybit.methods._bitnet_layouts import BitNetLayout, OnlineLayout, UnpackedLayout
from anybit.methods.bitnet import BitNetQuantConfig
from anybit.weight import Weight

LLAMA = Path(__file__).parent / "golden" / "bitnet" / "bitlinear-llama"
TINY = Path(__file__).parents[1] / "examples" / "tiny-llama"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def uncompiled(function: Any) -> Any:
    """transformers compiles these functions, which needs a C++ compiler on the machine."""
    return getattr(function, "_torchdynamo_orig_callable", function)


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """transformers' BitNet layers, as they are written."""
    from transformers.integrations import bitnet

    for owner, name in (
        (bitnet, "unpack_weights"),
        (bitnet.BitLinear, "activation_quant"),
        (bitnet.BitLinear, "post_quant_process"),
    ):
        monkeypatch.setattr(owner, name, uncompiled(getattr(owner, name)))
    for function in (bitnet.WeightQuant, bitnet.ActQuant):
        monkeypatch.setattr(function, "forward", staticmethod(uncompiled(function.forward)))
    return bitnet


def ternary(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randint(-1, 2, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()


def inputs(columns: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(7, columns, generator=torch.Generator().manual_seed(9)).to(dtype)
    x[3] = 0
    return x


def assert_equal_but_for_ties(ours: Tensor, wanted: Tensor) -> None:
    """An order of summation may tip an output over to the next number of its dtype; not more, and rarely."""
    step = torch.finfo(ours.dtype).eps
    error = (ours - wanted).abs().max().item()
    assert error <= (8 if ours.dtype == torch.float32 else 2) * step * wanted.abs().max().item()
    assert (ours != wanted).float().mean() < (0.02 if ours.dtype != torch.float32 else 1)


def made(layout: Any, dense: Tensor) -> Weight:
    weight: Weight = algorithms.get(layout.algorithm)(dense, layout.scheme(), **layout.algorithm_options())
    return weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
def test_bitlinear_is_the_peers(peer: Any, dtype: torch.dtype, biased: bool) -> None:
    layer = peer.BitLinear(96, 40, biased, dtype=dtype)
    values = ternary(40, 96)
    layer.weight.copy_(peer.pack_weights(values.clone()))
    layer.weight_scale.fill_(24.875)
    bias = torch.linspace(-1, 1, 40).to(dtype) if biased else None
    if bias is not None:
        layer.bias.copy_(bias)
    name = str(dtype).removeprefix("torch.")
    weight = BitNetLayout((40, 96), name, name).decode({"weight": layer.weight, "weight_scale": layer.weight_scale})
    assert torch.equal(weight.to_dense(torch.float32), values / 24.875)
    x = inputs(96, dtype)
    assert_equal_but_for_ties(multiply(weight, x, bias), layer(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_autobitlinear_is_the_peers(peer: Any, dtype: torch.dtype, biased: bool, packed: bool) -> None:
    layer = peer.AutoBitLinear(96, 40, biased, dtype=dtype).requires_grad_(False)
    values, bias = ternary(40, 96), torch.linspace(-1, 1, 40).to(dtype) if biased else None
    layer.weight.copy_(values)
    layer.weight_scale.fill_(0.0402)
    if bias is not None:
        layer.bias.copy_(bias)
    name = str(dtype).removeprefix("torch.")
    if packed:
        stored = {"weight": peer.pack_weights(values.clone()), "weight_scale": layer.weight_scale}
        weight = BitNetLayout((40, 96), name, name, divides=False).decode(stored)
    else:
        stored = {"weight": values.to(dtype), "weight_scale": layer.weight_scale}
        layout = UnpackedLayout((40, 96), name, name, name)
        weight = layout.decode(stored)
        assert all(torch.equal(tensor, stored[own]) for own, tensor in layout.encode(weight).items())
    assert torch.equal(weight.to_dense(torch.float32), values * layer.weight_scale.float())
    x = inputs(96, dtype)
    assert_equal_but_for_ties(multiply(weight, x, bias), layer(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
def test_online_weights_are_rounded_as_the_peer_does(peer: Any, dtype: torch.dtype, biased: bool) -> None:
    layer = peer.AutoBitLinear(96, 40, biased, dtype=dtype, online_quant=True).requires_grad_(False)
    name = str(dtype).removeprefix("torch.")
    layout = OnlineLayout((40, 96), name, name)
    weight = layout.decode({"weight": layer.weight.detach()})
    x = inputs(96, dtype)
    assert torch.equal(weight.to_dense(), peer.WeightQuant.apply(layer.weight))
    assert_equal_but_for_ties(multiply(weight, x, layer.bias), layer(x))
    before = layer.weight.clone()
    layer.weight.mul_(3)  # what was worked out from the old numbers must not be used for the new ones
    assert torch.equal(weight.to_dense(), peer.WeightQuant.apply(layer.weight))
    assert torch.equal(layout.encode(weight)["weight"], before * 3)


def test_four_rows_share_a_byte() -> None:
    values = torch.tensor([[1.0], [0.0], [-1.0], [1.0], [0.0], [1.0], [-1.0], [-1.0]])
    layout = BitNetLayout((8, 1), "float32", "float32", divides=False)
    stored = layout.encode(made(layout, values))
    # rows 0, 2, 4, 6 are the fields of the first byte, lowest bits first: codes 2, 0, 1, 0
    assert stored["weight"].tolist() == [[0b00_01_00_10], [0b00_10_10_01]]
    assert stored["weight_scale"].tolist() == [0.75]


@pytest.mark.parametrize("rows", [1, 5, 6, 9, 11])
def test_rows_that_do_not_fill_their_bytes(peer: Any, rows: int) -> None:
    values = ternary(rows, 12)
    layout = BitNetLayout((rows, 12), "float32", "float32", divides=False)
    stored = {"weight": peer.pack_weights(values.clone()), "weight_scale": torch.ones(1)}
    weight = layout.decode(stored)
    assert torch.equal(weight.to_dense(), values)
    assert torch.equal(layout.encode(weight)["weight"], stored["weight"])
    stored["weight"][-1] |= 0b11 << 6  # of a row that does not exist
    with pytest.raises(CorruptFile, match="weight"):
        layout.decode(stored)


@pytest.mark.parametrize("divides", [False, True])
def test_codes_are_those_of_the_paper(divides: bool) -> None:
    dense = torch.randn(24, 33, generator=torch.Generator().manual_seed(3))
    layout = BitNetLayout((24, 33), "float32", "float32", divides)
    weight = made(layout, dense.clone())
    mean = dense.abs().mean()
    stored = layout.encode(weight)["weight_scale"]
    torch.testing.assert_close(stored, (1 / mean if divides else mean)[None])
    wanted = (dense / mean).round().clamp(-1, 1)
    assert torch.equal(weight.tree.codes.integers().float() - 1, wanted)  # type: ignore[attr-defined]
    assert made(layout, torch.zeros(24, 33)).to_dense().abs().max() == 0
    with pytest.raises(NotRepresentable, match="NaN"):
        made(layout, torch.full((24, 33), torch.nan))


def test_the_fourth_code_is_no_value() -> None:
    layout = BitNetLayout((4, 3), "float32", "float32")
    with pytest.raises(CorruptFile, match="'weight' holds the code 3"):
        layout.decode({"weight": torch.tensor([[0, 3, 0]], dtype=torch.uint8), "weight_scale": torch.ones(1)})
    with pytest.raises(CorruptFile, match="divides"):
        layout.decode({"weight": torch.zeros(1, 3, dtype=torch.uint8), "weight_scale": torch.zeros(1)})


# --- whole models ----------------------------------------------------------------------------------------------------------


def copied(target: Path, change: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> Path:
    """The Llama golden with other settings and tensors."""
    target.mkdir()
    config = json.loads((LLAMA / "config.json").read_text())
    config["quantization_config"].update(change.pop("quantization_config", {}))
    (target / "config.json").write_text(json.dumps({**config, **change}))
    save_file({**load_file(LLAMA / "model.safetensors"), **(tensors or {})}, target / "model.safetensors")
    return target


def transformers_model(path: Path, peer: Any) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return torch.nn.Module.float(model)  # it leaves some of them in the dtype of the file


def norms() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    widths = {
        f"model.layers.{layer}.{block}.{own}_proj.rms_norm.weight": 256 if own == "down" else 128
        for layer in range(1)
        for block, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down")))
        for own in names
    }
    return {name: torch.rand(width, generator=generator) + 0.5 for name, width in widths.items()}


IDS = torch.arange(1, 13)[None]


def test_norms_before_linears(tmp_path: Path, peer: Any) -> None:
    stored = {name: tensor.to(torch.bfloat16) for name, tensor in norms().items()}
    folder = copied(tmp_path / "normed", {"quantization_config": {"use_rms_norm": True, "rms_norm_eps": 1e-3}}, stored)
    model: Any = anybit.load(folder, dtype=torch.float32)
    with torch.no_grad():
        wanted = transformers_model(folder, peer)(IDS).logits
        assert (model(IDS).logits - wanted).abs().max() < 1e-4 * wanted.abs().max()
    anybit.load(folder).save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in stored.items())
    assert set(again) == set(load_file(folder / "model.safetensors"))
    # gradients go through the norm, not past it
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 128, requires_grad=True)
    layer(x).sum().backward()
    scale = stored["model.layers.0.self_attn.q_proj.rms_norm.weight"].float()
    twin = x.detach().clone().requires_grad_()
    normed = twin * torch.rsqrt(twin.pow(2).mean(-1, keepdim=True) + 1e-3) * scale
    (normed @ layer.dequantize(torch.float32).T).sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)
    with pytest.raises(NotRepresentable, match="use_rms_norm"):
        anybit.dequantize(folder, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_a_missing_or_damaged_norm_is_named(tmp_path: Path) -> None:
    use = {"quantization_config": {"use_rms_norm": True}}
    few = norms()
    few.pop("model.layers.0.mlp.up_proj.rms_norm.weight")
    with pytest.raises(MissingTensor, match=r"mlp\.up_proj\.rms_norm\.weight"):
        anybit.load(copied(tmp_path / "few", dict(use), few))
    odd = {**norms(), "model.layers.0.mlp.up_proj.rms_norm.weight": torch.ones(7)}
    with pytest.raises(ShapeMismatch, match=r"mlp\.up_proj\.rms_norm\.weight"):
        anybit.load(copied(tmp_path / "odd", {"quantization_config": {"use_rms_norm": True}}, odd))
    with pytest.raises(CalibrationNeeded, match="use_rms_norm"):
        anybit.quantize(TINY, tmp_path / "made", BitNetQuantConfig(use_rms_norm=True))


def test_weight_scale_multiplies_the_bias_too(tmp_path: Path, peer: Any) -> None:
    names = [f"model.layers.0.self_attn.{own}_proj" for own in "qkvo"]
    tensors = {f"{name}.bias": torch.linspace(-1, 1, 64 if name[-6] in "kv" else 128) for name in names}
    scales = {name: tensor for name, tensor in load_file(LLAMA / "model.safetensors").items() if "weight_scale" in name}
    tensors |= {name: 1 / tensor.float() for name, tensor in scales.items()}
    change = {"attention_bias": True, "quantization_config": {"linear_class": "autobitlinear"}}
    folder = copied(tmp_path / "biased", change, tensors)
    model: Any = anybit.load(folder, dtype=torch.float32)
    with torch.no_grad():
        wanted = transformers_model(folder, peer)(IDS).logits
        assert (model(IDS).logits - wanted).abs().max() < 1e-4 * wanted.abs().max()
    anybit.dequantize(folder, tmp_path / "dense", dtype=torch.float32)
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    for name in names:
        scaled = tensors[f"{name}.bias"] * tensors[f"{name}.weight_scale"]
        assert torch.equal(dense[f"{name}.bias"], scaled)
    emptied = model.dequantize(torch.float32)
    assert torch.equal(emptied.model.layers[0].self_attn.q_proj.bias, dense[f"{names[0]}.bias"])


def test_an_online_checkpoint_is_made_loaded_and_saved(tmp_path: Path, peer: Any) -> None:
    config = BitNetQuantConfig(linear_class="autobitlinear", quantization_mode="online")
    plan = anybit.quantize(TINY, tmp_path / "online", config)
    assert {entry.slot.kind for entry in plan.entries if entry.action == "quantize"} == {"linear"}
    made_of, source = load_file(tmp_path / "online" / "model.safetensors"), load_file(TINY / "model.safetensors")
    assert all(torch.equal(made_of[name], tensor) for name, tensor in source.items())
    model: Any = anybit.load(tmp_path / "online", dtype=torch.float32)
    with torch.no_grad():
        wanted = transformers_model(tmp_path / "online", peer)(IDS).logits
        assert (model(IDS).logits - wanted).abs().max() < 2e-2 * wanted.abs().max()
    anybit.load(tmp_path / "online").save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in made_of.items())


def test_contradictions_are_refused_with_the_evidence(tmp_path: Path) -> None:
    online = {"quantization_config": {"linear_class": "autobitlinear", "quantization_mode": "online"}}
    with pytest.raises(ShapeMismatch, match="offline"):
        anybit.load(copied(tmp_path / "online", online))
    unpacked = {"model.layers.0.mlp.up_proj.weight": ternary(256, 128)}
    with pytest.raises(ShapeMismatch, match="autobitlinear"):
        anybit.load(copied(tmp_path / "unpacked", {}, unpacked))
    scale = {"model.layers.0.mlp.up_proj.weight_scale": torch.ones(256)}
    with pytest.raises(ShapeMismatch, match="one float"):
        anybit.load(copied(tmp_path / "scale", {}, scale))


def test_odd_rows_stay_dense_and_say_why(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LlamaConfig(
        hidden_size=32, intermediate_size=50, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=40,
    )  # fmt: skip
    LlamaForCausalLM(small).save_pretrained(tmp_path / "dense")
    plan = anybit.quantize(tmp_path / "dense", tmp_path / "made", BitNetQuantConfig())
    reasons = {entry.slot.module: entry.reason for entry in plan.entries if entry.action == "dense"}
    assert "50 outputs" in reasons["model.layers.0.mlp.up_proj"]
    assert "embedding" in reasons["model.embed_tokens"]
    assert anybit.load(tmp_path / "made").anybit_plan.coverage == plan.coverage


@pytest.mark.parametrize("linear_class", ["bitlinear", "autobitlinear"])
def test_experts_are_packed_where_they_are_stored_one_by_one(tmp_path: Path, linear_class: str) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    small = Qwen3MoeConfig(
        hidden_size=32, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, vocab_size=64,
    )  # fmt: skip
    Qwen3MoeForCausalLM(small).save_pretrained(tmp_path / "dense")
    config = BitNetQuantConfig(linear_class=linear_class)
    plan = anybit.quantize(tmp_path / "dense", tmp_path / "made", config)
    packed = {entry.slot.module for entry in plan.entries if entry.action == "quantize"}
    experts = "model.layers.0.mlp.experts"
    assert {f"{experts}.gate_up_proj", f"{experts}.down_proj"} <= packed
    model: Any = anybit.load(tmp_path / "made")
    stacked = model.model.layers[0].mlp.experts.gate_up_proj.quantized_weight
    x = inputs(32, torch.float32)
    gate, up = (
        load_file(tmp_path / "dense" / "model.safetensors")[f"{experts}.2.{own}_proj.weight"] for own in ("gate", "up")
    )
    divides = linear_class == "bitlinear"
    for number, dense in enumerate((gate, up)):  # each with its own scale
        layout = BitNetLayout((32, 32), "float32", "float32", divides)
        wanted = multiply(made(layout, dense), x, None)
        ours = multiply(stacked.select(2), x, None)[:, 32 * number : 32 * (number + 1)]
        torch.testing.assert_close(ours, wanted)
