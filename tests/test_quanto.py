"""quanto beyond its goldens: its own layers as referees, maps that are lost or wrong, layer norms, creation."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import anybit
from anybit import QuantoConfig, algorithms
from anybit.errors import (
    AnybitError,
    CalibrationNeeded,
    CheckpointError,
    CorruptFile,
    InvalidOption,
    MissingTensor,
    NotRepresentable,
    ShapeMismatch,
)
from anybit.kernels.reference import multiply
from anybit.methods._quanto_layout import QuantoBitsLayout, group_size
from anybit.modules import PackedWeight
from anybit.quantizers import AutoHfQuantizer, AutoQuantizationConfig
from anybit.testing import random_weight
from anybit.weight import ModuleInfo
from anybit.weight.weight import same

GOLDEN = Path(__file__).parent / "golden"
VECTORS = GOLDEN / "packer_vectors" / "quanto.safetensors"
NAME = "model.layers.0.mlp.up_proj"


def read_vectors() -> tuple[dict[str, dict[str, Any]], dict[str, torch.Tensor]]:
    with safe_open(VECTORS, "pt") as file:
        return json.loads(file.metadata()["cases"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


CASES, TENSORS = read_vectors()
PLAIN = sorted(case for case in CASES if CASES[case]["activations"] == "none")
ROUNDED = sorted(set(CASES) - set(PLAIN))


def stored_of(case: str) -> dict[str, torch.Tensor]:
    found = {name.removeprefix(f"{case}."): tensor for name, tensor in TENSORS.items() if name.startswith(f"{case}.")}
    return {name: tensor for name, tensor in found.items() if name not in ("source", "dense", "y")}


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def read(
    stored: dict[str, torch.Tensor], shape: tuple[int, ...], entry: dict[str, str] | None = None, **options: Any
) -> Any:
    """The layout the quantizer finds, as the plan would ask it."""
    infos = {
        name: SimpleNamespace(
            name=f"{NAME}.{name}", file="model.safetensors", dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tuple(tensor.shape),
        )
        for name, tensor in stored.items()
    }  # fmt: skip
    qmap = {NAME: entry} if entry is not None else None
    quantizer: Any = AutoHfQuantizer.from_config({"quant_method": "quanto", "qmap": qmap, **options})
    return quantizer.layout_of(ModuleInfo(NAME, "linear", shape, "float32"), infos, lambda name: stored[name])


def layout_of(case: str) -> Any:
    own = CASES[case]
    entry = {"weights": own["weights"], "activations": own["activations"]}
    return read(stored_of(case), tuple(own["shape"]), entry)


@pytest.mark.parametrize("case", sorted(CASES))
def test_layers_of_the_vendor(case: str) -> None:
    stored, layout = stored_of(case), layout_of(case)
    weight = layout.decode(stored)
    again = layout.encode(weight)
    assert set(again) == set(stored) == set(layout.specs())
    for name, tensor in stored.items():
        assert (again[name].dtype, again[name].shape, raw(again[name])) == (tensor.dtype, tensor.shape, raw(tensor)), (
            name
        )
    if case in PLAIN:
        assert torch.equal(weight.to_dense(), TENSORS[f"{case}.dense"])


@pytest.mark.parametrize("case", ROUNDED)
def test_inputs_and_outputs_are_rounded_as_the_vendor_rounds_them(case: str) -> None:
    weight, y = layout_of(case).decode(stored_of(case)), TENSORS[f"{case}.y"]
    x = TENSORS["x"][:, : weight.shape[1]].to(y.dtype)
    ours = multiply(weight, x, None)
    if "qint8-qint8" in case:
        assert torch.equal(ours, y)
    else:  # sums of floats: one that lies half way between two outputs may go to the other
        steps = ((ours - y) / weight.activation["output_scale"]).abs()
        assert (steps > 0.001).sum() <= 1
        assert steps.max() < 1.001


@pytest.mark.parametrize("case", [case for case in PLAIN if "e5m2" not in case and "fnuz" not in case])
def test_optimizers_give_the_vendors_bytes(case: str) -> None:
    own, source = CASES[case], TENSORS[f"{case}.source"]
    weights = {"qint2": "int2", "qint4": "int4", "qint8": "int8", "qfloat8_e4m3fn": "float8"}[own["weights"]]
    config = QuantoConfig(weights=weights, optimizer=own["optimizer"])
    dtype = str(source.dtype).removeprefix("torch.")
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    layout: Any = quantizer.layout_for(ModuleInfo(NAME, "linear", tuple(own["shape"]), dtype))
    before = source.clone()
    made = layout.encode(algorithms.get("quanto")(source, layout.scheme(), **layout.algorithm_options()))
    assert torch.equal(source, before)
    assert set(made) == set(stored_of(case))
    for name, tensor in stored_of(case).items():
        assert (made[name].dtype, raw(made[name])) == (tensor.dtype, raw(tensor)), name


@pytest.mark.parametrize("case", [case for case in PLAIN if "-one-row" not in case])
def test_without_a_map_the_tensors_tell(case: str) -> None:
    own = CASES[case]
    layout = read(stored_of(case), tuple(own["shape"]))
    assert torch.equal(layout.decode(stored_of(case)).to_dense(), TENSORS[f"{case}.dense"])


def test_group_sizes() -> None:
    sizes = {64: None, 128: None, 256: 128, 160: 32, 192: 96, 320: 64, 224: 32, 130: None, 4096: 128, 11008: 128}
    assert {columns: group_size(columns) for columns in sizes} == sizes


@pytest.mark.parametrize("bits", [2, 4])
def test_whole_zero_points(bits: int) -> None:
    """`zeropoint=True`: the shift is an integer that is subtracted from the code."""
    layout = QuantoBitsLayout((6, 160), "bfloat16", "bfloat16", None, "bfloat16", bits, "uint8")
    stored = layout.encode(random_weight(layout.scheme()))
    stored["weight._shift"] = torch.randint(0, 1 << bits, (30, 1), dtype=torch.uint8)
    entry = {"weights": f"qint{bits}", "activations": "none"}
    assert read(stored, (6, 160), entry) == layout
    per, step = 8 // bits, stored["weight._data._data"].shape[0]
    codes = torch.cat([(stored["weight._data._data"] >> (bits * block)) & ((1 << bits) - 1) for block in range(per)])[
        :30
    ]
    assert step == -(-30 // per)
    dense = stored["weight._scale"] * (codes.to(torch.int8) - stored["weight._shift"].to(torch.int8))
    assert torch.equal(layout.decode(stored).to_dense(), dense.view(6, 160))
    stored["weight._shift"][3] = 1 << bits
    with pytest.raises(CorruptFile, match=f"zero point {1 << bits}, beyond the {(1 << bits) - 1}"):
        layout.decode(stored)


# --- whole checkpoints ---------------------------------------------------------------------------------------------------


def logits(model: Any, golden: Path) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(load_file(golden / "reference.safetensors")["input_ids"]).logits
    return found


@pytest.mark.parametrize("variant", ["float8-f32", "int2-g32-awkward-f16", "int4-g128-bf16", "int8-act-int8-f32"])
def test_what_transformers_loads_with_random_weights(variant: str) -> None:
    """transformers 5.23 finds no quantization_config, reports every packed tensor as unexpected, and goes on."""
    golden = GOLDEN / "quanto" / variant
    reference = load_file(golden / "reference.safetensors")
    name = "model.layers.0.self_attn.k_proj"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(golden)
    wrong = theirs.get_submodule(name).weight.float()
    ours: Any = anybit.load(golden)
    right = ours.get_submodule(name).dequantize(torch.float32)
    dense = reference[f"dense.{name}"]
    assert (wrong - dense).abs().max() > 0.5 * dense.abs().max()
    assert (right - dense).abs().max() <= 0.01 * dense.abs().max()
    assert (theirs(reference["input_ids"]).logits.float() - reference["logits"]).abs().max() > 0.2
    found = logits(ours, golden).float()
    if not variant.endswith("bf16"):
        assert (found - reference["logits"]).abs().max() < 0.02
        return
    # two ways through bfloat16 differ by their roundings; float32 with the vendor's weights says which is closer
    theirs = theirs.float()
    with torch.no_grad():
        for key, weight in reference.items():
            if key.startswith("dense."):
                theirs.get_submodule(key[len("dense.") :]).weight.copy_(weight)
        exact = theirs(reference["input_ids"]).logits
    assert (found - exact).norm() < 1.05 * (reference["logits"].float() - exact).norm()


def without_map(variant: str, tmp_path: Path) -> Path:
    shutil.copytree(GOLDEN / "quanto" / variant, tmp_path / "lost")
    (tmp_path / "lost" / "quanto_qmap.json").unlink()
    return tmp_path / "lost"


@pytest.mark.parametrize("variant", ["float8-f32", "int2-g32-awkward-f16", "int4-g128-bf16"])
def test_a_folder_that_lost_its_map_loads(variant: str, tmp_path: Path) -> None:
    folder = without_map(variant, tmp_path)
    assert isinstance(AutoQuantizationConfig.from_pretrained(folder), QuantoConfig)
    model: Any = anybit.load(folder)
    assert model.anybit_plan.method == "quanto"
    assert torch.equal(
        logits(model, GOLDEN / "quanto" / variant),
        logits(anybit.load(GOLDEN / "quanto" / variant), GOLDEN / "quanto" / variant),
    )


def test_a_lost_map_of_quantized_inputs_is_not_guessed(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match="input_scale' shows that inputs are quantized, and nothing says to which"
    ):
        anybit.load(without_map("int8-act-int8-f32", tmp_path))


@pytest.mark.parametrize(
    ("entry", "error", "says"),
    [
        ({"weights": "qint4", "activations": "none"}, ShapeMismatch, "is int8 .*but quanto_qmap.json says 'qint4'"),
        ({"weights": "qfloat8_e5m2", "activations": "none"}, ShapeMismatch, "says 'qfloat8_e5m2'"),
        ({"weights": "qint8", "activations": "qint4"}, InvalidOption, "activations of .* are 'qint4'"),
    ],
)
def test_a_wrong_map_is_contradicted(entry: dict[str, str], error: type[AnybitError], says: str) -> None:
    with pytest.raises(error, match=says):
        read(stored_of("qint8-float32"), (6, 40), entry)


def test_packed_rows_that_fit_no_width() -> None:
    stored = stored_of("qint4-float32-160-max")
    stored["weight._data._data"] = stored["weight._data._data"][:-1].contiguous()
    with pytest.raises(ShapeMismatch, match="neither 2 nor 4 bits have"):
        read(stored, (5, 160))
    with pytest.raises(ShapeMismatch, match=r"says 'qint8'"):
        read(stored, (5, 160), {"weights": "qint8", "activations": "none"})


def test_other_damage() -> None:
    stored, layout = stored_of("qint4-float32-160-max"), layout_of("qint4-float32-160-max")
    damaged = stored["weight._data._data"].clone()
    damaged[-1] |= 0xF0  # 25 rows in 13 bytes: the last high nibble is padding
    with pytest.raises(CorruptFile, match="rows that only fill it up"):
        layout.decode({**stored, "weight._data._data": damaged})
    stored, layout = stored_of("qint8-qint8-float32"), layout_of("qint8-qint8-float32")
    with pytest.raises(CorruptFile, match=r"'input_scale' holds 0\.0"):
        layout.decode({**stored, "input_scale": torch.zeros(())})
    del stored["output_scale"]
    with pytest.raises(MissingTensor, match="'output_scale' is not stored"):
        layout.decode(stored)


def test_rows_of_zeros_that_quanto_made_nan() -> None:
    stored, layout = stored_of("qfloat8_e4m3fn-float32"), layout_of("qfloat8_e4m3fn-float32")
    codes, scale = stored["weight._data"].clone(), stored["weight._scale"].clone()
    codes.view(torch.uint8)[2] = 0x7F
    with pytest.raises(CorruptFile, match="NaN or infinity in row 2, a damaged file"):
        layout.decode({**stored, "weight._data": codes})
    scale[2] = 0
    with pytest.raises(CorruptFile, match="quanto divided a row of zeros by it"):
        layout.decode({**stored, "weight._data": codes, "weight._scale": scale})


# --- layer norms ---------------------------------------------------------------------------------------------------------


def test_layer_norms_round_their_outputs() -> None:
    model: Any = anybit.load(GOLDEN / "quanto" / "opt-act-int8")
    norm = model.model.decoder.final_layer_norm
    y = norm(torch.randn(3, 32))
    steps = y / norm.output_scale
    assert torch.equal(steps.round(), steps) or (steps - steps.round()).abs().max() < 1e-4
    assert y.unique().numel() < 97
    model.dequantize()
    assert not norm._forward_hooks
    assert not list(norm.buffers())
    assert not any(isinstance(module, PackedWeight) for module in model.modules())


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"model.decoder.embed_tokens": {"weights": "none", "activations": "qint8"}}, NotRepresentable, "Embedding"),
        ({"model.no_such": {"weights": "none", "activations": "qint8"}}, NotRepresentable, "not in the model"),
    ],
)
def test_a_map_that_names_another_module(
    change: dict[str, dict[str, str]], error: type[AnybitError], says: str, tmp_path: Path
) -> None:
    shutil.copytree(GOLDEN / "quanto" / "opt-act-int8", tmp_path / "changed")
    file = tmp_path / "changed" / "quanto_qmap.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(error, match=says):
        anybit.load(tmp_path / "changed")


def test_a_layer_norm_without_its_scale(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "quanto" / "opt-act-int8", tmp_path / "changed")
    file = tmp_path / "changed" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.decoder.final_layer_norm.output_scale"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(MissingTensor, match=r"final_layer_norm\.output_scale"):
        anybit.load(tmp_path / "changed")


# --- creation ------------------------------------------------------------------------------------------------------------


def dense(tmp_path: Path) -> Path:
    anybit.dequantize(GOLDEN / "quanto" / "int2-g32-awkward-f16", tmp_path / "dense")
    return tmp_path / "dense"


@pytest.mark.parametrize("weights", ["int8", "int4", "int2", "float8"])
def test_made_checkpoints_have_a_map_and_load(weights: str, tmp_path: Path) -> None:
    anybit.quantize(dense(tmp_path), tmp_path / "made", QuantoConfig(weights=weights))
    qmap = json.loads((tmp_path / "made" / "quanto_qmap.json").read_text())
    assert qmap["model.layers.0.mlp.up_proj"]["activations"] == "none"
    assert "lm_head" not in qmap
    assert isinstance(AutoQuantizationConfig.from_pretrained(tmp_path / "made"), QuantoConfig)
    model: Any = anybit.load(tmp_path / "made")
    assert model.anybit_plan.coverage > 0.8
    assert torch.isfinite(logits(model, GOLDEN / "quanto" / "int2-g32-awkward-f16")).all()
    loaded: Any = anybit.load(tmp_path / "dense", QuantoConfig(weights=weights))
    loaded.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "quanto_qmap.json").read_text()) == qmap


@pytest.mark.parametrize("kind", ["e5m2", "e4m3fnuz"])
def test_a_map_says_what_is_made_again(kind: str, tmp_path: Path) -> None:
    """quanto's other small floats, which have no name in a QuantoConfig."""
    source = dense(tmp_path)
    names = [name.removesuffix(".weight") for name in load_file(source / "model.safetensors") if "mlp" in name]
    qmap = {name: {"weights": f"qfloat8_{kind}", "activations": "none"} for name in names}
    anybit.quantize(source, tmp_path / "made", QuantoConfig.from_dict(qmap))
    assert json.loads((tmp_path / "made" / "quanto_qmap.json").read_text()) == qmap
    stored = load_file(tmp_path / "made" / "model.safetensors")
    assert stored[f"{NAME}.weight._data"].dtype == getattr(torch, f"float8_{kind}")
    model: Any = anybit.load(tmp_path / "made")
    packed = {name for name, module in model.named_modules() if isinstance(module, PackedWeight)}
    assert packed == set(names)
    weight = load_file(source / "model.safetensors")[f"{NAME}.weight"].float()
    error = (model.get_submodule(NAME).dequantize(torch.float32) - weight).abs()
    top = {"e5m2": 2.0**-3, "e4m3fnuz": 2.0**-4}[kind]  # half a step of the last bit of a mantissa
    assert (error <= top * 1.01 * weight.abs() + 1e-6 * weight.abs().amax(1, keepdim=True)).float().mean() > 0.95


def test_a_packed_router(tmp_path: Path) -> None:
    """Before transformers 5 a router was a linear layer like any other."""
    config = transformers.Qwen3MoeConfig(
        hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, num_experts=4, num_experts_per_tok=2, vocab_size=64,
    )  # fmt: skip
    torch.manual_seed(0)
    source = transformers.Qwen3MoeForCausalLM(config).eval()
    source.save_pretrained(tmp_path / "dense")
    anybit.quantize(tmp_path / "dense", tmp_path / "made", QuantoConfig(weights="int8"))
    file, gate = tmp_path / "made" / "model.safetensors", "model.layers.0.mlp.gate"
    stored = load_file(file)
    weight = stored.pop(f"{gate}.weight")
    scale = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scale).round().to(torch.int8)
    one = torch.ones(())
    own = {"weight._data": codes, "weight._scale": scale, "input_scale": one, "output_scale": one.clone()}
    save_file({**stored, **{f"{gate}.{name}": tensor for name, tensor in own.items()}}, file, {"format": "pt"})
    qmap = json.loads((tmp_path / "made" / "quanto_qmap.json").read_text())
    qmap[gate] = {"weights": "qint8", "activations": "none"}
    (tmp_path / "made" / "quanto_qmap.json").write_text(json.dumps(qmap))
    model: Any = anybit.load(tmp_path / "made")
    assert torch.equal(model.model.layers[0].mlp.gate.dequantize(), codes * scale)
    ids = torch.arange(16)[None]
    with torch.no_grad():
        wanted = source(ids).logits
        assert (model(ids).logits - wanted).abs().max() < 0.02 * wanted.abs().max()


def test_what_an_embedding_and_a_conv1d_are_left_as(tmp_path: Path) -> None:
    plan = anybit.quantize(dense(tmp_path), tmp_path / "made", QuantoConfig(modules_to_not_convert=[]))
    reasons = {entry.slot.module: entry.reason for entry in plan.entries}
    assert "of kind 'embedding'" in reasons["model.embed_tokens"]
    assert next(entry for entry in plan.entries if entry.slot.module == "lm_head").action == "quantize"


def test_static_scales_are_not_made_without_data() -> None:
    with pytest.raises(CalibrationNeeded, match="activations is 'int8'"):
        AutoHfQuantizer.from_config(QuantoConfig(activations="int8"), pre_quantized=False)


def test_unknown_optimizers_are_refused() -> None:
    with pytest.raises(InvalidOption, match=r"optimizer is 'hgq'.*did you mean 'hqq'"):
        QuantoConfig(weights="int4", optimizer="hgq")


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused(bad: float) -> None:
    source = torch.full((4, 64), 0.5)
    source[1, 1] = bad
    for weights in ("int8", "int4"):
        quantizer = AutoHfQuantizer.from_config(QuantoConfig(weights=weights), pre_quantized=False)
        layout: Any = quantizer.layout_for(ModuleInfo(NAME, "linear", (4, 64), "float32"))
        with pytest.raises(NotRepresentable, match="not finite"):
            algorithms.get("quanto")(source, layout.scheme(), **layout.algorithm_options())


def test_large_weights_are_fitted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from anybit.algorithms import quanto

    source = torch.randn(48, 320, generator=torch.Generator().manual_seed(0))
    for weights in ("int8", "float8", "int4", "int2"):
        config = QuantoConfig(weights=weights, optimizer="hqq")
        quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
        layout: Any = quantizer.layout_for(ModuleInfo(NAME, "linear", (48, 320), "float32"))
        whole = quanto.quantize(source, layout.scheme(), **layout.algorithm_options())
        with monkeypatch.context() as patched:
            patched.setattr(quanto, "row_chunks", lambda rows, columns: [(0, 16), (16, rows)])
            parts = quanto.quantize(source, layout.scheme(), **layout.algorithm_options())
        assert same(whole, parts), weights
