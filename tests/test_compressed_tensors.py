"""compressed-tensors beyond the laws: codes and inputs against the vendor's, legacy formats, rotations, caches, refusals."""

import json
import re
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from anybit import CompressedTensorsConfig, algorithms
from anybit.containers.info import TensorInfo
from anybit.engine.dequantize import dequantize
from anybit.engine.load import load, plan
from anybit.engine.quantize import quantize
from anybit.errors import (
    CalibrationNeeded,
    ConfigError,
    CorruptFile,
    InvalidOption,
    MissingTensor,
    NotRepresentable,
    ShapeMismatch,
)
from anybit.methods._compressed_evidence import Stored
from anybit.methods._compressed_inputs import quantized
from anybit.methods._compressed_layouts import PackedLayout, read_words, write_words
from anybit.methods._compressed_runtime import Runtime
from anybit.methods._compressed_schemes import Arguments, Matcher
from anybit.methods._compressed_sparse import BitmaskLayout, FakeQuantizedLayout, Marlin24Layout
from anybit.methods._rotations import Rotations
from anybit.methods.compressed_tensors import completed_arguments, completed_scheme
from anybit.quantizers import AutoHfQuantizer, AutoQuantizationConfig
from anybit.quantizers.attachments import detach
from anybit.weight import ModuleInfo
from anybit.weight.weight import same

GOLDEN = Path(__file__).parent / "golden"
VECTORS = GOLDEN / "compressed_tensors_vectors"
CHECKPOINTS = GOLDEN / "compressed-tensors"


def vectors(name):
    with safe_open(VECTORS / f"{name}.safetensors", "pt") as file:
        metadata = file.metadata() or {}
    return load_file(VECTORS / f"{name}.safetensors"), {
        key: json.loads(value) for key, value in metadata.items() if key != "format"
    }


def stored_infos(module, tensors):
    return {
        name: TensorInfo(
            f"{module}.{name}",
            str(tensor.dtype).removeprefix("torch."),
            tuple(tensor.shape),
            tensor.nbytes,
            "model.safetensors",
        )
        for name, tensor in tensors.items()
    }


def layout_of(config, module, tensors):
    config = CompressedTensorsConfig(**config) if isinstance(config, dict) else config
    reader = Stored(config, Matcher(config.config_groups or {}, config.ignore or (), config.format))
    return reader.layout(module, stored_infos(module.name, tensors), tensors.__getitem__)


def linear(shape, dtype="bfloat16", name="model.layers.0.mlp.up_proj"):
    return ModuleInfo(name, "linear", shape, dtype)


def group(weights, inputs=None, targets=("Linear",), **more):
    return {"targets": list(targets), "weights": weights, "input_activations": inputs, **more}


# --- what the vendor makes -----------------------------------------------------------------------------------------------------

WEIGHTS, WEIGHT_CASES = vectors("weights")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", sorted(WEIGHT_CASES["cases"]))
def test_codes_and_scales_are_the_vendors(case, dtype):
    own = WEIGHT_CASES["cases"][case]
    wanted = {key.split("|")[2]: tensor for key, tensor in WEIGHTS.items() if key.startswith(f"{dtype}|{case}|")}
    dense = WEIGHTS[f"weight.{dtype}"]
    module = linear(tuple(dense.shape), dtype)
    groups = {"g": group(own["weights"], own["input_activations"])}
    made = Stored(
        CompressedTensorsConfig(config_groups=groups),
        Matcher(CompressedTensorsConfig(config_groups=groups).config_groups, ()),
    )
    layout, reason = made.layout_to_make(module)
    assert reason == ""
    assert made.matcher.schemes["g"].stored_as == own["format"]
    weight = algorithms.get(layout.algorithm)(dense, layout.scheme(), **layout.algorithm_options())
    ours = layout.encode(weight)
    assert sorted(ours) == sorted(wanted)
    for name, tensor in wanted.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        different = (ours[name].reshape(-1).view(torch.uint8) != tensor.reshape(-1).view(torch.uint8)).sum().item()
        assert different == 0, f"{different} bytes of {name} differ"
    read = layout_of({"config_groups": groups}, module, wanted)
    assert same(read.decode(wanted), weight)
    assert read == layout


INPUTS, INPUT_CASES = vectors("inputs")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", sorted(INPUT_CASES["cases"]))
def test_quantized_inputs_are_the_vendors(case, dtype):
    args = Arguments.of(completed_arguments("input", INPUT_CASES["cases"][case]))
    found = {key.split("|")[1]: tensor for key, tensor in INPUTS.items() if key.startswith(f"{case}|")}
    x = INPUTS[f"x.{dtype}"].flatten(0, 1)
    ours = quantized(x, args, *(found.get(f"input_{name}") for name in ("scale", "zero_point", "global_scale")))
    assert ours.dtype == x.dtype
    assert torch.equal(ours, INPUTS[f"{dtype}|{case}"].flatten(0, 1))


LEGACY, _ = vectors("legacy")


def legacy(case):
    return {key.split("|")[1]: tensor for key, tensor in LEGACY.items() if key.startswith(f"{case}|")}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("strategy", ["group", "channel"])
def test_marlin_24(bits, strategy):
    stored = legacy(f"marlin-{bits}-{strategy}")
    codes, scale = stored.pop("codes").float(), stored.pop("scale").float()
    dense = codes * scale.repeat_interleave(256 // scale.shape[1], 1)
    weights = (
        {"num_bits": bits, "group_size": 128} if strategy == "group" else {"num_bits": bits, "strategy": "channel"}
    )
    layout = layout_of(
        {"config_groups": {"g": group(weights)}, "format": "marlin-24"}, linear((64, 256), "float16"), stored
    )
    assert isinstance(layout, Marlin24Layout)
    weight = layout.decode(stored)
    assert torch.equal(weight.to_dense(torch.float32), dense)
    again = layout.encode(weight)
    assert all(torch.equal(again[name], tensor) for name, tensor in stored.items())
    assert layout.specs() == {
        name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for name, tensor in stored.items()
    }
    damaged = {**stored, "meta": torch.zeros_like(stored["meta"])}
    with pytest.raises(CorruptFile, match="'meta'"):
        layout.decode(damaged)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_unstructured_bitmasks(dtype):
    stored = legacy(f"bitmask-{dtype}")
    dense = stored.pop("dense")
    module = linear((10, 21))
    config = {"sparsity_config": {"format": "sparse-bitmask", "targets": ["Linear"]}}
    if dtype != "bfloat16":
        config["config_groups"] = {"g": group({"num_bits": 8, "type": "float", "strategy": "channel"})}
        stored["weight_scale"] = torch.linspace(0.5, 2, 10, dtype=torch.bfloat16)[:, None]
        dense = dense * stored["weight_scale"].float()
    layout = layout_of(config, module, stored)
    assert isinstance(layout, BitmaskLayout)
    weight = layout.decode(stored)
    assert torch.equal(weight.to_dense(torch.float32), dense)
    again = layout.encode(weight)
    assert sorted(again) == sorted(stored)
    for name, tensor in stored.items():
        assert torch.equal(again[name].view(torch.uint8), tensor.view(torch.uint8)), name
    with pytest.raises(CorruptFile, match="'row_offsets'"):
        layout.decode({**stored, "row_offsets": stored["row_offsets"] + 1})
    mask = stored["bitmask"].clone()
    mask[0, -1] |= 0x80
    with pytest.raises(CorruptFile, match="'bitmask'"):
        layout.decode({**stored, "bitmask": mask})


def test_a_mask_that_is_not_2_of_4_is_refused():
    layout = BitmaskLayout((2, 8), "bfloat16", element="bfloat16")
    tensors = {
        "compressed": torch.ones(2, 4, dtype=torch.bfloat16),
        "bitmask": torch.tensor([[0b00110011], [0b00000111]], dtype=torch.uint8),
        "shape": torch.tensor([[2], [8]]),
    }
    with pytest.raises(CorruptFile, match="3 of 4 bits set in row 1, columns 0 to 3"):
        layout.decode(tensors)


@pytest.mark.parametrize("bits", range(2, 9))
def test_words_before_0_18(bits):
    stored = legacy(f"words-{bits}")
    rows, columns = stored["codes"].shape
    args = Arguments(bits, "int", False, "group", (1, 10))
    layout = PackedLayout((rows, columns), "bfloat16", args, zero="words", dense_words=False)
    tensors = {
        "weight_packed": stored["weight_packed"],
        "weight_zero_point": stored["weight_zero_point"],
        "weight_shape": torch.tensor([rows, columns]),
        "weight_scale": torch.full((rows, 2), 0.5, dtype=torch.bfloat16),
    }
    weight = layout.decode(tensors)
    wanted = (stored["codes"].float() - stored["zeros"].float().repeat_interleave(10, 1)) * 0.5
    assert torch.equal(weight.to_dense(torch.float32), wanted)
    again = layout.encode(weight)
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    config = {
        "config_groups": {"g": group({"num_bits": bits, "group_size": 10, "symmetric": False})},
        "format": "pack-quantized",
    }
    found = layout_of(config, linear((rows, columns)), tensors)
    assert found.decode(tensors).to_dense(torch.float32).equal(wanted)  # told from the number of words


@pytest.mark.parametrize(("version", "dense"), [("0.17.1", False), ("0.18.0", True), ("1.0", True), (None, False)])
def test_the_version_decides_where_word_counts_agree(version, dense):
    codes = torch.tensor([[-4, 3, 1, -1, 0, 2, -2, -3, 1, 3]], dtype=torch.int8)
    weights = {"num_bits": 3, "strategy": "channel"}
    config = {"config_groups": {"g": group(weights)}, "format": "pack-quantized", "version": version}
    tensors = {
        "weight_packed": write_words(codes, 3, dense),
        "weight_shape": torch.tensor([1, 10]),
        "weight_scale": torch.ones(1, 1, dtype=torch.bfloat16),
    }
    layout = layout_of(config, linear((1, 10)), tensors)
    assert layout.dense_words is dense
    assert torch.equal(layout.decode(tensors).to_dense(torch.float32), codes.float())


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dense", [True, False])
def test_words_round_trip_and_refuse_stray_bits(bits, dense):
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    codes = torch.randint(low, high, (3, 37), generator=torch.Generator().manual_seed(bits), dtype=torch.int8)
    words = write_words(codes, bits, dense)
    assert torch.equal(read_words(words, bits, 37, dense, "w").integers().to(torch.int8), codes)
    stray = words.clone()
    stray[0, -1] |= -(1 << 31)
    if 37 * bits % 32:
        with pytest.raises(CorruptFile, match="'w'"):
            read_words(stray, bits, 37, dense, "w")


# --- rotations -----------------------------------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    """Of make.py."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(32, 32)
        self.second = torch.nn.Linear(32, 16)
        self.third = torch.nn.Linear(32, 32, bias=False)
        self.fourth = torch.nn.Linear(24, 32)


class FakeCheckpoint:
    def __init__(self, tensors):
        self._tensors = tensors
        self.tensors = {name: stored_infos("", {name: tensor})[name] for name, tensor in tensors.items()}

    def read(self, name):
        return self._tensors[name]


def rotated_model():
    tensors, metadata = vectors("rotations")
    model = Model()
    rotations = Rotations(metadata["transform_config"])
    rotations.attach(model, FakeCheckpoint(tensors), lambda name: name)
    for key in rotations.keys:
        owner, _, own = key.rpartition(".")
        model.get_submodule(owner)._buffers[own] = tensors[key]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])
    return model, rotations, tensors


def test_rotations_are_the_vendors():
    model, rotations, tensors = rotated_model()
    assert rotations.keys == {name for name in tensors if re.fullmatch(r".*_(in|out)put\.(weight|perm)", name)}
    for name, module in model.named_children():
        assert torch.allclose(module(tensors[f"x.{name}"]), tensors[f"y.{name}"], rtol=1e-5, atol=1e-5), name


def test_dense_weights_can_do_the_rotations_themselves():
    model, rotations, tensors = rotated_model()
    for name, module in model.named_children():
        weight = rotations.folds[f"{name}.weight"](module.weight.detach())
        bias = module.bias.detach() if module.bias is not None else None
        if f"{name}.bias" in rotations.folds:
            bias = rotations.folds[f"{name}.bias"](bias)
        y = torch.nn.functional.linear(tensors[f"x.{name}"], weight, bias)
        assert torch.allclose(y, tensors[f"y.{name}"], rtol=1e-4, atol=1e-4), name


def test_rotations_that_cannot_be_worked_out_are_missed():
    tensors, metadata = vectors("rotations")
    without = {name: tensor for name, tensor in tensors.items() if "heads_" not in name}
    with pytest.raises(MissingTensor, match="heads_output"):
        Rotations(metadata["transform_config"]).attach(Model(), FakeCheckpoint(without), lambda name: name)
    without = {name: tensor for name, tensor in tensors.items() if "plain_" not in name}
    Rotations(metadata["transform_config"]).attach(Model(), FakeCheckpoint(without), lambda name: name)  # Sylvester's
    key = next(name for name in tensors if "plain_" in name)
    with pytest.raises(CorruptFile, match=re.escape(key)):
        Rotations(metadata["transform_config"]).attach(
            Model(), FakeCheckpoint({**tensors, key: -tensors[key]}), lambda name: name
        )


QUIP = CHECKPOINTS / "quip-hadamard-v-w4a16"


def test_a_rotated_checkpoint_dequantizes_to_a_model_without_rotations(tmp_path):
    """The stored weight is only right behind the rotation; transformers leaves the rotation out and computes nonsense."""
    reference = load_file(QUIP / "reference.safetensors")
    dequantize(QUIP, tmp_path / "dense")
    stored = load_file(tmp_path / "dense" / "model.safetensors")
    assert not any("v_input" in name for name in stored)
    import transformers

    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    in_memory = load(QUIP).dequantize()
    for model in (dense, in_memory):
        with torch.no_grad():
            error = (model(reference["input_ids"]).logits - reference["logits"]).abs().max().item()
        assert error <= 0.002
    names = {name for name, _ in in_memory.named_modules()}
    assert not any("v_input" in name for name in names)
    layer = load(QUIP).model.layers[0].mlp.down_proj
    assert torch.equal(
        layer.dequantize(), reference["dense.model.layers.0.mlp.down_proj"]
    )  # the layer alone: as stored


def test_gradients_pass_rotations():
    model = load(QUIP)
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0), requires_grad=True)
    layer(x).sum().backward()
    effective = model.hf_quantizer.folds["model.layers.0.mlp.up_proj.weight"](layer.dequantize(torch.float32))
    assert torch.allclose(x.grad, effective.sum(0).expand(3, -1), rtol=1e-4, atol=1e-4)


# --- keys and values -----------------------------------------------------------------------------------------------------------

CACHE = CHECKPOINTS / "w4a16-kv-fp8"


def greedy(model, ids, **options):
    return model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, **options)


def test_cached_keys_are_rounded_the_same_way():
    model = load(CACHE, dtype=torch.float32)
    ids = load_file(CACHE / "reference.safetensors")["input_ids"][:1]
    with torch.no_grad():
        whole = model(ids).logits
        cache = None
        for token in range(ids.shape[1]):
            step = model(ids[:, token : token + 1], past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            assert torch.allclose(step.logits[:, 0], whole[:, token], atol=2e-3)
    keys = cache.layers[0].keys
    scale = model.model.layers[0].self_attn.k_scale.float()
    codes = keys / scale
    assert torch.equal(codes.to(torch.float8_e4m3fn).float(), codes)
    assert torch.equal(greedy(model, ids), greedy(model, ids, use_cache=False))


def edited(source, target, change, config=None):
    """A copy of a checkpoint whose tensors and quantization_config went through functions."""
    target.mkdir()
    for file in source.glob("*.json"):
        (target / file.name).write_bytes(file.read_bytes())
    stored = json.loads((source / "config.json").read_text())
    if config is not None:
        config(stored)
    (target / "config.json").write_text(json.dumps(stored))
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def renamed(tensors):
    for layer_key in [key for key in tensors if key.endswith(("self_attn.k_scale", "self_attn.v_scale"))]:
        own = layer_key[-len("k_scale")]
        tensors[layer_key.replace(f"{own}_scale", f"{own}_proj.output_scale")] = tensors.pop(layer_key)


def test_cache_scales_of_older_files_lie_at_the_projections(tmp_path):
    old = edited(CACHE, tmp_path / "old", renamed)
    ids = load_file(CACHE / "reference.safetensors")["input_ids"]
    with torch.no_grad():
        ours, wanted = load(old)(ids).logits, load(CACHE)(ids).logits
    assert torch.equal(ours, wanted)
    model = load(old)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes()
    stored, again = load_file(old / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert sorted(stored) == sorted(again)
    assert all(torch.equal(again[name].view(torch.uint8), tensor.view(torch.uint8)) for name, tensor in stored.items())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda tensors: tensors.pop("model.layers.0.self_attn.k_scale"), MissingTensor, "self_attn.k_scale"),
        (
            lambda tensors: tensors.update(
                {"model.layers.0.self_attn.v_scale": torch.full((2,), 0.1, dtype=torch.bfloat16)}
            ),
            ShapeMismatch,
            "v_scale",
        ),
        (
            lambda tensors: tensors["model.layers.0.self_attn.v_scale"].fill_(float("nan")),
            CorruptFile,
            "v_scale",
        ),
    ],
)
def test_damaged_cache_scales_are_named(tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        plan(edited(CACHE, tmp_path / "damaged", change))


def test_dequantizing_leaves_no_rounded_cache(tmp_path):
    model = load(CACHE)
    model.dequantize()
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert "model.layers.0.self_attn.k_scale" not in model.state_dict()
    dequantize(CACHE, tmp_path / "dense")
    assert not any("k_scale" in name for name in load_file(tmp_path / "dense" / "model.safetensors"))


def test_rotated_keys_are_rounded_in_the_rotated_space(tmp_path):
    """SpinQuant's R3 turns queries and keys alike: without a rounded cache nothing changes, with one only the rounding does."""

    def turn(config):
        own = config["quantization_config"]
        own["transform_config"] = {
            "config_groups": {
                "R3": {
                    "type": "hadamard", "head_dim": 32,
                    "apply": [{"targets": ["re:.*self_attn$"], "location": place} for place in ("q_attn", "k_cache")],
                }
            }
        }  # fmt: skip

    def plain(config):
        turn(config)
        config["quantization_config"]["kv_cache_scheme"] = None

    ids = load_file(CACHE / "reference.safetensors")["input_ids"]
    drop = [f"model.layers.0.self_attn.{name}_scale" for name in "kv"]
    without = edited(CACHE, tmp_path / "without", lambda tensors: [tensors.pop(name) for name in drop], plain)
    rounded = edited(CACHE, tmp_path / "rounded", lambda tensors: None, turn)
    with torch.no_grad():
        base = load(CACHE, dtype=torch.float32)(ids).logits
        unrounded, ours = (load(path, dtype=torch.float32)(ids).logits for path in (without, rounded))
    assert not torch.equal(ours, base)
    assert (ours - unrounded).abs().max() < 0.5 * unrounded.abs().max()


# --- outputs, floats on disk, activations alone ----------------------------------------------------------------------------------


def test_outputs_are_rounded(tmp_path):
    scale = torch.tensor([0.05], dtype=torch.bfloat16)

    def config(stored):
        own = stored["quantization_config"]["config_groups"]["group_0"]
        own["output_activations"] = {"num_bits": 8, "type": "int"}
        own["targets"] = ["re:.*down_proj"]
        stored["quantization_config"]["config_groups"]["group_1"] = {
            **own,
            "output_activations": None,
            "targets": ["Linear"],
        }

    source = CHECKPOINTS / "w3a16-sym-g64"
    made = edited(
        source, tmp_path / "made", lambda t: t.update({"model.layers.0.mlp.down_proj.output_scale": scale}), config
    )
    layer, plain = (load(path, dtype=torch.float32).model.layers[0].mlp.down_proj for path in (made, source))
    x = torch.randn(2, 256, generator=torch.Generator().manual_seed(0), requires_grad=True)
    wanted = torch.round(plain(x) / 0.05005).clamp(-128, 127) * scale.float()
    assert torch.allclose(layer(x), wanted, atol=1e-5)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, plain.dequantize(torch.float32).sum(0).expand(2, -1), rtol=1e-4, atol=1e-4)
    load(made).save_pretrained(tmp_path / "again")
    assert torch.equal(
        load_file(tmp_path / "again" / "model.safetensors")["model.layers.0.mlp.down_proj.output_scale"], scale
    )


@pytest.mark.parametrize(
    "weights",
    [
        {"num_bits": 4, "group_size": 32},
        {"num_bits": 4, "group_size": 32, "symmetric": False},
        {"num_bits": 8, "type": "float", "strategy": "channel"},
    ],
)
def test_weights_that_were_not_compressed_yet_are_rounded_when_used(weights):
    case = {"type=float": "fp8-channel"}.get("type=" + weights.get("type", "int"))
    dense = WEIGHTS["weight.float32"]
    args = Arguments.of(completed_arguments("weights", weights))
    groups = {"g": group(weights)}
    module = linear(tuple(dense.shape), "float32")
    config = CompressedTensorsConfig(config_groups=groups, quantization_status="frozen", ignore=["lm_head"])
    layout, _ = Stored(config, Matcher(config.config_groups, ())).layout_to_make(module)
    wanted = algorithms.get(layout.algorithm)(dense, layout.scheme(), **layout.algorithm_options())
    stored = {name: tensor for name, tensor in layout.encode(wanted).items() if name in ("weight_scale",)}
    stored["weight"] = dense
    if not args.symmetric:
        stored["weight_zero_point"] = wanted.tree.zero.integers().to(torch.int8)
    found = layout_of(config, module, stored)
    assert isinstance(found, FakeQuantizedLayout), case
    weight = found.decode(stored)
    assert torch.equal(weight.to_dense(torch.float32), wanted.to_dense(torch.float32))
    again = found.encode(weight)
    assert sorted(again) == sorted(stored)
    assert all(torch.equal(again[name], tensor) for name, tensor in stored.items())
    assert weight.structure() == found.scheme().structure()
    with pytest.raises(ShapeMismatch, match="quantization_status"):
        layout_of(replace_status(config, "compressed"), module, stored)


def replace_status(config, status):
    again = CompressedTensorsConfig.from_dict(config.to_dict())
    again.quantization_status = status
    return again


def test_layers_of_which_only_the_input_is_quantized():
    config = {"config_groups": {"g": group(None, {"num_bits": 8, "strategy": "token", "dynamic": True})}}
    dense = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    layout = layout_of(config, linear((8, 16)), {"weight": dense})
    weight = layout.decode({"weight": dense})
    assert weight.activation.dtype == "int8"
    assert torch.equal(weight.to_dense(), dense)
    assert torch.equal(layout.encode(weight)["weight"], dense)
    assert layout_of({**config, "ignore": ["re:.*mlp"]}, linear((8, 16)), {"weight": dense}) is None


def test_embeddings(tmp_path):
    """transformers 5.23 cannot load these at all."""
    source = CHECKPOINTS / "w3a16-sym-g64"
    dequantize(source, tmp_path / "dense")
    weights = {"num_bits": 8, "strategy": "channel"}
    config = CompressedTensorsConfig(config_groups={"g": group(weights, targets=["Linear", "Embedding"])}, ignore=[])
    made = quantize(tmp_path / "dense", tmp_path / "made", config)
    assert {entry.action for entry in made.entries} == {"quantize"}
    model, dense = load(tmp_path / "made"), load(tmp_path / "dense")
    ids = torch.tensor([[1, 5, 127]])
    ours, wanted = model.model.embed_tokens(ids).float(), dense.model.embed_tokens(ids).float()
    assert (ours - wanted).abs().max() < 0.02 * wanted.abs().max()
    assert "Quant" in type(model.model.embed_tokens).__name__


# --- schemes by module ---------------------------------------------------------------------------------------------------------


def matcher(groups, ignore=()):
    completed = {name: {"targets": targets, "weights": None} for name, targets in groups.items()}
    return Matcher(completed, ignore)


def test_targets_exact_names_first_then_expressions_then_classes():
    found = matcher(
        {
            "class": ["Linear"],
            "late": ["re:.*mlp.*"],
            "early": ["re:.*down"],
            "exact": ["model.layers.0.mlp.down_proj"],
        },
        ["lm_head", "re:.*layers.1", "Embedding"],
    )
    classes = ("Linear", "Module")
    assert found.scheme("model.layers.0.mlp.down_proj", classes).name == "exact"
    assert (
        found.scheme("model.layers.2.mlp.down_proj", classes).name == "early"
    )  # sorts before, whatever the order of groups
    assert found.scheme("model.layers.2.mlp.up_proj", classes).name == "late"
    assert found.scheme("model.layers.2.self_attn.q_proj", classes).name == "class"
    assert found.scheme("model.norm", ("LlamaRMSNorm",)) is None
    assert found.ignored("lm_head", classes) == "lm_head"
    assert found.ignored("model.layers.1.mlp.up_proj", classes) == "re:.*layers.1"
    assert found.ignored("model.layers.11.mlp", classes) == "re:.*layers.1"  # no anchor at the end
    assert found.ignored("x.lm_head", classes) is None
    assert found.ignored("model.embed_tokens", ("Embedding",)) == "Embedding"


def test_a_regular_expression_starts_at_the_start_of_the_name():
    found = matcher({"g": ["re:layers.0", "re:(a)(b)\\2"]})
    assert found.scheme("model.layers.0") is None
    assert found.scheme("layers.00") is not None
    assert found.scheme("abb") is not None
    assert found.scheme("aba") is None


def test_a_packed_module_without_a_target_is_refused():
    config = {
        "config_groups": {
            "a": group({"num_bits": 4, "group_size": 32}, targets=["re:.*attn"]),
            "b": group({"num_bits": 8, "group_size": 32}, targets=["re:.*moe"]),
        }
    }
    tensors = {"weight_packed": torch.zeros(4, 4, dtype=torch.int32)}
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.mlp\.up_proj.*re:\.\*attn, re:\.\*moe"):
        layout_of(config, linear((4, 32)), tensors)


@pytest.mark.parametrize(
    ("weights", "tensors", "error", "message"),
    [
        ({"num_bits": 4, "group_size": 32}, {"weight_scale": torch.ones(4, 1)}, MissingTensor, "weight_packed"),
        (
            {"num_bits": 4, "group_size": 32},
            {"weight": torch.zeros(4, 32, dtype=torch.float8_e4m3fn)},
            ShapeMismatch,
            "4-bit int",
        ),
        (
            {"num_bits": 8, "type": "float"},
            {"weight": torch.zeros(4, 32, dtype=torch.int8)},
            ShapeMismatch,
            "8-bit float",
        ),
        (
            {"num_bits": 4, "group_size": 32, "actorder": "group"},
            {"weight_packed": torch.zeros(4, 4, dtype=torch.int32)},
            MissingTensor,
            "weight_g_idx",
        ),
        (
            {"num_bits": 4, "type": "float", "group_size": 16, "strategy": "tensor_group"},
            {"weight_packed": torch.zeros(4, 16, dtype=torch.uint8), "weight_scale": torch.ones(4, 2)},
            ShapeMismatch,
            "weight_scale",
        ),
    ],
)
def test_tensors_that_contradict_the_scheme(weights, tensors, error, message):
    with pytest.raises(error, match=message):
        layout_of({"config_groups": {"g": group(weights)}}, linear((4, 32)), tensors)


def test_codes_beyond_their_width():
    layout = layout_of(
        {
            "config_groups": {
                "g": group(
                    {"num_bits": 4, "strategy": "channel"}, {"num_bits": 8, "strategy": "token", "dynamic": True}
                )
            }
        },
        linear((2, 4)),
        {"weight": torch.zeros(2, 4, dtype=torch.int8), "weight_scale": torch.ones(2, 1, dtype=torch.bfloat16)},
    )
    stored = {"weight": torch.full((2, 4), 7, dtype=torch.int8), "weight_scale": torch.ones(2, 1, dtype=torch.bfloat16)}
    assert layout.decode(stored).bytes_in_memory == 4 + 4  # one int8 per 4-bit code on disk, two to a byte in memory
    with pytest.raises(CorruptFile, match="8, which the 4 bits"):
        layout.decode({**stored, "weight": torch.full((2, 4), 8, dtype=torch.int8)})


def test_the_time_of_matching_is_linear_in_the_modules():
    import time

    config = CompressedTensorsConfig(
        config_groups={
            "attn": group({"num_bits": 8, "type": "float", "strategy": "channel"}, targets=[r"re:.*self_attn\.(q|k|v|o)_proj$"]),
            "mlp": group({"num_bits": 4, "group_size": 128}, targets=[f"re:.*layers.{layer}.mlp.experts.*" for layer in range(64)]),
        },
        ignore=["lm_head", *(f"model.layers.{layer}.mlp.gate" for layer in range(64)), "re:.*vision.*", "re:.*router$"],
    )  # fmt: skip
    reader = Stored(config, Matcher(config.config_groups, config.ignore))
    forms = {
        "weight_packed": ("int32", (64, 16)),
        "weight_scale": ("bfloat16", (64, 1)),
        "weight_shape": ("int64", (2,)),
    }
    modules = [
        f"model.layers.{layer}.mlp.experts.{expert}.{own}_proj"
        for layer in range(64) for expert in range(105) for own in ("gate", "up", "down")
    ]  # fmt: skip
    assert len(modules) > 20_000
    infos = [
        {name: TensorInfo(f"{module}.{name}", *form, 0, "f") for name, form in forms.items()} for module in modules
    ]

    def seconds(first: int, last: int) -> float:
        begin = time.process_time()
        for module, info in zip(modules[first:last], infos[first:last], strict=True):
            found.add(reader.layout(linear((64, 128), name=module), info, None))
        return time.process_time() - begin

    found = set()
    few, many = seconds(0, 2_000), seconds(2_000, 20_000)  # nine times as many
    assert many < 20 * few + 0.2, (few, many)
    assert len(found) == 1


# --- configurations ------------------------------------------------------------------------------------------------------------


def test_the_older_key_of_the_configuration(tmp_path):
    """transformers ignores `compression_config`, and loads such a checkpoint as if it were dense."""

    def older(stored):
        own = stored.pop("quantization_config")
        del own["quant_method"]
        stored["compression_config"] = own

    source = CHECKPOINTS / "legacy-sparse24-fp8"
    old = edited(source, tmp_path / "old", lambda tensors: None, older)
    assert type(AutoQuantizationConfig.from_pretrained(old)).__name__ == "CompressedTensorsConfig"
    ids = load_file(source / "reference.safetensors")["input_ids"]
    with torch.no_grad():
        assert torch.equal(load(old)(ids).logits, load(source)(ids).logits)
    load(old).save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == json.loads((old / "config.json").read_text())


def test_groups_are_written_as_the_file_has_them():
    stored = {
        "quant_method": "compressed-tensors",
        "config_groups": {"W4A16": ["Linear"], "g": {"targets": ["re:x"], "weights": {"num_bits": 8, "type": "FLOAT"}}},
        "kv_cache_scheme": {"type": "float"},
        "format": "mixed-precision",
    }
    config = AutoQuantizationConfig.from_dict(stored)
    assert {name: config.to_dict()[name] for name in stored} == stored
    assert config.config_groups["W4A16"]["weights"]["group_size"] == 128
    config.config_groups["g"]["weights"]["num_bits"] = 4
    assert config.to_dict()["config_groups"]["g"]["weights"]["num_bits"] == 4
    assert config.to_dict()["config_groups"]["W4A16"] == ["Linear"]


def test_what_is_not_made_says_so():
    groups = {"W4A16": ["Linear"]}
    mixed = {
        name: group({"num_bits": 4, "group_size": 32, "actorder": order}, targets=[name])
        for name, order in (("a", "weight"), ("b", None))
    }
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    for more, message in (
        ({"kv_cache_scheme": "FP8"}, "kv_cache_scheme is 'FP8'"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, "rotate='r1"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "since 0.15"),
        ({"config_groups": mixed}, "differ in weights.actorder"),
        ({"kv_cache_scheme": {"type": "float", "observer": "mse"}}, "observer is 'mse'"),
    ):
        config = CompressedTensorsConfig(**{"config_groups": groups, **more})
        with pytest.raises((InvalidOption, NotRepresentable), match=message):
            AutoHfQuantizer.from_config(config, pre_quantized=False).measurements(model)


STATIC = ("ct-fp8", "ct-nvfp4")


@pytest.mark.parametrize("scheme", STATIC)
def test_static_scales_need_data(scheme, tmp_path):
    dequantize(CHECKPOINTS / "w3a16-sym-g64", tmp_path / "dense")
    config = CompressedTensorsConfig(**CompressedTensorsConfig.schemes[scheme])
    with pytest.raises(CalibrationNeeded, match=r"input of model\.layers\.0.*--calib"):
        plan(tmp_path / "dense", config)


@pytest.mark.parametrize("scheme", sorted(set(CompressedTensorsConfig.schemes) - set(STATIC)))
def test_every_scheme_makes_a_checkpoint_that_says_what_it_is(scheme, tmp_path):
    if not (DENSE := Path(tmp_path.parent / "dense-for-schemes")).is_dir():
        dequantize(CHECKPOINTS / "w3a16-sym-g64", DENSE)
    config = CompressedTensorsConfig(**CompressedTensorsConfig.schemes[scheme])
    made = quantize(DENSE, tmp_path / "made", config)
    assert {entry.action for entry in made.entries if entry.slot.kind == "linear"} == {"quantize", "dense"}
    stored = json.loads((tmp_path / "made" / "config.json").read_text())["quantization_config"]
    assert (stored["quantization_status"], stored["version"]) == ("compressed", "0.20.0")
    found = plan(tmp_path / "made")
    assert {entry.slot.module for entry in found.entries if entry.action == "packed"} == {
        entry.slot.module for entry in made.entries if entry.action == "quantize"
    }
    formats = {group["format"] for group in stored["config_groups"].values()}
    assert formats == {stored["format"]}


ATTENTION, ATTENTION_CASES = vectors("attention")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("case", sorted(ATTENTION_CASES["cases"]))
def test_queries_keys_and_values_are_the_vendors(case, implementation, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    own = ATTENTION_CASES["cases"][case]
    groups = {name: completed_scheme(name, given) for name, given in own.get("config_groups", {}).items()}
    cache = own.get("kv_cache_scheme")
    cache = Arguments.of(completed_arguments("cache", cache)) if cache is not None else None
    tensors = {name: tensor for name, tensor in ATTENTION.items() if "|" not in name and name != "ids"}
    scales = {
        name.split("|")[1]: tensor
        for name, tensor in ATTENTION.items()
        if name.startswith(f"{case}|") and "scale" in name
    }
    model = LlamaForCausalLM(LlamaConfig(**{**ATTENTION_CASES["config"], "attn_implementation": implementation})).eval()
    model.load_state_dict(tensors)
    runtime = Runtime(Matcher(groups, ()), cache, own.get("transform_config"))
    runtime.attach(model, FakeCheckpoint({**tensors, **scales}), lambda name: name)
    assert runtime.keys == set(scales)
    for key, tensor in scales.items():
        owner, _, name = key.rpartition(".")
        model.get_submodule(owner)._buffers[name] = tensor
    with torch.no_grad():
        logits = model(ATTENTION["ids"]).logits
        assert (logits - ATTENTION[f"{case}|logits"]).abs().max() < 1e-4
        cached, cut = None, []
        for token in range(ATTENTION["ids"].shape[1]):
            step = model(ATTENTION["ids"][:, token : token + 1], past_key_values=cached, use_cache=True)
            cached = step.past_key_values
            cut.append(step.logits)
    if "dynamic" not in case:  # whose scales depend on what comes together
        assert (torch.cat(cut, 1) - logits).abs().max() < 1e-4
    assert type(model.model.layers[0].self_attn.config) is LlamaConfig
    detach(model, runtime.keys)
    with torch.no_grad():
        assert (model(ATTENTION["ids"]).logits - ATTENTION["plain|logits"]).abs().max() < 1e-4


def test_a_cache_is_rounded_whoever_passes_it():
    from anybit.methods._kv_cache import RoundedCache, cache_argument

    class SomeAttention(torch.nn.Module):
        def forward(self, x, past_key_values=None):
            return past_key_values.update(x, x, 0) if past_key_values is not None else (x, x)

    seen = types.SimpleNamespace(update=lambda k, v, layer: (k, v), length=7)
    hook = RoundedCache(lambda module, k: k.round(), lambda module, v: v + 1)
    module = SomeAttention()
    module.register_forward_pre_hook(hook, with_kwargs=True)
    x = torch.tensor([0.4, 1.6], requires_grad=True)
    for arguments in ((x,), (x, seen)):
        keys, values = module(*arguments)
        assert keys.tolist() == [0.0, 2.0]
        assert torch.allclose(values, x + 1)
    keys, _ = module(x, past_key_values=seen)
    keys.sum().backward()
    assert x.grad.tolist() == [1.0, 1.0]
    assert cache_argument(SomeAttention) == ("past_key_values", 1)
    _, keywords = hook(module, (x,), {"past_key_values": seen})
    assert keywords["past_key_values"].length == 7
    assert replace(Arguments(), bits=4).bits == 4


# --- experts -------------------------------------------------------------------------------------------------------------------

MOE = CHECKPOINTS / "w4a16-g32-qwen3moe"


def mixtral(folder):
    """A small dense Mixtral, under the names of its published checkpoints."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=32,
        num_local_experts=2, num_experts_per_tok=1, dtype=torch.bfloat16,
    )  # fmt: skip
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("renamed", [False, True])
def test_mixtral_under_its_names_and_under_llmcompressors(renamed, tmp_path):
    """llmcompressor 0.14 on transformers 5 writes experts.N.gate_proj where Mixtral has w1, which transformers cannot load."""
    config = CompressedTensorsConfig(config_groups={"g": group({"num_bits": 8, "group_size": 32})}, ignore=["lm_head"])
    quantize(mixtral(tmp_path / "dense"), tmp_path / "made", config)

    def rename(tensors):
        for name in list(tensors):
            for old, new in ((".w1.", ".gate_proj."), (".w3.", ".up_proj."), (".w2.", ".down_proj.")):
                if renamed and old in name:
                    tensors[name.replace(old, new)] = tensors.pop(name)

    source = edited(tmp_path / "made", tmp_path / "renamed", rename)
    ids = torch.tensor([[1, 7, 3, 9]])
    with torch.no_grad():
        ours, wanted = load(source)(ids).logits.float(), load(tmp_path / "dense")(ids).logits.float()
    assert (ours - wanted).abs().max() < 0.05 * wanted.abs().max()
    load(source).save_pretrained(tmp_path / "again")
    stored, again = (load_file(path / "model.safetensors") for path in (source, tmp_path / "again"))
    assert sorted(stored) == sorted(again)


@pytest.mark.parametrize("scheme", ["ct-fp8-dynamic", "ct-w8a8"])
def test_experts_keep_the_quantization_of_their_inputs(scheme, tmp_path):
    """transformers 5.23 decompresses experts into fused parameters and forgets that their inputs are quantized."""
    dequantize(MOE, tmp_path / "dense")
    options = {**CompressedTensorsConfig.schemes[scheme], "ignore": ["lm_head", "re:.*mlp.gate$"]}
    quantize(tmp_path / "dense", tmp_path / "made", CompressedTensorsConfig(**options))
    experts = load(tmp_path / "made", dtype=torch.float32).model.layers[0].mlp.experts
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    activation = experts.down_proj.quantized_weight.activation
    assert activation.granularity == "token"
    args = Arguments.of(
        completed_arguments(
            "x",
            CompressedTensorsConfig(**options).config_groups[next(iter(options["config_groups"]))]["input_activations"],
        )
    )
    ours = experts.down_proj.grouped(x, torch.tensor([0, 1, 3, 3]))
    dense = experts.down_proj.dequantize(torch.float32)
    rounded = quantized(x, args)
    wanted = torch.cat([rounded[:1] @ dense[1].T, rounded[1:] @ dense[2].T])
    assert torch.allclose(ours, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours[:1], x[:1] @ dense[1].T, rtol=1e-4, atol=1e-5)


def test_static_scales_of_experts(tmp_path):
    dequantize(MOE, tmp_path / "dense")
    config = CompressedTensorsConfig(
        config_groups={"g": group({"num_bits": 8, "type": "float", "strategy": "channel"})},
        ignore=["lm_head", "re:.*mlp.gate$"],
    )
    quantize(tmp_path / "dense", tmp_path / "made", config)

    def scales(tensors):
        for number, name in enumerate(sorted(name for name in tensors if name.endswith("weight_scale"))):
            # gate and up see the same input, so their scales are the same
            value = 0.01 * (1 + number) if "experts" in name and "down" in name else 0.02
            tensors[name.replace("weight_scale", "input_scale")] = torch.tensor([value], dtype=torch.bfloat16)

    def static(stored):
        stored["quantization_config"]["config_groups"]["g"]["input_activations"] = {"num_bits": 8, "type": "float"}

    source = edited(tmp_path / "made", tmp_path / "static", scales, static)
    experts = load(source, dtype=torch.float32).model.layers[0].mlp.experts
    found = [experts.down_proj.quantized_weight.select(expert).activation["input_scale"].item() for expert in range(4)]
    assert len(set(found)) == 4
    load(source).save_pretrained(tmp_path / "again")
    stored, again = (load_file(path / "model.safetensors") for path in (source, tmp_path / "again"))
    assert all(torch.equal(again[name].view(torch.uint8), tensor.view(torch.uint8)) for name, tensor in stored.items())


def test_what_the_tensors_decide_is_in_the_plan(tmp_path):
    def config(stored):
        own = stored["quantization_config"]
        own["ignore"] = ["re:.*q_proj"]
        own["config_groups"]["group_0"]["targets"] = ["re:.*self_attn.*", "lm_head"]

    found = plan(edited(CHECKPOINTS / "w3a16-sym-g64", tmp_path / "made", lambda tensors: None, config))
    notes = "\n".join(found.notes)
    assert "'ignore' names it, but it is stored packed" in notes
    assert "model.layers.0.self_attn.q_proj" in notes
    assert "a target names it, but it is stored dense, and stays dense (lm_head)" in notes
    assert "no target names it, but it is stored packed, and is read as all groups say (model.layers.0.mlp" in notes
    assert plan(CHECKPOINTS / "w3a16-sym-g64").notes == []
