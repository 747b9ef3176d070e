"""Packed layers in a decoding loop: products past torch's dispatcher are those of the operator, whole models compile."""

import copy
import io
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import anybit
from anybit import BitsAndBytesConfig
from anybit.kernels import choose, ops
from anybit.kernels._direct import unobserved
from anybit.modules import QuantLinear

NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16")


def config() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, vocab_size=128,
        attention_bias=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    place = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config()).bfloat16().save_pretrained(place)
    return place


def layer_of(model: nn.Module) -> QuantLinear:
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, QuantLinear)
    assert layer.bias is not None
    return layer


def by_operator(layer: QuantLinear, x: torch.Tensor) -> torch.Tensor:
    return torch.ops.anybit.linear(x, layer.packed, layer.bias, layer.spec, layer.out_features)


@pytest.fixture
def layer(folder: Path) -> QuantLinear:
    return layer_of(anybit.load(folder, NF4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(64,), (1, 64), (1, 1, 64), (2, 3, 64), (40, 64), (0, 64)])
def test_the_direct_product_is_the_operators(layer: QuantLinear, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    with torch.inference_mode():
        assert unobserved(x)
        direct, operator = layer(x), by_operator(layer, x)
    assert direct.dtype == dtype
    assert torch.equal(direct, operator)


def test_inputs_that_do_not_lie_row_by_row(layer: QuantLinear) -> None:
    x = torch.randn(64, 5).T
    with torch.no_grad():
        assert torch.equal(layer(x), layer(x.contiguous()))
        assert torch.equal(layer(x[::2]), layer(x[::2].contiguous()))
        with pytest.raises(RuntimeError, match="columns"):
            layer(torch.randn(2, 63))


def test_other_weights_in_the_same_layer_are_noticed(folder: Path, layer: QuantLinear) -> None:
    x = torch.randn(1, 64)
    with torch.no_grad():
        before = layer(x)
        other = copy.deepcopy(layer)
        for tensor in other.packed:
            if tensor.dtype == torch.uint8:
                tensor.copy_(tensor.flip(0))
        assert torch.equal(layer(x), before), "a copy reads its own tensors"
        changed = other(x)
        assert not torch.equal(changed, before)
        layer.load_state_dict(other.state_dict())
        assert torch.equal(layer(x), changed)
        layer.bias = nn.Parameter(torch.zeros_like(layer.bias))
        assert torch.equal(layer(x), by_operator(layer, x))
        layer.bias = None
        assert torch.equal(layer(x), torch.ops.anybit.linear(x, layer.packed, None, layer.spec, 64))


def test_a_layer_that_ran_can_be_copied_and_saved(layer: QuantLinear) -> None:
    x = torch.randn(1, 64)
    with torch.no_grad():
        expected = layer(x)
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        for twin in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
            assert twin._bound is None
            assert torch.equal(twin(x), expected)


def test_whoever_looks_at_operators_sees_them(layer: QuantLinear) -> None:
    x = torch.randn(3, 64)
    assert not unobserved(x), "gradients are recorded"
    with torch.no_grad():
        assert unobserved(x)
        assert not unobserved(nn.Parameter(x))
        with FlopCounterMode(display=False):
            assert not unobserved(x)
        with torch.profiler.profile() as profile:
            layer(x)
        assert any(event.name == "anybit::linear" for event in profile.events())
        assert not torch.func.vmap(lambda row: row * unobserved(row))(x).any()


def test_a_decoding_step_of_a_whole_model_compiles_into_one_graph(folder: Path) -> None:
    model = anybit.load(folder, NF4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    logits = []
    with torch.inference_mode():
        for run in (model, compiled):
            cache = StaticCache(config=model.config, max_cache_len=16)
            model(input_ids=torch.tensor([[5, 9, 17, 33]]), past_key_values=cache, use_cache=True)
            steps = [run(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True) for token in (7, 70)]
            logits.append(torch.cat([step.logits for step in steps]).float())
    # bfloat16: where a graph keeps an intermediate result in float32, the last bit may differ
    torch.testing.assert_close(logits[1], logits[0], rtol=0.02, atol=0.02)


def test_a_kernel_without_a_direct_product_is_called_all_the_same(layer: QuantLinear) -> None:
    x = torch.randn(2, 64)
    reference = choose(layer.quantized_weight, "cpu", only="reference").kernel
    assert reference.bound("", layer.packed, None) is None
    with torch.no_grad():
        near = layer(x)
        layer._prepare(layer.quantized_weight, reference)
        torch.testing.assert_close(layer(x), near, rtol=1e-4, atol=1e-4)
        assert torch.equal(layer(x), ops.linear(x, layer.packed, layer.bias, layer.spec, layer.out_features))
