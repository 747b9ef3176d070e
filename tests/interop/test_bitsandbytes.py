"""Against bitsandbytes itself, on the CPU: what it writes, what it reads, what it multiplies. Byte for byte.

Run it in an environment with bitsandbytes 0.50 and torch: python -m pytest -m interop tests/interop/test_bitsandbytes.py
"""

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import anybit
from anybit import algorithms
from anybit.kernels.reference import multiply
from anybit.methods._bnb_4bit import Bnb4BitLayout
from anybit.methods._llm_int8 import LlmInt8Layout

bnb = pytest.importorskip("bitsandbytes")
parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")
F = bnb.functional
pytestmark = pytest.mark.interop

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# multiples of nothing, rows that straddle blocks, one number, one block, an odd count, many blocks
SHAPES = ((7, 13), (5, 96), (33, 100), (1, 1), (1, 64), (3, 63), (128, 256), (600, 1088))
CONTENTS = ("normal", "zeros", "subnormal", "huge", "few_levels", "holes", "tiny_and_large")


def contents(kind, shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator)
    if kind == "zeros":
        return torch.zeros(shape, dtype=dtype)
    if kind == "subnormal":
        return (normal * {torch.float16: 1e-6}.get(dtype, 1e-39)).to(dtype)
    if kind == "huge":
        return (normal.clamp(-3, 3) * {torch.float16: 2e4}.get(dtype, 1e38)).to(dtype)
    if kind == "few_levels":  # many values half way between two levels
        return (normal * 24).round().div(24).clamp(-1, 1).to(dtype)
    if kind == "holes":
        return (normal * (torch.rand(shape, generator=generator) < 0.05)).to(dtype)
    if kind == "tiny_and_large":
        return (normal * torch.exp(4 * torch.randn(shape, generator=generator))).clamp(-6e4, 6e4).to(dtype)
    return (normal * 0.02).to(dtype)


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else tensor.reshape(-1)


def name(dtype):
    return str(dtype).removeprefix("torch.")


def made(layout, dense):
    target = layout.scheme()
    weight = algorithms.get(layout.algorithm)(dense, target, **layout.algorithm_options())
    assert weight.structure() == target.structure()
    return layout.encode(weight)


def written(dense, **options):
    """The tensors of a weight as bitsandbytes stores them."""
    packed, state = F.quantize_4bit(dense, **options)
    return {"weight": packed, **{f"weight.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}}


def assert_same(ours, theirs):
    assert set(ours) == set(theirs)
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype, key
        assert ours[key].shape == tensor.shape, key
        different = raw(ours[key]) != raw(tensor)
        assert not different.any(), (
            f"{key}: {int(different.sum())} of {different.numel()} bytes, first at {int(different.nonzero()[0])}"
        )


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("content", CONTENTS)
def test_4_bit_weights_have_its_bytes(content, kind, nested):
    for dtype, shape, size in itertools.product(DTYPES, SHAPES, (32, 64, 128, 4096)):
        dense = contents(content, shape, dtype)
        layout = Bnb4BitLayout(shape, name(dtype), kind, size, 256 if nested else None)
        theirs = written(dense, blocksize=size, quant_type=kind, compress_statistics=nested)
        assert_same(made(layout, dense), theirs)


@pytest.mark.parametrize("nested", [False, True])
def test_random_4_bit_weights_have_its_bytes(nested):
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        shape = tuple(torch.randint(1, 300, (2,), generator=generator).tolist())
        dtype, kind = DTYPES[seed % 3], ("nf4", "fp4")[seed // 3 % 2]
        dense = contents(CONTENTS[seed % len(CONTENTS)], shape, dtype, seed)
        layout = Bnb4BitLayout(shape, name(dtype), kind, 64, 256 if nested else None)
        assert_same(made(layout, dense), written(dense, blocksize=64, quant_type=kind, compress_statistics=nested))


def test_nested_scales_of_many_blocks_have_its_bytes():
    dense = contents("tiny_and_large", (4096, 2048), torch.float32)
    layout = Bnb4BitLayout(dense.shape, "float32", "nf4", 64, 256)
    assert_same(made(layout, dense), written(dense, quant_type="nf4", compress_statistics=True))


@pytest.mark.parametrize(
    "storage", [torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
def test_bytes_under_another_dtype(storage):
    dense = contents("normal", (48, 96), torch.bfloat16)
    layout = Bnb4BitLayout((48, 96), "bfloat16", "nf4", storage=name(storage))
    theirs = written(dense, quant_type="nf4", quant_storage=storage)
    assert_same(made(layout, dense), theirs)
    assert_same(layout.encode(layout.decode(theirs)), theirs)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_4_bit_weights_have_its_numbers(kind, nested):
    for dtype, shape, size in itertools.product(DTYPES, SHAPES, (64, 128)):
        packed, state = F.quantize_4bit(
            contents("normal", shape, dtype), blocksize=size, quant_type=kind, compress_statistics=nested
        )
        stored = {"weight": packed, **{f"weight.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}}
        layout = Bnb4BitLayout(shape, name(dtype), kind, size, 256 if nested else None)
        # as one long row: its vector code mistakes the scales of rows that are no whole number of blocks
        state.shape = torch.Size((1, shape[0] * shape[1]))
        for target in DTYPES:
            state.dtype = target
            assert torch.equal(layout.decode(stored).to_dense(target), F.dequantize_4bit(packed, state).view(shape)), (
                shape,
                target,
            )


def test_a_stack_of_experts_has_its_bytes():
    for shape, size, nested in itertools.product(((4, 64, 128), (3, 5, 128), (2, 3, 96)), (32, 64), (False, True)):
        if shape[1] * shape[2] % size:
            continue
        module = torch.nn.Module()
        dense = contents("normal", shape, torch.bfloat16)
        module.experts = torch.nn.Parameter(dense, requires_grad=False)
        parametrize.replace_parameter_4bit(
            module, "experts", compress_statistics=nested, quant_type="nf4", blocksize=size
        )
        theirs = {key.removeprefix("experts").removeprefix("."): tensor for key, tensor in module.state_dict().items()}
        layout = Bnb4BitLayout(shape, "bfloat16", "nf4", size, 256 if nested else None, own="")
        assert_same(made(layout, dense), theirs)
        assert_same(layout.encode(layout.decode(theirs)), theirs)
        assert torch.equal(layout.decode(theirs).to_dense(), module.experts.view(shape))


def int8_of(dense):
    codes, scales, _ = F.int8_vectorwise_quant(dense.to(torch.float16))
    return {"weight": codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}


@pytest.mark.parametrize("content", CONTENTS)
def test_int8_weights_have_its_bytes(content):
    for dtype, shape in itertools.product(DTYPES, SHAPES):
        dense = contents(content, shape, dtype)
        dense = dense.clamp(-6e4, 6e4)  # beyond float16 it writes an infinite scale, which no reader can use
        layout = LlmInt8Layout(shape, name(dtype))
        theirs = int8_of(dense)
        assert_same(made(layout, dense), theirs)
        weight = layout.decode(theirs)
        assert torch.equal(weight.to_dense(torch.float32), F.int8_vectorwise_dequant(theirs["weight"], theirs["SCB"]))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 2.0, 6.0])
def test_int8_products_have_its_bits(threshold, biased):
    for dtype, (out, width), tokens in itertools.product(DTYPES, ((33, 100), (64, 3000), (512, 256)), (1, 7, 64)):
        stored = int8_of(contents("normal", (out, width), torch.float16))
        x = contents("tiny_and_large", (tokens, width), dtype, seed=tokens).clamp(-30, 30) / 4
        x[tokens // 2, 3] = 19.0
        x[0, width - 1] = -7.5
        bias = contents("normal", (out,), dtype) if biased else None
        state = bnb.MatmulLtState()
        state.CB, state.SCB = stored["weight"], stored["SCB"]
        state.has_fp16_weights = state.is_training = False
        theirs = bnb.matmul(x.clone(), state.CB, state=state, threshold=threshold, bias=bias)
        ours = multiply(LlmInt8Layout((out, width), name(dtype), threshold).decode(stored), x, bias)
        assert torch.equal(ours, theirs), (dtype, out, width, tokens, (ours.float() - theirs.float()).abs().max())


# --- whole models, through transformers ------------------------------------------------------------------------------------

MODELS = Path(__file__).parents[2] / "examples"
OPTIONS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_storage": torch.bfloat16},
    "int8": {"load_in_8bit": True},
    "skips": {"load_in_4bit": True, "llm_int8_skip_modules": ["k_proj", "c_fc", "lm_head"]},
}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """Conv1D layers, tied embeddings, biases."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=96, n_embd=128, n_layer=2, n_head=4, n_positions=32)
    folder = tmp_path_factory.mktemp("gpt2")
    transformers.GPT2LMHeadModel(config).to(torch.float16).save_pretrained(folder)
    return folder


def without_repacking(model):
    """Its first forward on a CPU with bfloat16 instructions rounds the scales; this is the other path."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def stored_in(folder):
    found = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        found.update(load_file(file))
    return found


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ["tiny-llama", "gpt2"])
def test_whole_models(name, options, gpt2, tmp_path):
    transformers = pytest.importorskip("transformers")
    source = gpt2 if name == "gpt2" else MODELS / name
    config = transformers.BitsAndBytesConfig(**OPTIONS[options])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    theirs.save_pretrained(tmp_path / "theirs")
    anybit.quantize(str(source), str(tmp_path / "ours"), anybit.BitsAndBytesConfig(**OPTIONS[options]))
    assert_same(stored_in(tmp_path / "ours"), stored_in(tmp_path / "theirs"))
    ours = anybit.load(tmp_path / "theirs").eval()
    again = without_repacking(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours"))
    ids = torch.arange(20)[None] * 3
    with torch.no_grad():
        wanted = without_repacking(theirs)(ids).logits.float()
        assert torch.equal(again(ids).logits.float(), wanted)
        # it rounds 4-bit weights to the model's dtype before it multiplies; we do not
        assert (ours(ids).logits.float() - wanted).abs().max() <= 2.0**-6 * wanted.abs().max()
