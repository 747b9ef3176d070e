"""bitsandbytes' layouts, its way to quantize and its LLM.int8 product, held to bytes that bitsandbytes made."""

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from anybit import algorithms
from anybit.algorithms import _loops, absmax
from anybit.errors import CorruptFile, InvalidOption, MissingTensor, NoKernel, NotRepresentable, ShapeMismatch
from anybit.kernels.reference import multiply
from anybit.methods._bnb_4bit import Bnb4BitLayout, QuantState
from anybit.methods._llm_int8 import LlmInt8Layout
from anybit.quantizers import AutoHfQuantizer
from anybit.weight import levels, nodes
from anybit.weight.joining import join_rows, split_rows
from anybit.weight.layout import ModuleInfo
from anybit.weight.slicing import slice_columns, slice_rows
from anybit.weight.weight import Weight, same

VECTORS = Path(__file__).parent / "golden" / "bitsandbytes_vectors"
STATE = "weight.quant_state.bitsandbytes__nf4"


@functools.cache
def vectors(file):
    """case -> its options and tensors."""
    found = {}
    with safe_open(VECTORS / f"{file}.safetensors", "pt") as opened:
        for name, options in json.loads(opened.metadata()["cases"]).items():
            found[name] = {**options, "stored": {}}
        for key in opened.keys():  # noqa: SIM118
            case, own, *rest = key.split("/")
            if own == "stored":
                found[case]["stored"][rest[0]] = opened.get_tensor(key)
            else:
                found[case]["/".join([own, *rest])] = opened.get_tensor(key)
    return found


def cases(file):
    with safe_open(VECTORS / f"{file}.safetensors", "pt") as opened:
        return list(json.loads(opened.metadata()["cases"]))


def raw(tensor):
    return bytes(tensor.reshape(-1).view(torch.uint8).tolist())


def assert_same(ours, theirs):
    assert set(ours) == set(theirs)
    for key, tensor in theirs.items():
        assert (ours[key].dtype, ours[key].shape) == (tensor.dtype, tensor.shape), key
        assert raw(ours[key]) == raw(tensor), key


def quantized(layout, dense):
    return algorithms.get(layout.algorithm)(dense, layout.scheme(), **layout.algorithm_options())


def quantizer(pre_quantized=False, **options):
    config = {"quant_method": "bitsandbytes", "load_in_4bit": "load_in_8bit" not in options, **options}
    found = AutoHfQuantizer.from_config(config, pre_quantized=pre_quantized)
    found.begin(torch.nn.Module(), [])
    return found


def headers(tensors, module="m"):
    return {
        name: SimpleNamespace(
            name=f"{module}.{name}",
            dtype=str(tensor.dtype)[6:],
            shape=tuple(tensor.shape),
            nbytes=tensor.nbytes,
            file="f",
        )
        for name, tensor in tensors.items()
    }


def layout_of(tensors, shape, kind="linear", dtype="bfloat16", **options):
    module = ModuleInfo("m", kind, shape, dtype)
    return quantizer(True, **options).layout_of(module, headers(tensors), lambda name: tensors[name])


# --- 4 bit: bitsandbytes' bytes ------------------------------------------------------------------------------------------


def layout_for(case):
    source = case["source"]
    config = quantizer(
        bnb_4bit_quant_type=case["kind"],
        bnb_4bit_use_double_quant=case["nested"],
        bnb_4bit_quant_storage=case["storage"],
    )
    kind = "linear" if source.dim() == 2 else "experts"
    layout = config.new_layout(ModuleInfo("m", kind, tuple(source.shape), str(source.dtype)[6:]))
    assert layout.own == case["own"]
    return Bnb4BitLayout(**{**layout.__dict__, "blocksize": case["size"]})


@pytest.mark.parametrize("name", cases("four_bits"))
def test_4_bit_weights_are_quantized_to_its_bytes(name):
    case = vectors("four_bits")[name]
    layout = layout_for(case)
    before = case["source"].clone()
    weight = quantized(layout, case["source"])
    assert weight.structure() == layout.scheme().structure()
    assert_same(layout.encode(weight), case["stored"])
    assert raw(before) == raw(case["source"])
    turned = quantized(layout, case["source"].transpose(-1, -2).contiguous().transpose(-1, -2))  # Conv1D's memory
    assert same(turned, weight)


@pytest.mark.parametrize("name", cases("four_bits"))
def test_4_bit_weights_are_read_and_written_back(name):
    case = vectors("four_bits")[name]
    stored, shape = case["stored"], tuple(case["source"].shape)
    layout = layout_of(stored, shape, "linear" if len(shape) == 2 else "experts")
    assert layout.specs() == {key: (str(tensor.dtype)[6:], tuple(tensor.shape)) for key, tensor in stored.items()}
    assert not layout.shrinking()
    weight = layout.decode(stored)
    assert not weight.extras
    assert weight.structure() == layout.scheme().structure()
    assert_same(layout.encode(weight), stored)
    assert torch.equal(weight.to_dense(torch.float32), case["dense"])
    assert torch.equal(weight.to_dense(), case["dense"].to(case["source"].dtype))


def test_the_longest_json_is_announced():
    layout = Bnb4BitLayout((9, 128), "bfloat16", nested_blocksize=256)
    assert layout.shrinking() == {STATE}
    announced = layout.specs()
    for scale in (1.0, 1e-3, 7.3e-21, 2e-38, 0.0):
        stored = layout.encode(quantized(layout, torch.randn(9, 128) * scale))
        assert stored[STATE].numel() <= announced[STATE][1][0]
        assert {key: tuple(tensor.shape) for key, tensor in stored.items() if key != STATE} == {
            key: shape for key, (_, shape) in announced.items() if key != STATE
        }


def test_every_level_boundary_falls_as_in_a_search():
    """The step table must agree with a binary search around each middle, float by float."""
    for name in ("nf4", "fp4_bnb"):
        table = levels.table(name)
        nearest = _loops._Nearest(*absmax._middles(name, "cpu"))
        order = torch.argsort(table, stable=True)
        near = nearest.middles.view(torch.int32)[:, None] + torch.arange(-50, 51, dtype=torch.int32)
        numbers = torch.cat(
            [near.view(torch.float32).reshape(-1), torch.linspace(-1, 1, 100_001), table, torch.tensor([-0.0])]
        )
        numbers = numbers[numbers.isfinite()].clamp(-1, 1)
        assert torch.equal(nearest.codes(numbers), order[torch.bucketize(numbers, nearest.middles)].to(torch.uint8))


def test_the_dynamic_map():
    table = absmax.dynamic_map()
    assert torch.equal(table, vectors("four_bits")["experts0"]["stored"]["nested_quant_map"])


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 200), st.sampled_from(["nf4", "fp4"]), st.sampled_from([32, 64, 128]),
    st.sampled_from([None, 256]), st.sampled_from(["float16", "bfloat16", "float32"]), st.integers(0, 1 << 30),
)  # fmt: skip
def test_any_shape_keeps_its_numbers(rows, columns, kind, size, nested, dtype, seed):
    layout = Bnb4BitLayout((rows, columns), dtype, kind, size, nested)
    dense = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(getattr(torch, dtype))
    weight = quantized(layout, dense)
    stored = layout.encode(weight)
    found = layout_of(stored, (rows, columns))
    again = found.decode(stored)
    assert same(again, weight)
    assert_same(found.encode(again), stored)
    # no number is further away than half of the widest gap between levels, nested scales rounded once more
    largest = float(dense.float().abs().max())
    assert (again.to_dense(torch.float32) - dense.float()).abs().max() <= 0.26 * largest


def test_blocks_of_weights_that_are_not_finite_are_refused():
    for bad in (float("nan"), float("inf"), -float("inf")):
        dense = torch.randn(8, 100)
        dense[7, 99] = bad
        for layout in (Bnb4BitLayout((8, 100)), LlmInt8Layout((8, 100))):
            with pytest.raises(NotRepresentable, match=r"1 of .* hold NaN or infinity"):
                quantized(layout, dense)
    with pytest.raises(NotRepresentable, match=r"rounded to torch\.float16"):
        quantized(LlmInt8Layout((2, 4)), torch.full((2, 4), 1e5))


def test_absmax_names_the_trees_it_cannot_fill():
    grid = nodes.Grid(nodes.Codes.of(torch.zeros(2, 4, dtype=torch.uint8), 4), nodes.Values(torch.ones(2, 1)))
    with pytest.raises(NotRepresentable, match="not a Grid"):
        absmax.quantize(torch.ones(2, 4), Weight(grid))
    wide = nodes.Grid(grid.codes, grid.scale, levels="e2m1", block=(1, 4))
    with pytest.raises(NotRepresentable, match="'e2m1' go further"):
        absmax.quantize(torch.ones(2, 4), Weight(wide))
    with pytest.raises(TypeError):
        absmax.quantize(torch.ones(2, 4), Weight(grid), blocksize=32)


# --- 4 bit: files in the wild ----------------------------------------------------------------------------------------------


def stored_4bit(shape=(6, 128), nested=True, **options):
    layout = Bnb4BitLayout(shape, "bfloat16", nested_blocksize=256 if nested else None, **options)
    dense = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return layout.encode(quantized(layout, dense))


def as_json(**changes):
    """A nested state with changes; None removes a key."""
    state = json.loads(QuantState("nf4", 64, "bfloat16", (6, 128), 256, 0.5).to_bytes())
    return json.dumps({key: value for key, value in {**state, **changes}.items() if value is not None}).encode()


def with_state(stored, text):
    return {**stored, STATE: torch.tensor(list(text), dtype=torch.uint8)}


@pytest.mark.parametrize(
    "text",
    [
        b'{"dtype":"bfloat16","shape":[6,128],"quant_type":"nf4","blocksize":64,"nested_blocksize":256,'
        b'"nested_dtype":"float32","nested_offset":0.25}',
        as_json(nested_offset=0.1) + b"\n  ",
        as_json(nested_offset=0.1),  # no float32
        as_json(nested_offset=1),
    ],
)
def test_json_of_other_writers_is_kept_byte_for_byte(text):
    stored = with_state(stored_4bit(), text)
    layout = layout_of(stored, (6, 128))
    weight = layout.decode(stored)
    assert layout.specs()[STATE] == ("uint8", (len(text),))
    assert layout.scheme().extras.keys() == weight.extras.keys() == {STATE}
    assert_same(layout.encode(weight), stored)
    # another offset cannot keep the text
    other = quantized(layout, torch.randn(6, 128))
    again = layout.encode(Weight(other.tree, other.dtype, extras=weight.extras))
    assert raw(again[STATE]) != text
    assert same(Weight(layout.decode(again).tree), Weight(other.tree))


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (b"", CorruptFile, "is not JSON"),
        (as_json()[:-1], CorruptFile, "is not JSON"),
        (b"\xff\xfe", CorruptFile, "is not JSON"),
        (b"[" * 16000, CorruptFile, "is not JSON"),
        (b"[]", CorruptFile, "not an object"),
        (as_json(blocksize=None), CorruptFile, "not an object with .*blocksize"),
        (as_json(block_size=64), CorruptFile, "not an object with"),
        (as_json(nested_offset=None), CorruptFile, "not an object with .*nested_offset"),
        (as_json(blocksize=0), CorruptFile, "blocksize = 0"),
        (as_json(blocksize=True), CorruptFile, "blocksize = True"),
        (as_json(blocksize="64"), CorruptFile, "blocksize = '64'"),
        (as_json(quant_type="fp4"), CorruptFile, "quant_type = 'fp4'"),
        (as_json(dtype="int8"), CorruptFile, "dtype = 'int8'"),
        (as_json(shape=[768]), CorruptFile, r"shape = \[768\]"),
        (as_json(shape=[6, -128]), CorruptFile, "shape"),
        (as_json(shape=[6, 10**30]), CorruptFile, "shape"),
        (as_json(nested_offset=1e300), CorruptFile, "nested_offset = 1e"),
        (as_json(nested_offset=float("nan")), CorruptFile, "nested_offset = nan"),
        (as_json(nested_offset=10**400), CorruptFile, "nested_offset"),
        (as_json(nested_dtype="float16"), CorruptFile, "nested_dtype"),
        (as_json(shape=[128, 7]), ShapeMismatch, r"weight \(128, 7\), m is \(6, 128\)"),
        (b" " * 20000, ShapeMismatch, "short JSON text"),
    ],
)
def test_json_that_cannot_be_is_refused(text, error, message):
    stored = with_state(stored_4bit(), text)
    with pytest.raises(error, match=message) as caught:
        layout_of(stored, (6, 128))
    assert STATE in str(caught.value)


def test_a_text_that_is_not_the_layouts_own_is_refused():
    stored = stored_4bit()
    layout = layout_of(stored, (6, 128))
    with pytest.raises(ShapeMismatch, match=STATE):
        layout.decode(with_state(stored, as_json(blocksize=32)))
    with pytest.raises(MissingTensor, match=STATE):
        layout.decode({key: tensor for key, tensor in stored.items() if key != STATE})
    with pytest.raises(ShapeMismatch, match=STATE):
        layout.decode({**stored, STATE: stored[STATE].to(torch.int32)})


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("weight.absmax", lambda tensor: tensor[:-1], ShapeMismatch),
        ("weight.nested_absmax", lambda tensor: tensor * float("inf"), CorruptFile),
        ("weight.nested_quant_map", lambda tensor: tensor * float("nan"), CorruptFile),
        ("weight.nested_quant_map", lambda tensor: tensor[:-1], ShapeMismatch),
        ("weight.quant_map", lambda tensor: tensor.flip(0), CorruptFile),
        ("weight.quant_map", lambda tensor: -tensor.abs(), CorruptFile),
        ("weight", lambda tensor: tensor.T, ShapeMismatch),
        ("weight", lambda tensor: tensor.view(torch.int8), ShapeMismatch),
    ],
)
def test_tensors_that_cannot_be_are_named(name, change, error):
    stored = stored_4bit()
    layout = layout_of(stored, (6, 128))
    with pytest.raises(error, match=f"'{name}'"):
        layout.decode({**stored, name: change(stored[name])})
    with pytest.raises(MissingTensor, match=f"'{name}'"):
        layout.decode({key: tensor for key, tensor in stored.items() if key != name})


def test_scales_that_are_not_finite_are_named():
    stored = stored_4bit(nested=False)
    stored["weight.absmax"][3] = float("inf")
    with pytest.raises(CorruptFile, match=r"'weight.absmax' holds inf at 3"):
        layout_of(stored, (6, 128)).decode(stored)


def test_weights_that_were_quantized_turned_are_read():
    """Old GPT-2 files hold [in, out]; the shape in the JSON tells."""
    dense = torch.randn(96, 64)
    plain = Bnb4BitLayout((96, 64), "float32")
    stored = plain.encode(quantized(plain, dense))
    layout = layout_of(stored, (64, 96))
    assert layout.turned
    weight = layout.decode(stored)
    assert torch.equal(weight.to_dense(), plain.decode(stored).to_dense().T)
    assert_same(layout.encode(weight), stored)
    assert same(quantized(layout, dense.T), weight)


def test_a_stack_whose_groups_cross_experts_keeps_its_scales():
    case = vectors("four_bits")["experts0"]
    layout = layout_of(case["stored"], (3, 8, 64), "experts")
    weight = layout.decode(case["stored"])
    assert torch.equal(weight.select(1).to_dense(torch.float32), case["dense"][1])
    scale = weight.tree.scale.child
    assert scale.block == (1, 8)  # 8 blocks an expert in groups of 256
    changed = scale.scale.tensor.clone()
    changed[1] += 1
    other = nodes.map_tensors(weight.tree, lambda tensor: changed if tensor is scale.scale.tensor else tensor)
    with pytest.raises(NotRepresentable, match="two experts share"):
        layout.encode(Weight(other, weight.dtype))


def test_a_dense_weight_is_not_taken_for_codes():
    assert layout_of({"weight": torch.zeros(4, 4, dtype=torch.bfloat16)}, (4, 4)) is None
    assert layout_of({"": torch.zeros(2, 4, 4)}, (2, 4, 4), "experts") is None
    assert layout_of({"weight": torch.zeros(4, 4)}, (4, 4), load_in_8bit=True) is None


def test_a_missing_or_misnamed_json_is_named():
    stored = stored_4bit()
    text = stored.pop(STATE)
    with pytest.raises(MissingTensor, match=f"'m.{STATE}'.* stored 0 times"):
        layout_of(stored, (6, 128), bnb_4bit_quant_type="nf4")
    with pytest.raises(MissingTensor, match="bitsandbytes__nf4_misnamed"):
        layout_of({**stored, f"{STATE}_misnamed": text}, (6, 128))
    both = {**stored, STATE: text, STATE.replace("nf4", "fp4"): text}
    with pytest.raises(MissingTensor, match="stored 2 times"):
        layout_of(both, (6, 128))


def test_the_width_of_the_configuration_is_checked():
    eight = {"weight": torch.zeros(4, 8, dtype=torch.int8), "SCB": torch.ones(4)}
    with pytest.raises(ShapeMismatch, match=r"m: .* says load_in_4bit, but tensor 'm.SCB' in f .* 8 bits"):
        layout_of(eight, (4, 8))
    with pytest.raises(ShapeMismatch, match=r"m: .* says load_in_8bit, but tensor 'm.weight.quant_state.*4 bits"):
        layout_of(stored_4bit(), (6, 128), load_in_8bit=True)
    # quant type, storage and double quantization of the configuration do not matter: the tensors say it
    found = layout_of(
        stored_4bit(storage="bfloat16"), (6, 128), bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False
    )
    assert (found.quant_type, found.nested_blocksize, found.storage) == ("nf4", 256, "bfloat16")


def test_other_weights_are_not_written():
    layout = Bnb4BitLayout((6, 128), "bfloat16")
    for other in (
        Bnb4BitLayout((6, 128), "bfloat16", "fp4"),
        Bnb4BitLayout((6, 128), "bfloat16", nested_blocksize=256),
        Bnb4BitLayout((6, 128), "bfloat16", blocksize=32),
        Bnb4BitLayout((128, 6), "bfloat16"),
        LlmInt8Layout((6, 128), "bfloat16"),
    ):
        with pytest.raises(NotRepresentable, match="has not the form of Bnb4BitLayout"):
            layout.encode(quantized(other, torch.randn(other.shape)))


# --- which modules ---------------------------------------------------------------------------------------------------------


def test_what_is_quantized_and_why_not():
    four, eight = quantizer(), quantizer(load_in_8bit=True)
    linear = ModuleInfo("a", "linear", (64, 32), "bfloat16", has_bias=True)
    assert four.layout_for(linear) == Bnb4BitLayout((64, 32), "bfloat16", "fp4")
    assert eight.layout_for(linear) == LlmInt8Layout((64, 32), "bfloat16", 6.0)
    conv = ModuleInfo("b", "conv1d", (64, 32), "float64", class_name="Conv1D")
    assert four.layout_for(conv) == Bnb4BitLayout((64, 32), "float32", "fp4")
    stack = ModuleInfo("c.experts", "experts", (4, 64, 32), "float16", class_name="Experts")
    assert four.layout_for(stack).own == ""
    for chosen, module, reason in (
        (four, ModuleInfo("d", "embedding", (64, 32), "float16", class_name="Embedding"), "not Embedding"),
        (four, ModuleInfo("e", "linear", (64, 32), "float16", class_name="LoraLinear"), "not LoraLinear"),
        (four, ModuleInfo("f", "experts", (4, 5, 30), "float16", class_name="Experts"), "from one expert"),
        (eight, stack, "no form for a stack"),
        (quantizer(load_in_8bit=True, llm_int8_has_fp16_weight=True), linear, "16 bit"),
    ):
        assert chosen.layout_for(module) is None
        assert reason in chosen.skip_reasons[module.name]


def test_skipped_modules():
    chosen = quantizer(llm_int8_skip_modules=["k_proj", "blocks.0"])
    names = ("x.k_proj", "blocks.0.q", "blocks.01.q", "lm_head", "blocks.0.experts.3.w1")
    kept = [name for name in names if chosen.layout_for(ModuleInfo(name, "linear", (4, 64), "float16")) is not None]
    assert kept == ["blocks.01.q", "lm_head"]  # a list replaces the default ones
    chosen.skip_reasons["x"] = "by hand"
    assert chosen.layout_for(ModuleInfo("x", "linear", (4, 64), "float16")) is None
    assert chosen.skip_reasons["x"] == "by hand"


def test_bytes_that_make_no_whole_number_of_the_storage_dtype():
    with pytest.raises(InvalidOption, match=r"m: 21 weights of 4 bits are no whole number of float32"):
        quantizer(bnb_4bit_quant_storage="float32").layout_for(ModuleInfo("m", "linear", (3, 7), "float16"))


# --- LLM.int8 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", cases("eight_bits"))
def test_int8_weights_have_its_bytes(name):
    case = vectors("eight_bits")[name]
    source, stored = case["source"], case["stored"]
    made = quantizer(load_in_8bit=True).new_layout(
        ModuleInfo("m", "linear", tuple(source.shape), str(source.dtype)[6:])
    )
    assert_same(made.encode(quantized(made, source)), stored)
    layout = layout_of(stored, tuple(source.shape), load_in_8bit=True)
    weight = layout.decode(stored)
    assert_same(layout.encode(weight), stored)
    assert layout.specs() == {key: (str(tensor.dtype)[6:], tuple(tensor.shape)) for key, tensor in stored.items()}
    assert torch.equal(weight.to_dense(torch.float32), case["dense"])


# two roundings to the input's dtype: the sum of the outliers and what it is added to
ROUNDING = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 1e-6}


@pytest.mark.parametrize("name", cases("eight_bits"))
def test_int8_products_are_its(name):
    case = vectors("eight_bits")[name]
    for tokens, threshold in case["products"]:
        x, wanted = case[f"x{tokens}"], case[f"y{tokens}_{threshold}"]
        layout = LlmInt8Layout(tuple(case["source"].shape), "float16", threshold)
        before = x.clone()
        ours = multiply(layout.decode(case["stored"]), x, case["bias"])
        assert torch.equal(x, before)
        assert ours.dtype == wanted.dtype
        if threshold == 0:  # integers and single roundings: the same everywhere
            assert torch.equal(ours, wanted), tokens
        else:  # the order in which a machine adds outliers shows in the last bit
            limit = ROUNDING[x.dtype] * wanted.float().abs().max()
            assert (ours.float() - wanted.float()).abs().max() <= limit, (tokens, threshold)


def int8_weight(rows=5, columns=40, threshold=6.0, seed=0):
    layout = LlmInt8Layout((rows, columns), "float32", threshold)
    return quantized(layout, torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)))


def test_outliers_are_multiplied_unquantized():
    weight, x = int8_weight(), torch.randn(3, 40, generator=torch.Generator().manual_seed(4))
    x[1, 7] = 400.0
    exact = x @ weight.to_dense(torch.float32).T
    assert (multiply(weight, x, None) - exact).abs().max() < 0.1
    without = Weight(weight.tree, weight.dtype, int8_weight(threshold=0.0).activation)
    assert (multiply(without, x, None) - exact).abs().max() > 0.5  # one scale for 400 and for the rest of the row
    assert torch.equal(multiply(weight, torch.zeros(2, 40), None), torch.zeros(2, 5))
    assert multiply(weight, torch.zeros(0, 40), None).shape == (0, 5)


def test_rows_beyond_float16_do_not_look_like_numbers():
    x = torch.ones(2, 40)
    x[0, 3] = 1e6
    found = multiply(int8_weight(threshold=0.0), x, None)
    assert found[0].isnan().all()
    assert found[1].isfinite().all()
    assert multiply(int8_weight(), x, None).isfinite().all()  # an outlier, and not quantized


def test_products_of_wide_rows_are_exact():
    codes, x = torch.full((2, 5000), -127, dtype=torch.int8), torch.full((1, 5000), 1.0)
    layout = LlmInt8Layout((2, 5000), "float32", 0.0)
    stored = {"weight": codes, "SCB": torch.full((2,), 127.0), "weight_format": torch.tensor(0, dtype=torch.uint8)}
    sums = -127 * 127 * 5000  # more than float32 counts in one go
    wanted = torch.tensor(sums, dtype=torch.int32) * torch.tensor(127.0) * 6.200124e-05
    assert torch.equal(multiply(layout.decode(stored), x, None), wanted.expand(1, 2))


def test_slices_and_joined_rows_multiply_like_the_whole():
    first, second = int8_weight(seed=1), int8_weight(rows=3, seed=2)
    x = torch.randn(4, 40, generator=torch.Generator().manual_seed(3)) * 4
    bias = torch.linspace(-1, 1, 8)
    wanted = torch.cat([multiply(first, x, bias[:5]), multiply(second, x, bias[5:])], 1)
    both = join_rows([first, second])
    assert torch.allclose(multiply(both, x, bias), wanted, rtol=1e-5, atol=1e-5)
    assert all(same(a, b) for a, b in zip(split_rows(both, [5, 3]), (first, second), strict=True))
    assert torch.allclose(
        multiply(slice_rows(first, 1, 3), x, None), multiply(first, x, None)[:, 1:3], rtol=1e-5, atol=1e-5
    )
    assert multiply(slice_columns(first, 8, 20), x[:, 8:20], None).shape == (4, 5)


def test_another_tree_is_not_multiplied():
    weight = Weight(nodes.Values(torch.ones(2, 3)), activation=int8_weight().activation)
    with pytest.raises(NoKernel, match=r"not a Values; dequantize"):
        multiply(weight, torch.ones(1, 3), None)


def test_int8_tensors_that_cannot_be_are_named():
    weight = int8_weight()
    layout = LlmInt8Layout((5, 40), "float32")
    stored = layout.encode(weight)
    for name, tensor, error in (
        ("SCB", stored["SCB"] * float("nan"), CorruptFile),
        ("SCB", stored["SCB"][:-1], ShapeMismatch),
        ("weight", stored["weight"].T, ShapeMismatch),
        ("weight", stored["weight"].view(torch.uint8), ShapeMismatch),
        ("weight_format", torch.tensor(2, dtype=torch.uint8), CorruptFile),
        ("weight_format", torch.tensor([0], dtype=torch.uint8), ShapeMismatch),
    ):
        with pytest.raises(error, match=f"'{name}'"):
            layout.decode({**stored, name: tensor})
    other = nodes.Scaled(weight.tree.child, nodes.Values(torch.full((1, 1), 0.5)))
    with pytest.raises(NotRepresentable, match=r"by 1/127, not by 0\.5"):
        layout.encode(Weight(other, "float32", weight.activation))


def test_old_files_without_a_format():
    stored = LlmInt8Layout((5, 40), "float32").encode(int8_weight())
    del stored["weight_format"]
    layout = layout_of(stored, (5, 40), load_in_8bit=True)
    assert_same(layout.encode(layout.decode(stored)), stored)
