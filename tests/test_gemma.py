"""Gemma's checkpoints where the laws cannot see them: transformers' own layers, static rounding, patterns, odd widths."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import anybit
from anybit import algorithms
from anybit.containers.info import TensorInfo
from anybit.errors import CorruptFile, InvalidOption, MissingTensor, NotRepresentable, ShapeMismatch
from anybit.kernels.reference import multiply
from anybit.methods._gemma_layouts import INPUT, OUTPUT, GemmaLayout
from anybit.methods.gemma import GemmaQuantizationConfig, GemmaQuantizer
from anybit.weight import ModuleInfo, Weight

GOLDEN = Path(__file__).parent / "golden" / "gemma" / "mixed-2-4-8-embed"
TINY = Path(__file__).parents[1] / "examples" / "tiny-llama"
IDS = torch.arange(1, 13)[None]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(layout: Any, dense: Tensor) -> Weight:
    weight: Weight = algorithms.get(layout.algorithm)(dense, layout.scheme(), **layout.algorithm_options())
    return weight


def infos(tensors: dict[str, Tensor]) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(f"m.{name}", str(tensor.dtype)[6:], tuple(tensor.shape), tensor.nbytes, "file")
        for name, tensor in tensors.items()
    }


def layout_of(tensors: dict[str, Tensor], shape: tuple[int, int], kind: str = "linear", **options: Any) -> Any:
    quantizer = GemmaQuantizer(GemmaQuantizationConfig(**options))
    return quantizer.layout_of(ModuleInfo("m", kind, shape, "float32"), infos(tensors), lambda name: tensors[name])


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("columns", [32, 33, 34, 35])
def test_codes_are_read_as_the_peer_reads_them(bits: int, columns: int) -> None:
    from transformers.integrations.gemma_quant import QuantizedLinear

    layer = QuantizedLinear(columns, 6, num_bits=bits).requires_grad_(False)
    # any bytes, also behind the last column
    layer.weight.copy_(torch.randint(-128, 128, layer.weight.shape, generator=torch.Generator().manual_seed(1)))
    layer.weight_scale.copy_(random(6, 1).abs())
    tensors = dict(layer.state_dict())
    layout = layout_of(tensors, (6, columns), num_bits=bits)
    weight = layout.decode(tensors)
    assert torch.equal(weight.to_dense(torch.float32), layer._dequantize_weights())
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in layout.encode(weight).items())
    signed = {**tensors, "weight": tensors["weight"].view(torch.int8)}
    again = layout_of(signed, (6, columns), num_bits=bits).decode(signed)
    assert torch.equal(again.to_dense(), weight.to_dense())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [(0.0, 0.0), (0.03, 0.0), (0.0, 0.1), (0.03, 0.1)])
@pytest.mark.parametrize("biased", [False, True])
def test_inputs_and_outputs_are_rounded_as_by_the_peer(
    dtype: torch.dtype, steps: tuple[float, float], biased: bool
) -> None:
    from transformers.integrations.gemma_quant import QuantizedLinear

    layer = QuantizedLinear(64, 24, bias=biased, num_bits=4).requires_grad_(False)
    layer.weight.copy_(torch.randint(0, 256, layer.weight.shape, generator=torch.Generator().manual_seed(2)))
    layer.weight_scale.fill_(0.0078125)  # a power of two: exact in bfloat16, too
    layer.input_activation_scale.fill_(steps[0])
    layer.output_activation_scale.fill_(steps[1])
    bias = layer.bias.to(dtype) if biased else None
    if biased:
        layer.bias = torch.nn.Parameter(bias, requires_grad=False)
    tensors = {name: tensor for name, tensor in layer.state_dict().items() if name != "bias"}
    layout = layout_of(tensors, (24, 64))
    assert layout.rounds == any(steps)
    weight = layout.decode(tensors)
    assert (weight.activation is not None) == any(steps)
    x = random(9, 64, seed=3).to(dtype) * 4
    ours, wanted = multiply(weight, x, bias), layer(x)
    # one step of the output's grid, or of its dtype, where an order of summation tips a tie; rarely
    step = max(steps[1], 2 * torch.finfo(dtype).eps * wanted.abs().max().item())
    assert (ours - wanted).abs().max().item() <= step * 1.01
    assert (ours - wanted).abs().gt(1e-5).float().mean() < 0.02
    if steps[0]:  # what lies beyond 127 steps is clipped
        assert not torch.allclose(ours, multiply(Weight(weight.tree, weight.dtype), x, bias), atol=1e-2)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("blocks", [1, 4])
def test_embeddings_are_the_peers(bits: int, blocks: int) -> None:
    from transformers.integrations.gemma_quant import QuantizedEmbedding

    layer = QuantizedEmbedding(20, 32, torch.float32, num_bits=bits)
    layer.embedding_quantized.copy_(torch.randint(-128, 128, layer.embedding_quantized.shape))
    layer.embedding_scale = torch.nn.Parameter(random(20, blocks).abs())
    tensors = {name: tensor.detach() for name, tensor in layer.state_dict().items()}
    layout = layout_of(tensors, (20, 32), "embedding", num_bits=bits, quantize_embeddings=True)
    weight = layout.decode(tensors)
    assert torch.equal(weight.to_dense(), layer.weight)
    assert torch.equal(weight.tree.take_rows(IDS[0]), layer(IDS[0]))
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in layout.encode(weight).items())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_are_the_nearest_below_the_largest_of_a_row(bits: int) -> None:
    dense = random(10, 21)
    dense[4] = 0
    top = 2 ** (bits - 1) - 1
    weight = made(GemmaLayout((10, 21), "float32", bits), dense)
    scale = dense.abs().amax(1, keepdim=True) / top
    scale[4] = 1
    assert torch.equal(weight.tree.codes.integers(), torch.round(dense / scale).to(torch.int8))  # type: ignore[attr-defined]
    assert torch.equal(weight.tree.scale.tensor, scale)  # type: ignore[attr-defined]
    with pytest.raises(NotRepresentable, match="nan"):
        made(GemmaLayout((1, 2), "float32", bits), torch.tensor([[0.0, torch.nan]]))


PATTERNS = {"mlp": {"num_bits": 2}, r"layers\.1\.": {"num_bits": 8}, "self_attn|proj$": {}}


@pytest.mark.parametrize(
    ("module", "bits"),
    [("layers.1.mlp.up_proj", 8), ("layers.0.mlp.up_proj", 2), ("layers.0.self_attn.k_proj", 4), ("head", 4)],
)
def test_the_leftmost_pattern_counts(module: str, bits: int) -> None:
    config = GemmaQuantizationConfig(module_quant_configs=PATTERNS)
    assert config.bits_of(module) == bits
    groups = "|".join(f"(?P<g{number}>{pattern})" for number, pattern in enumerate(PATTERNS))
    match = re.search(groups, module)  # as the peer does it
    own: dict[str, int] = next(
        (
            list(PATTERNS.values())[int(name[1:])]
            for name, found in (match.groupdict() if match else {}).items()
            if found
        ),
        {},
    )
    assert own.get("num_bits", 4) == bits


def test_patterns_may_only_set_bits() -> None:
    with pytest.raises(InvalidOption, match="group_size"):
        GemmaQuantizationConfig(module_quant_configs={"mlp": {"group_size": 2}})
    with pytest.raises(InvalidOption, match="2, 4 or 8"):
        GemmaQuantizationConfig(module_quant_configs={"mlp": {"num_bits": 3}})


# --- whole models ----------------------------------------------------------------------------------------------------------


def copied(target: Path, tensors: dict[str, Tensor | None], **settings: Any) -> Path:
    """The golden with other tensors (None: without) and settings."""
    target.mkdir()
    config = json.loads((GOLDEN / "config.json").read_text())
    config["quantization_config"].update(settings)
    (target / "config.json").write_text(json.dumps(config))
    stored = {**load_file(GOLDEN / "model.safetensors"), **tensors}
    save_file({name: tensor for name, tensor in stored.items() if tensor is not None}, target / "model.safetensors")
    return target


LAYER = "model.layers.0.mlp.down_proj"


def test_a_calibrated_checkpoint_gives_the_peers_logits(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    stored = load_file(GOLDEN / "model.safetensors")
    steps = {
        name: torch.tensor(0.02 if name.endswith(INPUT) else 0.05) for name in stored if name.endswith((INPUT, OUTPUT))
    }
    caches = {f"model.layers.0.self_attn.{own}_cache_scale": torch.tensor(0.1) for own in "kv"}
    folder = copied(tmp_path / "calibrated", {**steps, **caches})
    model: Any = anybit.load(folder, dtype=torch.float32)
    plain: Any = anybit.load(GOLDEN, dtype=torch.float32)
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        wanted, unrounded = peer(IDS).logits, plain(IDS).logits
        error = (model(IDS).logits - wanted).abs().max()
    assert error < 0.1 * (unrounded - wanted).abs().max()  # ties tip over from layer to layer
    assert set(model.anybit_plan.ignored) == set(caches)
    anybit.load(folder).save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in steps.items())


def test_scales_of_inputs_may_be_missing_and_are_not_made_up(tmp_path: Path) -> None:
    folder = copied(tmp_path / "few", {f"{LAYER}.{INPUT}": None, f"{LAYER}.{OUTPUT}": torch.tensor(0.05)})
    model: Any = anybit.load(folder)
    weight = model.get_submodule(LAYER).quantized_weight
    assert weight.activation is not None
    assert weight.activation.names == (OUTPUT,)
    model.save_pretrained(tmp_path / "again")
    assert f"{LAYER}.{INPUT}" not in load_file(tmp_path / "again" / "model.safetensors")


def test_what_tensors_and_configuration_disagree_on_is_named(tmp_path: Path) -> None:
    with pytest.raises(ShapeMismatch, match="as many bytes as 4 bits take"):
        anybit.load(copied(tmp_path / "bits", {}, num_bits=2))
    with pytest.raises(MissingTensor, match=r"down_proj\.weight_scale"):
        anybit.load(copied(tmp_path / "scale", {f"{LAYER}.weight_scale": None}))
    with pytest.raises(MissingTensor, match="embedding_scale"):
        anybit.load(copied(tmp_path / "embedding", {"model.embed_tokens.embedding_scale": None}))
    with pytest.raises(ShapeMismatch, match="divisor"):
        anybit.load(copied(tmp_path / "blocks", {"model.embed_tokens.embedding_scale": torch.ones(128, 3)}))
    with pytest.raises(CorruptFile, match=INPUT):
        anybit.load(copied(tmp_path / "nan", {f"{LAYER}.{INPUT}": torch.tensor(torch.nan)}))


def test_a_checkpoint_is_made_that_the_peer_loads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = GemmaQuantizationConfig(
        num_bits=8, quantize_embeddings=True, module_quant_configs={"mlp": {"num_bits": 4}},
        modules_to_not_convert=["lm_head"],
    )  # fmt: skip
    plan = anybit.quantize(TINY, tmp_path / "made", config)
    assert {entry.slot.module for entry in plan.entries if entry.action == "dense"} == {"lm_head"}
    model: Any = anybit.load(tmp_path / "made", dtype=torch.float32)
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype=torch.float32)
    with torch.no_grad():
        wanted = peer(IDS).logits
        assert (model(IDS).logits - wanted).abs().max() < 1e-4 * wanted.abs().max()
    without = anybit.plan(TINY, GemmaQuantizationConfig())
    reasons = {entry.slot.module: entry.reason for entry in without.entries if entry.action == "dense"}
    assert "quantize_embeddings" in reasons["model.embed_tokens"]


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_of_gemma_are_multiplied_as_its_class_does(tmp_path: Path, tied: bool) -> None:
    from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

    small = Gemma3TextConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, vocab_size=64, tie_word_embeddings=tied,
    )  # fmt: skip
    Gemma3ForCausalLM(small).save_pretrained(tmp_path / "dense")
    config = GemmaQuantizationConfig(num_bits=8, quantize_embeddings=True, modules_to_not_convert=["lm_head"])
    plan = anybit.quantize(tmp_path / "dense", tmp_path / "made", config)
    assert "model.embed_tokens" in {entry.slot.module for entry in plan.entries if entry.action == "quantize"}
    model: Any = anybit.load(tmp_path / "made", dtype=torch.float32)
    rows = model.model.embed_tokens.dequantize(torch.float32)[IDS]
    torch.testing.assert_close(model.model.embed_tokens(IDS), rows * 8.0)
    with torch.no_grad():
        if tied:  # which the peer does not load: it ties to a parameter that its quantized table does not have
            wanted = anybit.load(tmp_path / "dense", dtype=torch.float32)(IDS).logits  # type: ignore[operator]
            assert (model(IDS).logits - wanted).abs().max() < 0.05 * wanted.abs().max()
        else:
            wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype=torch.float32)(IDS).logits
            assert (model(IDS).logits - wanted).abs().max() < 1e-4 * wanted.abs().max()
