"""SINQ where the laws cannot see it: sinq's own codes and values for every form, damaged sidecars, models saved and used again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import anybit
from anybit import algorithms
from anybit.containers.info import TensorInfo
from anybit.errors import CalibrationNeeded, CorruptFile, InvalidOption, NotRepresentable, ShapeMismatch
from anybit.methods._sinq_layout import SinqLayout
from anybit.methods.sinq import SIDECAR, SinqConfig, SinqHfQuantizer
from anybit.weight import ModuleInfo, Weight

GOLDENS = Path(__file__).parent / "golden"
GOLDEN = GOLDENS / "sinq" / "4bit-g64"
TINY = Path(__file__).parents[1] / "examples" / "tiny-llama"
IDS = torch.arange(1, 13)[None]

with safe_open(GOLDENS / "sinq_vectors" / "vectors.safetensors", "pt") as opened:
    SETTINGS: dict[str, dict[str, Any]] = json.loads(opened.metadata()["settings"])
CASES = sorted(SETTINGS)


@pytest.fixture(scope="module")
def vectors() -> dict[str, Tensor]:
    return load_file(GOLDENS / "sinq_vectors" / "vectors.safetensors")


def stored_of(vectors: dict[str, Tensor], case: str) -> dict[str, Tensor]:
    start = f"{case}."
    return {name.removeprefix(start): tensor for name, tensor in vectors.items() if name.startswith(start)}


def layout_of(stored: dict[str, Tensor], settings: dict[str, Any] | None, shape: Any, dtype: str, **config: Any) -> Any:
    quantizer = SinqHfQuantizer(SinqConfig(**config))
    if settings is not None:
        quantizer.settings["m"] = settings
    infos = {
        name: TensorInfo(f"m.{name}", str(tensor.dtype)[6:], tuple(tensor.shape), tensor.nbytes, "file")
        for name, tensor in stored.items()
    }
    return quantizer.layout_of(ModuleInfo("m", "linear", tuple(shape), dtype), infos, lambda name: stored[name])


def same_tensors(ours: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return ours.keys() == wanted.keys() and all(
        ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor) for name, tensor in wanted.items()
    )


@pytest.mark.parametrize("case", CASES)
def test_values_are_those_that_sinq_reads(vectors: dict[str, Tensor], case: str) -> None:
    settings, stored = SETTINGS[case], stored_of(vectors, case)
    wanted, compute = stored.pop("dense"), settings["compute_dtype"].removeprefix("torch.")
    layout = layout_of(stored, settings, settings["shape"], compute)
    weight = layout.decode(stored)
    assert torch.equal(weight.to_dense(torch.float32).to(wanted.dtype), wanted)
    assert same_tensors(layout.encode(weight), stored)


@pytest.mark.parametrize("case", [case for case in CASES if "nf" not in case])
def test_shapes_tell_what_a_missing_sidecar_does_not(vectors: dict[str, Tensor], case: str) -> None:
    settings, stored = SETTINGS[case], stored_of(vectors, case)
    stored.pop("dense")
    dtype = settings["compute_dtype"].removeprefix("torch.")
    known = layout_of(stored, settings, settings["shape"], dtype)
    assert layout_of(stored, None, settings["shape"], dtype, nbits=8) == known  # whatever the configuration says


CREATED = [
    case
    for case in CASES
    if not {"nf", "plain", "one-zero"} & {case[:2], case.removesuffix("-2d"), case} and "f16" not in case
]


@pytest.mark.parametrize("case", CREATED)
def test_codes_and_scales_are_those_that_sinq_chooses(vectors: dict[str, Tensor], case: str) -> None:
    settings, stored = SETTINGS[case], stored_of(vectors, case)
    stored.pop("dense")
    dense = vectors[f"dense.{settings['source']}"]
    config = SinqConfig(settings["nbits"], settings["group_size"], settings["tiling_mode"])
    quantizer = SinqHfQuantizer(config, pre_quantized=False)
    layout = quantizer.layout_for(ModuleInfo("m", "linear", tuple(dense.shape), "bfloat16"))
    assert isinstance(layout, SinqLayout)
    assert same_tensors(layout.encode(made(layout, dense)), stored)
    assert same_tensors(layout.encode(made(layout, dense.float())), stored)


def made(layout: SinqLayout, dense: Tensor) -> Weight:
    assert layout.algorithm is not None
    return algorithms.get(layout.algorithm)(dense, layout.scheme(), **layout.algorithm_options())


def test_heavy_tails_leave_columns_as_they_are(vectors: dict[str, Tensor]) -> None:
    assert bool((vectors["tails.meta.scale2"] == 1).all())
    assert not bool((vectors["4bit.meta.scale2"] == 1).any())


def test_weights_in_several_pieces_have_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    for square in (False, True):
        layout = SinqLayout((64, 256), "float32", group=32, square=square)
        whole = layout.encode(made(layout, dense))
        with monkeypatch.context() as patch:
            patch.setattr("anybit.algorithms.sinq.CHUNK", 1)
            assert same_tensors(layout.encode(made(layout, dense)), whole)


def test_a_weight_that_cannot_be_scaled_is_refused() -> None:
    layout = SinqLayout((64, 64), "float32")
    for dense in (torch.full((64, 64), torch.nan), torch.full((64, 64), 1e6)):
        with pytest.raises(NotRepresentable, match="beyond float16"):
            made(layout, dense)


# --- sidecars --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"axis": 0}, CorruptFile, "axis 0"),
        ({"packing": "7bit_u8"}, CorruptFile, "7bit_u8"),
        ({"nbits": 3}, CorruptFile, "4bit_u8"),
        ({"method": "sinq_nf3_quantAux"}, CorruptFile, "nf3"),
    ],
)
def test_what_a_sidecar_says_is_checked(
    vectors: dict[str, Tensor], change: dict[str, Any], error: type[Exception], match: str
) -> None:
    stored = stored_of(vectors, "4bit")
    stored.pop("dense")
    settings = {**SETTINGS["4bit"], **change}
    with pytest.raises(error, match=match):
        layout_of(stored, settings, settings["shape"], "bfloat16")


def test_a_sidecar_of_another_shape_counts_less_than_tensors(vectors: dict[str, Tensor]) -> None:
    stored, settings = stored_of(vectors, "4bit"), {**SETTINGS["4bit"], "shape": [32, 32]}
    stored.pop("dense")
    assert layout_of(stored, settings, [64, 128], "bfloat16") == layout_of(
        stored, SETTINGS["4bit"], [64, 128], "bfloat16"
    )
    with pytest.raises(ShapeMismatch, match=r"m\.W_q.*m\.meta\.scale\.x"):
        layout_of(stored, SETTINGS["4bit"], [64, 64], "bfloat16")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", ["4bit", "3bit"])
def test_words_may_be_viewed_as_floats(vectors: dict[str, Tensor], case: str, dtype: torch.dtype) -> None:
    stored, settings = stored_of(vectors, case), {**SETTINGS[case], "view_as_float": True}
    wanted = stored.pop("dense")
    stored["W_q"] = stored["W_q"].view(dtype)
    layout = layout_of(stored, settings, settings["shape"], "bfloat16")
    weight = layout.decode(stored)
    assert torch.equal(weight.to_dense(torch.float32).to(wanted.dtype), wanted)
    assert torch.equal(layout.encode(weight)["W_q"].view(torch.uint8), stored["W_q"].view(torch.uint8))


def test_damaged_words_are_noticed(vectors: dict[str, Tensor]) -> None:
    stored = stored_of(vectors, "3bit")
    stored.pop("dense")
    layout = layout_of(stored, SETTINGS["3bit"], SETTINGS["3bit"]["shape"], "bfloat16")
    for bits in (1 << 30, 7):  # above the ten codes; the last code of a word whose rows are fewer
        words = stored["W_q"].clone()
        words[-1, 0] |= bits
        with pytest.raises(CorruptFile, match="W_q"):
            layout.decode({**stored, "W_q": words})


def test_a_sidecar_that_is_no_json_is_named(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN, tmp_path / "model")
    (tmp_path / "model" / SIDECAR).write_text("{")
    with pytest.raises(CorruptFile, match=r"meta\.json"):
        anybit.load(tmp_path / "model")


# --- whole models ----------------------------------------------------------------------------------------------------------


def logits(path: Path) -> Tensor:
    model: Any = anybit.load(path)
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def test_a_saved_model_can_be_used_again(tmp_path: Path) -> None:
    """In transformers the first product after a reload fails on a CPU: the dtype to compute in came back as text."""
    anybit.load(GOLDEN).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / SIDECAR).read_bytes() == (GOLDEN / SIDECAR).read_bytes()
    assert torch.equal(logits(tmp_path / "again"), logits(GOLDEN))


@pytest.mark.parametrize(("bits", "tiling"), [(8, "1D"), (6, "1D"), (4, "2D")])
def test_a_made_model_can_be_used_again(tmp_path: Path, bits: int, tiling: str) -> None:
    """8 bits among them, whose reload fails in transformers: its sidecar has lost `packing`."""
    config = SinqConfig(nbits=bits, tiling_mode=tiling, modules_to_not_convert=["lm_head"])
    anybit.quantize(TINY, tmp_path / "made", config)
    loaded: Any = anybit.load(TINY, SinqConfig(nbits=bits, tiling_mode=tiling, modules_to_not_convert=["lm_head"]))
    loaded.save_pretrained(tmp_path / "saved")
    made_one, saved = (load_file(tmp_path / name / "model.safetensors") for name in ("made", "saved"))
    assert same_tensors(made_one, saved)
    sidecars = [json.loads((tmp_path / name / SIDECAR).read_text()) for name in ("made", "saved")]
    assert sidecars[0] == sidecars[1]
    peer = json.loads((GOLDEN / SIDECAR).read_text())["model.layers.0.self_attn.q_proj"]["meta"]
    own = sidecars[0]["model.layers.0.self_attn.q_proj"]["meta"]
    assert own.keys() == peer.keys()
    assert own["nbits"] == bits
    for name in ("made", "saved"):
        file = json.loads((tmp_path / name / "config.json").read_text())
        assert file["sinq"] is True
        assert file["quantization_config"]["quant_method"] == "sinq"
    wanted = logits(tmp_path / "made")
    (tmp_path / "made" / SIDECAR).unlink()
    assert torch.equal(logits(tmp_path / "made"), wanted)
    if bits == 8:
        with torch.no_grad():
            dense = anybit.load(TINY)(IDS).logits  # type: ignore[operator]
        assert (wanted - dense).abs().max() < 0.05 * dense.abs().max()


def test_a_dense_copy_says_nothing_of_sinq(tmp_path: Path) -> None:
    anybit.dequantize(GOLDEN, tmp_path / "dense")
    assert not (tmp_path / "dense" / SIDECAR).exists()
    assert "sinq" not in (tmp_path / "dense" / "config.json").read_text()
    assert anybit.load(tmp_path / "dense").anybit_plan.method is None
    emptied = anybit.load(GOLDEN).dequantize()
    assert not hasattr(emptied.config, "sinq")


def test_layers_that_do_not_fit_stay_dense_and_say_why(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LlamaConfig(
        hidden_size=72, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=40,
    )  # fmt: skip
    LlamaForCausalLM(small).save_pretrained(tmp_path / "dense")
    plan = anybit.plan(tmp_path / "dense", SinqConfig())
    reasons = {entry.slot.module: entry.reason for entry in plan.entries if entry.action == "dense"}
    assert "no whole groups of 64" in reasons["model.layers.0.self_attn.q_proj"]
    assert "model.layers.0.mlp.down_proj" not in reasons
    square = anybit.plan(tmp_path / "dense", SinqConfig(tiling_mode="2D"))
    assert "square tiles" in {e.slot.module: e.reason for e in square.entries}["model.layers.0.mlp.down_proj"]


def test_what_cannot_be_made_is_said_at_once() -> None:
    with pytest.raises(CalibrationNeeded, match="asinq"):
        SinqHfQuantizer(SinqConfig(method="asinq"), pre_quantized=False)
    with pytest.raises(InvalidOption, match="nbits"):
        SinqHfQuantizer(SinqConfig(nbits=7), pre_quantized=False)
    with pytest.raises(InvalidOption, match="tiling_mode"):
        SinqHfQuantizer(SinqConfig(tiling_mode="3D"), pre_quantized=False)


def test_a_second_scale_is_needed(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN, tmp_path / "model")
    file = tmp_path / "model" / "model-00001-of-00001.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.meta.scale2"
    tensors[name] = tensors[name].view(2, 1, 64)
    save_file(tensors, file)
    with pytest.raises(ShapeMismatch, match=r"up_proj\.meta\.scale2"):
        anybit.load(tmp_path / "model")


@pytest.mark.parametrize("tiling", ["1D", "2D"])
def test_experts_are_packed_where_they_are_stored_one_by_one(tmp_path: Path, tiling: str) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    small = Qwen3MoeConfig(
        hidden_size=64, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=32, vocab_size=64,
    )  # fmt: skip
    Qwen3MoeForCausalLM(small).save_pretrained(tmp_path / "dense")
    plan = anybit.quantize(tmp_path / "dense", tmp_path / "made", SinqConfig(8, 32, tiling))
    experts = "model.layers.0.mlp.experts"
    packed = {entry.slot.module for entry in plan.entries if entry.action == "quantize"}
    assert {f"{experts}.gate_up_proj", f"{experts}.down_proj"} <= packed
    wanted = logits(tmp_path / "dense")
    assert (logits(tmp_path / "made") - wanted).abs().max() < 0.05 * wanted.abs().max()
    anybit.load(tmp_path / "made").save_pretrained(tmp_path / "again")
    stored = [load_file(tmp_path / name / "model.safetensors") for name in ("made", "again")]
    assert f"{experts}.3.up_proj.W_q" in stored[0]
    assert same_tensors(stored[1], stored[0])
