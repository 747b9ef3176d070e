"""HQQ beyond its goldens: hqq's own layers as referees, both kinds of files, quantized scales, refusals, creation."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import anybit
from anybit import HqqConfig, algorithms
from anybit.errors import (
    AnybitError,
    CorruptFile,
    InvalidOption,
    MissingTensor,
    NotRepresentable,
    ShapeMismatch,
    UnexpectedTensor,
    UnsafeFile,
)
from anybit.methods._hqq_layout import HqqLayout, as_tensor
from anybit.methods.hqq import layer_settings, tag_of
from anybit.modules import PackedWeight
from anybit.quantizers import AutoHfQuantizer, AutoQuantizationConfig
from anybit.testing import random_weight
from anybit.weight import ModuleInfo
from anybit.weight.weight import same

GOLDEN = Path(__file__).parent / "golden"
VECTORS = GOLDEN / "packer_vectors" / "hqq.safetensors"
NAME = "model.layers.0.mlp.up_proj"


def read_vectors() -> tuple[dict[str, dict[str, Any]], dict[str, torch.Tensor]]:
    with safe_open(VECTORS, "pt") as file:
        return json.loads(file.metadata()["cases"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


CASES, TENSORS = read_vectors()
WEIGHT = TENSORS["weight"]


def stored_of(case: str) -> dict[str, torch.Tensor]:
    found = {name.removeprefix(f"{case}."): tensor for name, tensor in TENSORS.items() if name.startswith(f"{case}.")}
    found.pop("dense")
    return found


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def read(stored: dict[str, torch.Tensor], shape: tuple[int, int] = (24, 48)) -> Any:
    """The layout the quantizer finds, as the plan would ask it."""
    infos = {
        name: SimpleNamespace(
            name=f"{NAME}.{name}", file="model.safetensors", dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tuple(tensor.shape), nbytes=tensor.numel() * tensor.element_size(),
        )
        for name, tensor in stored.items()
    }  # fmt: skip
    quantizer: Any = AutoHfQuantizer.from_config({"quant_method": "hqq", "quant_config": {}, "skip_modules": []})
    return quantizer.layout_of(ModuleInfo(NAME, "linear", shape, "float32"), infos, lambda name: stored[name])


@pytest.mark.parametrize("case", sorted(CASES))
def test_layers_of_the_vendor(case: str) -> None:
    stored = stored_of(case)
    layout = read(stored)
    weight = layout.decode(stored)
    assert weight.dtype == CASES[case]["dtype"]
    assert torch.equal(weight.to_dense(), TENSORS[f"{case}.dense"])
    again = layout.encode(weight)
    assert set(again) == set(stored) == set(layout.specs())
    for name, tensor in stored.items():
        assert (again[name].dtype, again[name].shape, raw(again[name])) == (tensor.dtype, tensor.shape, raw(tensor)), (
            name
        )


@pytest.mark.parametrize("case", sorted(CASES))
def test_the_solver_gives_the_vendors_bytes(case: str) -> None:
    dtype = CASES[case]["dtype"]
    config = HqqConfig(quant_config=CASES[case]["quant_config"], skip_modules=[])
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    layout = quantizer.layout_for(ModuleInfo(NAME, "linear", (24, 48), dtype))
    assert isinstance(layout, HqqLayout)
    dense = WEIGHT.to(getattr(torch, dtype))
    before = dense.clone()
    made = layout.encode(algorithms.get("hqq")(dense, layout.scheme(), **layout.algorithm_options()))
    wanted = stored_of(case)
    assert set(made) == set(wanted)
    for name, tensor in wanted.items():
        assert (made[name].dtype, raw(made[name])) == (tensor.dtype, raw(tensor)), name
    assert torch.equal(dense, before)


def test_a_large_weight_is_solved_in_parts_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    from anybit.algorithms import hqq

    dense = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    for axis in (0, 1):
        config = HqqConfig(nbits=3, group_size=32, axis=axis)
        quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
        layout: Any = quantizer.layout_for(ModuleInfo(NAME, "linear", (64, 96), "float32"))
        whole = hqq.quantize(dense, layout.scheme(), **layout.algorithm_options())
        with monkeypatch.context() as patched:
            patched.setattr(
                hqq, "row_chunks", lambda rows, columns: [(0, 64), (64, rows)] if rows > 64 else [(0, rows)]
            )
            parts = hqq.quantize(dense, layout.scheme(), **layout.algorithm_options())
        assert same(whole, parts)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(bad: float) -> None:
    dense = WEIGHT.clone()
    dense[5, 5] = bad
    layout: Any = AutoHfQuantizer.from_config(HqqConfig(group_size=16), pre_quantized=False).layout_for(
        ModuleInfo(NAME, "linear", (24, 48), "float32")
    )
    with pytest.raises(NotRepresentable, match="not finite"):
        algorithms.get("hqq")(dense, layout.scheme(), **layout.algorithm_options())


# --- quantized scales and zero points ------------------------------------------------------------------------------------


def quantized_parameters(together: bool, axis: int = 0) -> HqqLayout:
    own = {
        "nbits": 4, "group_size": 64, "axis": axis, "packing": "4bit_u8", "view_as_float": False,
        "unpack_view_dtype": "torch.uint8", "quant_scale": True, "quant_zero": True, "compute_dtype": "torch.float16",
        "encoded_state_dict": True,
    }  # fmt: skip
    inner = {"nbits": 8, "axis": 0, "packing": "8bit_u8", "compute_dtype": "torch.float16"}
    scale = {**inner, "group_size": 128}
    zero = dict(scale) if together else dict(inner)
    settings = {
        **own, **{f"meta_scale.{key}": value for key, value in scale.items()},
        **{f"meta_zero.{key}": value for key, value in zero.items()}, "offload_meta": together,
    }  # fmt: skip
    return HqqLayout((128, 128), "float16", tuple(settings.items()), "uint8", ("float16", "float16"), together)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("together", [False, True])
def test_quantized_scales_and_zero_points(together: bool, axis: int) -> None:
    layout = quantized_parameters(together, axis)
    stored = layout.encode(random_weight(layout.scheme()))
    assert read(stored, (128, 128)) == replace(layout, settings=read(stored, (128, 128)).settings)
    count = 128 * 128 // 64
    if together:
        assert stored["zero_scale"].shape == (2, 128, count // 128)
        zero_codes, scale_codes = stored["zero_scale"]
    else:
        zero_codes, scale_codes = stored["zero_q"], stored["scale_q"]
    numbers = {}
    for name, codes in (("zero", zero_codes), ("scale", scale_codes)):
        inner = [stored[f"meta_{name}.{own}"] for own in ("zero", "scale")]
        numbers[name] = ((codes.half() - inner[0]) * inner[1]).reshape((1, count) if axis == 0 else (count, 1))
    words = stored["W_q"]
    codes = torch.cat([words >> 4, words & 15]).half()
    dense = ((codes - numbers["zero"]) * numbers["scale"]).reshape(128, 128)
    weight = layout.decode(stored)
    assert torch.equal(weight.to_dense(), dense)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in layout.encode(weight).items())


# --- files ---------------------------------------------------------------------------------------------------------------


def logits(model: Any, golden: Path) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(load_file(golden / "reference.safetensors")["input_ids"]).logits
    return found


@pytest.mark.parametrize("variant", ["pt-4bit-g64-axis0-bf16", "pt-old-4bit-quantmeta", "pt-mixed-tags"])
def test_a_pickle_is_saved_as_safetensors_that_load_without_any_configuration(variant: str, tmp_path: Path) -> None:
    golden = GOLDEN / "hqq" / variant
    with pytest.raises(UnsafeFile, match="allow_pickle"):
        anybit.load(golden)
    model: Any = anybit.load(golden, allow_pickle=True)
    model.save_pretrained(tmp_path / "saved")
    assert sorted(file.suffix for file in (tmp_path / "saved").iterdir() if "model" in file.name) == [".safetensors"]
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert isinstance(AutoQuantizationConfig.from_pretrained(tmp_path / "saved"), HqqConfig)
    again: Any = anybit.load(tmp_path / "saved")
    assert again.anybit_plan.method == "hqq"
    assert any(isinstance(module, PackedWeight) for module in again.modules())
    assert torch.equal(logits(model, golden), logits(again, golden))
    again.save_pretrained(tmp_path / "twice")
    assert (tmp_path / "twice" / "model.safetensors").read_bytes() == (
        tmp_path / "saved" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("variant", ["tf-2bit-g32-axis0-f16", "tf-3bit-g64-axis1-f32"])
def test_what_transformers_loads_with_random_linears(variant: str) -> None:
    """transformers 5.23 calls every W_q unexpected and leaves each linear as its class initialised it."""
    golden = GOLDEN / "hqq" / variant
    reference = load_file(golden / "reference.safetensors")
    model: Any = anybit.load(golden)
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)} - {"lm_head"}
    dense = {name.removeprefix("dense."): tensor for name, tensor in reference.items() if name.startswith("dense.")}
    assert all(isinstance(model.get_submodule(name), PackedWeight) for name in linears)
    for name, wanted in dense.items():
        layer = model.get_submodule(name)
        assert (layer.dequantize(torch.float32) - wanted).abs().max() <= 2e-3 * wanted.abs().max()
    tolerance = json.loads((golden / "fixture.json").read_text())["logits_atol"]
    assert (logits(model, golden) - reference["logits"]).abs().max() <= tolerance


def test_a_pickle_is_never_taken_for_dense(tmp_path: Path) -> None:
    golden = GOLDEN / "hqq" / "pt-mixed-tags"
    shutil.copy(golden / "config.json", tmp_path)
    shutil.copy(golden / "qmodel.pt", tmp_path / "pytorch_model.bin")  # under another name it says the same
    with pytest.raises(AnybitError):
        anybit.load(tmp_path)


def test_a_passed_configuration_does_not_replace_what_layers_say() -> None:
    golden = GOLDEN / "hqq" / "tf-2bit-g32-axis0-f16"
    with pytest.warns(UserWarning, match="already quantized"):
        model: Any = anybit.load(golden, HqqConfig(nbits=8))
    assert torch.equal(logits(model, golden), logits(anybit.load(golden), golden))


@pytest.mark.parametrize("axis", [0, 1])
def test_a_group_size_of_none_in_a_pickle_means_a_whole_row_or_column(axis: int, tmp_path: Path) -> None:
    """hqq 0.1 wrote None where 0.2 writes the number."""
    golden = GOLDEN / "hqq" / "pt-mixed-tags"
    state = torch.load(golden / "qmodel.pt", weights_only=True)
    own = state["model.layers.0.self_attn.q_proj"]
    codes = torch.arange(128 * 128, dtype=torch.int64).view(128, 128) % 16
    own.update(axis=axis, group_size=None, W_q=((codes[:64] << 4) | codes[64:]).to(torch.uint8))
    shape = (128, 1) if axis == 1 else (1, 128)
    own.update(
        scale=torch.linspace(0.01, 0.02, 128).half().view(shape), zero=torch.linspace(7, 8, 128).half().view(shape)
    )
    torch.save(state, tmp_path / "qmodel.pt")
    shutil.copy(golden / "config.json", tmp_path)
    model: Any = anybit.load(tmp_path, allow_pickle=True)
    ours = model.model.layers[0].self_attn.q_proj.dequantize()
    assert torch.equal(ours, (codes.half() - own["zero"]) * own["scale"])
    model.save_pretrained(tmp_path / "saved")
    assert load_file(tmp_path / "saved" / "model.safetensors")["model.layers.0.self_attn.q_proj.group_size"] == 128


def test_settings_that_the_first_files_leave_out(tmp_path: Path) -> None:
    stored = stored_of("4-1")
    for name in ("channel_wise", "optimize", "round_zero", "stores_quant_config", "view_as_float", "unpack_view_dtype"):
        del stored[name]
    layout = read(stored)
    assert torch.equal(layout.decode(stored).to_dense(), TENSORS["4-1.dense"])
    assert set(layout.encode(layout.decode(stored))) == set(stored)


# --- refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tensor", "error", "says"),
    [
        ("compute_dtype", as_tensor("__import__('os').getcwd()"), CorruptFile, "compute_dtype.*holds .__import__"),
        ("compute_dtype", as_tensor("torch.int8"), CorruptFile, "must be 'torch.float16', 'torch.bfloat16' or"),
        ("packing", as_tensor("4bit_u9"), CorruptFile, "packing.*'4bit_u9'; it must be"),
        ("packing", as_tensor("2bit_u8"), CorruptFile, "nbits.*holds 4; it must be 2 or 1.58"),
        ("packing", as_tensor("x" * 1000), ShapeMismatch, "a short text as bytes"),
        ("packing", torch.tensor([200, 201], dtype=torch.uint8), CorruptFile, "which is no name"),
        ("axis", as_tensor(2), CorruptFile, "axis.*holds 2; it must be 0 or 1"),
        ("nbits", as_tensor(float("nan")), ShapeMismatch, "a finite number"),
        ("group_size", as_tensor(0), CorruptFile, "group_size.*a positive number"),
        ("group_size", as_tensor(-8), CorruptFile, "group_size.*a positive number"),
        ("group_size", as_tensor(50), ShapeMismatch, "groups of 50, which do not divide"),
        ("group_size", as_tensor(1 << 30), ShapeMismatch, "do not divide"),
        ("group_size", torch.tensor(16), ShapeMismatch, "int64.*expected int32"),
        ("shape", as_tensor((48, 24)), ShapeMismatch, r"says \(48, 24\), but"),
        ("view_as_float", as_tensor(True), ShapeMismatch, "W_q.*is uint8, but view_as_float"),
        ("view_as_float", torch.tensor(2, dtype=torch.uint8), CorruptFile, "it is a flag"),
        ("unpack_view_dtype", as_tensor("torch.int32"), CorruptFile, "unpack_view_dtype"),
        ("quant_zero", as_tensor(True), MissingTensor, "meta_zero.scale"),
        ("W_q", torch.zeros(36, 16, dtype=torch.int16), ShapeMismatch, "W_q.*is int16"),
        ("scale", torch.zeros(72, 1, dtype=torch.int8), ShapeMismatch, "scale.*is int8"),
    ],
    ids=lambda value: str(value)[:24] if not isinstance(value, torch.Tensor) else "",
)
def test_settings_that_cannot_be(name: str, tensor: torch.Tensor, error: type[AnybitError], says: str) -> None:
    stored = {**stored_of("4-1"), name: tensor}
    with pytest.raises(error, match=says):
        read(stored)


def test_settings_that_contradict_the_shapes() -> None:
    stored = {**stored_of("4-1"), "axis": as_tensor(0)}
    layout = read(stored)
    with pytest.raises(ShapeMismatch, match=r"'W_q' is uint8 \(36, 16\), expected uint8 \(8, 72\)"):
        layout.decode(stored)


@pytest.mark.parametrize(
    "name", ["scale", "W_q", "nbits", "axis", "packing", "quant_scale", "encoded_state_dict", "optimize"]
)
def test_a_missing_tensor_is_named(name: str) -> None:
    stored = stored_of("4-1")
    del stored[name]
    with pytest.raises(MissingTensor, match=rf"{NAME}\.{name}'"):
        read(stored)


def test_bits_that_no_code_uses_are_noticed() -> None:
    stored = stored_of("3-1")
    damaged = stored["W_q"].clone()
    damaged[0, 0] |= 1 << 30
    with pytest.raises(CorruptFile, match="'W_q' has bits set above the 30"):
        read(stored).decode({**stored, "W_q": damaged})
    damaged = stored["W_q"].clone()
    damaged[-1, 0] |= 7  # the tenth block of rows fills up the words
    with pytest.raises(CorruptFile, match="only fill up its words"):
        read(stored).decode({**stored, "W_q": damaged})
    stored = stored_of("5-1")
    with pytest.raises(CorruptFile, match="'W_q' holds the code 32, its layer has 5 bits"):
        read(stored).decode({**stored, "W_q": torch.full_like(stored["W_q"], 32)})


def test_a_setting_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    golden = GOLDEN / "hqq" / "pt-mixed-tags"
    state = torch.load(golden / "qmodel.pt", weights_only=True)
    state["model.layers.0.self_attn.q_proj"]["rotation"] = 3
    torch.save(state, tmp_path / "qmodel.pt")
    shutil.copy(golden / "config.json", tmp_path)
    with pytest.raises(UnexpectedTensor, match=r"q_proj\.rotation"):
        anybit.load(tmp_path, allow_pickle=True)


# --- creation ------------------------------------------------------------------------------------------------------------


def dense(tmp_path: Path) -> Path:
    if not (tmp_path / "dense").exists():
        anybit.dequantize(GOLDEN / "hqq" / "tf-3bit-g64-axis1-f32", tmp_path / "dense")
    return tmp_path / "dense"


def test_tags_give_each_kind_of_layer_its_own_settings(tmp_path: Path) -> None:
    config = HqqConfig(
        dynamic_config={
            "self_attn.q_proj": {"nbits": 8, "group_size": 32},
            "mlp.down_proj": {"nbits": 2, "group_size": 16, "axis": 0},
        }
    )
    plan = anybit.quantize(dense(tmp_path), tmp_path / "made", config)
    bits = {entry.slot.module: entry.bits_per_weight for entry in plan.entries if entry.action == "quantize"}
    assert sorted(bits) == ["model.layers.0.mlp.down_proj", "model.layers.0.self_attn.q_proj"]
    reasons = {entry.slot.module: entry.reason for entry in plan.entries}
    assert "no settings for 'self_attn.k_proj'" in reasons["model.layers.0.self_attn.k_proj"]
    assert "'lm_head' is among" in reasons["lm_head"]
    stored = json.loads((tmp_path / "made" / "config.json").read_text())["quantization_config"]
    assert set(stored["quant_config"]) == {"self_attn.q_proj", "mlp.down_proj"}
    model: Any = anybit.load(tmp_path / "made")
    assert model.model.layers[0].mlp.down_proj.parts[0].layout.grouped.bits == 2


@pytest.mark.parametrize(
    "options",
    [
        {"nbits": 1, "group_size": 64}, {"nbits": 1.58, "group_size": 64}, {"nbits": 5, "group_size": None},
        {"nbits": 4, "group_size": 64, "axis": 0, "view_as_float": True}, {"nbits": 3, "group_size": 256},
        {"quant_config": layer_settings(4, 64, quant_zero=True, quant_scale=True, offload_meta=True)},
    ],
    ids=str,
)  # fmt: skip
def test_made_checkpoints_load(options: dict[str, Any], tmp_path: Path) -> None:
    anybit.quantize(dense(tmp_path), tmp_path / "made", HqqConfig(**options), dtype="float16")
    model: Any = anybit.load(tmp_path / "made")
    assert model.dtype == torch.float16
    assert model.anybit_plan.coverage > 0.5
    assert torch.isfinite(logits(model, GOLDEN / "hqq" / "tf-3bit-g64-axis1-f32")).all()
    with safe_open(tmp_path / "made" / "model.safetensors", "pt") as file:
        found = file.keys()
        assert ("model.layers.0.mlp.up_proj.zero_scale" in found) == ("quant_config" in options)


def test_quantized_scales_are_not_made_as_hqq_does_not_any_more(tmp_path: Path) -> None:
    config = HqqConfig(quant_config=layer_settings(4, 64, quant_zero=True))
    plan = anybit.quantize(dense(tmp_path), tmp_path / "made", config)
    assert any("stay plain" in note for note in plan.notes)


def test_skipped_modules_match_anywhere_in_the_name(tmp_path: Path) -> None:
    plan = anybit.quantize(dense(tmp_path), tmp_path / "made", HqqConfig(skip_modules=["lm_head", "attn"]))
    made = {entry.slot.module for entry in plan.entries if entry.action == "quantize"}
    assert made == {f"model.layers.0.mlp.{own}_proj" for own in ("gate", "up", "down")}


@pytest.mark.parametrize(
    ("shape", "options", "says"),
    [
        ((24, 50), {"group_size": 64}, "no whole number of groups of 64"),
        ((3, 40), {"group_size": 40}, "packed 2 groups together, it has 3"),
        ((4, 40), {"group_size": 40, "nbits": 1}, "packed 8 groups together"),
        ((8, 41), {"group_size": 8, "axis": 0, "view_as_float": True}, "cannot be viewed as float32"),
    ],
)
def test_shapes_that_do_not_fit_stay_dense(shape: tuple[int, int], options: dict[str, Any], says: str) -> None:
    quantizer = AutoHfQuantizer.from_config(HqqConfig(**options), pre_quantized=False)
    assert quantizer.layout_for(ModuleInfo(NAME, "linear", shape, "float32")) is None
    assert says in quantizer.skip_reasons[NAME]


def test_settings_of_a_configuration_are_checked() -> None:
    wrong = {"weight_quant_params": {"nbits": 4, "optimize": "yes"}}
    quantizer = AutoHfQuantizer.from_config(HqqConfig(quant_config=wrong), pre_quantized=False)
    with pytest.raises(InvalidOption, match="optimize is 'yes'"):
        quantizer.layout_for(ModuleInfo(NAME, "linear", (64, 64), "float32"))


def test_tags() -> None:
    assert tag_of("model.layers.12.self_attn.q_proj") == "self_attn.q_proj"
    assert tag_of("lm_head") == "lm_head"
    assert tag_of("model.layers.0.mlp.experts.7.w1") == "mlp.experts.w1"


def test_experts_that_are_stored_one_by_one(tmp_path: Path) -> None:
    """A mixture of experts: hqq packs each expert's linears; the model stacks them."""
    import transformers

    config = transformers.Qwen3MoeConfig(
        hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, num_experts=4, num_experts_per_tok=2, vocab_size=64,
    )  # fmt: skip
    torch.manual_seed(0)
    source = transformers.Qwen3MoeForCausalLM(config).eval()
    source.save_pretrained(tmp_path / "dense")
    anybit.quantize(tmp_path / "dense", tmp_path / "made", HqqConfig(nbits=8, group_size=32))
    stored = load_file(tmp_path / "made" / "model.safetensors")
    assert stored["model.layers.0.mlp.experts.3.down_proj.W_q"].dtype == torch.uint8
    model: Any = anybit.load(tmp_path / "made")
    assert model.anybit_plan.coverage > 0.5
    ids = torch.arange(16)[None]
    with torch.no_grad():
        difference = (model(ids).logits - source(ids).logits).abs().max()
    assert difference < 0.02 * source(ids).logits.abs().max()
    save_file(stored, tmp_path / "made" / "model.safetensors", {"format": "pt"})
    packed = stored.copy()  # before transformers 5 a router was a linear layer like any other
    gate = packed.pop("model.layers.0.mlp.gate.weight")
    quantizer = AutoHfQuantizer.from_config(HqqConfig(nbits=8, group_size=32), pre_quantized=False)
    layout = quantizer.layout_for(ModuleInfo("model.layers.0.mlp.gate", "linear", (4, 64), "float32"))
    assert layout is not None
    made = algorithms.get("hqq")(gate, layout.scheme(), **layout.algorithm_options())
    packed |= {f"model.layers.0.mlp.gate.{name}": tensor for name, tensor in layout.encode(made).items()}
    save_file(packed, tmp_path / "made" / "model.safetensors", {"format": "pt"})
    model = anybit.load(tmp_path / "made")
    assert isinstance(model.model.layers[0].mlp.gate, PackedWeight)
    assert torch.equal(model.model.layers[0].mlp.gate.dequantize(), made.to_dense())
    with torch.no_grad():
        assert (model(ids).logits - source(ids).logits).abs().max() < 0.02 * source(ids).logits.abs().max()


def test_from_the_hub_pickles_are_fetched_on_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    golden, asked = GOLDEN / "hqq" / "pt-mixed-tags", []

    def fetched(name: str, allow_patterns: list[str], **options: Any) -> str:
        asked.append((name, "*.pt" in allow_patterns))
        return str(golden)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    with pytest.raises(UnsafeFile, match="allow_pickle"):
        anybit.plan("someone/some-model")
    assert anybit.plan("someone/some-model", allow_pickle=True).method == "hqq"
    assert asked == [("someone/some-model", False), ("someone/some-model", True)]
