"""AutoRound beyond its goldens: its quantization functions and packers as referees, settings per module, refusals."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import anybit
from anybit import AutoRoundConfig, algorithms
from anybit.errors import AnybitError, CheckpointError, ConfigError, InvalidOption, NotRepresentable, ShapeMismatch
from anybit.quantizers import AutoHfQuantizer
from anybit.weight import ModuleInfo

GOLDEN = Path(__file__).parent / "golden"
VECTORS = load_file(GOLDEN / "packer_vectors" / "auto_round.safetensors")
WEIGHT = VECTORS["weight"]
CASES = sorted({name.rpartition(".")[0] for name in VECTORS} - {""})
NAME = "model.layers.0.mlp.up_proj"


def stored_of(case: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(f"{case}."): tensor for name, tensor in VECTORS.items() if name.startswith(f"{case}.")}


def settings_of(case: str) -> dict[str, Any]:
    packing, bits, size, kind = case.split("-")
    return {"packing_format": packing, "bits": int(bits), "group_size": int(size), "sym": kind == "sym"}


def read(stored: dict[str, torch.Tensor], config: dict[str, Any], name: str = NAME) -> Any:
    """The layout the quantizer finds, as the plan would ask it."""
    infos = {
        own: SimpleNamespace(
            name=f"{name}.{own}", dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape)
        )
        for own, tensor in stored.items()
    }
    quantizer = AutoHfQuantizer.from_config({"quant_method": "auto-round", **config})
    quantizer.validate_environment()
    return quantizer.layout_of(ModuleInfo(name, "linear", (32, 96), "float32"), infos, lambda own: stored[own])


def field(words: torch.Tensor, place: int, bits: int) -> int:
    """Bits [place, place + bits) of a row of int32 words."""
    value = 0
    for bit in range(bits):
        word, shift = divmod(place + bit, 32)
        value |= ((int(words[word]) >> shift) & 1) << bit
    return value


def by_hand(case: str, stored: dict[str, torch.Tensor], row: int, column: int) -> float:
    settings = settings_of(case)
    bits, group = settings["bits"], column // settings["group_size"]
    scale = float(stored["scales"][group, row])
    if settings["packing_format"].endswith("awq"):
        place = bits * (row // 8 * 8 + (0, 4, 1, 5, 2, 6, 3, 7)[row % 8])
        code, zero = field(stored["qweight"][column], place, bits), field(stored["qzeros"][group], place, bits)
        return (code - zero) * scale
    code = field(stored["qweight"][:, row], column * bits, bits)
    zero = field(stored["qzeros"][group], row * bits, bits) + settings["packing_format"].endswith("auto_gptq")
    return (code - zero) * scale


@pytest.mark.parametrize("case", CASES)
def test_packed_weights_of_the_vendor(case: str) -> None:
    stored = stored_of(case)
    layout = read(stored, settings_of(case))
    weight = layout.decode(stored)
    again = layout.encode(weight)
    assert set(again) == set(stored)
    assert all(torch.equal(again[name], stored[name]) for name in stored)
    dense = weight.to_dense(torch.float32)
    for row, column in ((0, 0), (5, 31), (9, 32), (31, 95), (7, 64), (17, 50)):
        assert dense[row, column].item() == torch.tensor(by_hand(case, stored, row, column)).float().item()


# asymmetric codes under auto_gptq lose zero points of 0; anybit refuses to write such a file
@pytest.mark.parametrize("case", [case for case in CASES if not ("auto_gptq" in case and case.endswith("asym"))])
def test_rounding_gives_the_vendors_bytes(case: str) -> None:
    settings = settings_of(case)
    quantizer = AutoHfQuantizer.from_config(AutoRoundConfig(**settings), pre_quantized=False)
    layout = quantizer.layout_for(ModuleInfo(NAME, "linear", (32, 96), "float32"))
    assert layout is not None
    assert layout.algorithm is not None
    weight = algorithms.get(layout.algorithm)(WEIGHT, layout.scheme(), **layout.algorithm_options())
    made, wanted = layout.encode(weight), stored_of(case)
    assert set(made) == set(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(made[name], tensor), name


def test_a_zero_point_of_two_to_the_bits_is_read_as_the_vendor_reads_it() -> None:
    stored = stored_of("auto_round:auto_gptq-4-32-sym")
    stored = {**stored, "qzeros": torch.full_like(stored["qzeros"], -1)}  # 15 in each field: zero points of 16
    layout = read(stored, settings_of("auto_round:auto_gptq-4-32-sym"))
    dense = layout.decode(stored).to_dense(torch.float32)
    code = field(stored["qweight"][:, 3], 4 * 40, 4)
    assert dense[3, 40].item() == (code - 16) * float(stored["scales"][1, 3])
    assert all(torch.equal(tensor, stored[name]) for name, tensor in layout.encode(layout.decode(stored)).items())


# --- settings of one module ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "extra",
    [
        {NAME: {"bits": 4, "sym": False}},
        {r".*mlp\.up_proj.*": {"bits": 4, "sym": False}},
        {r"layers\.\d+\.mlp": {"bits": 4, "sym": False}, ".*": {"bits": 3}},
        {NAME: {"bits": 4, "sym": False, "act_bits": 16, "data_type": "int", "act_dynamic": None}, ".*": {"bits": 3}},
    ],
    ids=["name", "search", "first of two", "name before patterns"],
)
def test_extra_config_names_modules_and_patterns(extra: dict[str, Any]) -> None:
    stored = stored_of("auto_round-4-32-asym")
    layout = read(stored, {"bits": 2, "group_size": 32, "packing_format": "auto_round", "extra_config": extra})
    assert (layout.bits, layout.symmetric) == (4, False)


def test_the_dot_of_a_name_is_no_wildcard() -> None:
    stored = stored_of("auto_round-4-32-asym")
    extra = {"model.layers.1.mlp.up_proj": {"bits": 16}}
    config = {"bits": 4, "group_size": 32, "packing_format": "auto_round", "extra_config": extra}
    assert read(stored, config, "model.layers.1xmlp.up_proj").bits == 4
    with pytest.raises(ShapeMismatch, match="stored packed, but the configuration's extra_config says that it has 16"):
        read(stored, config, "model.layers.1.mlp.up_proj")


def test_tensors_that_agree_with_each_other_beat_the_configuration() -> None:
    case = "auto_round-5-32-asym"
    layout = read(stored_of(case), {"bits": 4, "group_size": 96, "sym": False, "packing_format": "auto_round"})
    assert (layout.bits, layout.group_size) == (5, 32)
    damaged = {**stored_of(case), "qzeros": stored_of(case)["qzeros"][:, :4].contiguous()}
    with pytest.raises(ShapeMismatch, match="qweight holds 5 bits"):
        read(damaged, {"bits": 4, "group_size": 32, "sym": False, "packing_format": "auto_round"})


@pytest.mark.parametrize(
    ("config", "error", "says"),
    [
        ({"packing_format": "auto_round:mx_fp"}, ConfigError, "packing_format is 'auto_round:mx_fp'"),
        ({"packing_format": "auto_round:llm_compressor"}, ConfigError, "anybit reads those with integer weights"),
        ({"data_type": "mx_fp"}, NotRepresentable, "data_type 'mx_fp'"),
        ({"act_bits": 8}, NotRepresentable, "inputs of 8 bits"),
        ({"extra_config": {NAME: {"data_type": "nv_fp"}}}, NotRepresentable, "data_type 'nv_fp'"),
        ({"rotation_config": {"kind": "hadamard"}}, ConfigError, "rotation_config"),
        ({"extra_config": {NAME: {"bits": 9}}}, InvalidOption, f"extra_config for {NAME}.*bits is 9"),
        ({"extra_config": {NAME: 4}}, InvalidOption, "must be an object"),
        ({"extra_config": {"(": {"bits": 4}}}, InvalidOption, "not a valid regular expression"),
        ({"packing_format": "auto_round:auto_awq", "bits": 3}, ShapeMismatch, "holds 4 to 7 bits, not 3"),
    ],
    ids=str,
)
def test_what_is_refused(config: dict[str, Any], error: type[AnybitError], says: str) -> None:
    with pytest.raises(error, match=says):
        read(stored_of("auto_round:auto_gptq-4-32-sym"), {"bits": 4, "group_size": 32, **config})


def test_other_tensors_are_no_dense_weight() -> None:
    with pytest.raises(NotRepresentable, match="weight_packed"):
        read({"weight_packed": torch.zeros(32, 48, dtype=torch.uint8)}, {"bits": 4})


# --- files of the first versions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "zeros"), [("auto_round:auto_gptq-4-32-sym", "v1_agreed"), ("auto_round-4-32-sym", "v2")]
)
def test_without_packing_format_symmetric_zero_points_are_the_evidence(case: str, zeros: str) -> None:
    config = {"bits": 4, "group_size": 32, "sym": True, "backend": "auto_round:exllamav2"}
    assert read(stored_of(case), config).zeros == zeros


def test_without_packing_format_and_evidence_nothing_is_guessed() -> None:
    with pytest.raises(CheckpointError, match=r"qzeros' holds neither 7 nor 8 throughout. Add packing_format"):
        read(
            stored_of("auto_round-4-32-asym"),
            {"bits": 4, "group_size": 32, "sym": False, "backend": "auto_round:exllamav2"},
        )


def test_without_any_hint_the_zero_is_stored_minus_one() -> None:
    assert read(stored_of("auto_round:auto_gptq-4-32-sym"), {"bits": 4, "group_size": 32}).zeros == "v1_agreed"


# --- whole checkpoints ---------------------------------------------------------------------------------------------------


def test_an_awq_checkpoint_is_taken_over() -> None:
    source = GOLDEN / "awq" / "w4_g128_zp_gemm"
    ids = load_file(source / "reference.safetensors")["input_ids"]
    taken: Any = anybit.load(source, AutoRoundConfig(), dtype=torch.float32)
    plain: Any = anybit.load(source, dtype=torch.float32)
    assert taken.anybit_plan.method == "auto-round"
    with torch.no_grad():
        assert torch.equal(taken(ids).logits, plain(ids).logits)


def dense(tmp_path: Path) -> Path:
    target = tmp_path / "dense"
    anybit.dequantize(GOLDEN / "auto-round" / "w5_g32_asym", target)
    return target


def test_symmetric_creation_is_what_the_vendor_would_write(tmp_path: Path) -> None:
    extra = {"lm_head": {"bits": 8, "group_size": 32}, "model.layers.0.mlp.down_proj": {"bits": 16}}
    plan = anybit.quantize(
        dense(tmp_path), tmp_path / "made", AutoRoundConfig(bits=4, group_size=64, extra_config=extra)
    )
    made, config = (
        load_file(tmp_path / "made" / "model.safetensors"),
        json.loads((tmp_path / "made" / "config.json").read_text()),
    )
    assert config["quantization_config"]["packing_format"] == "auto_round:gptq"
    assert config["quantization_config"]["iters"] == 0
    assert "model.layers.0.mlp.down_proj.weight" in made
    assert made["lm_head.qweight"].shape[0] == 128 * 8 // 32
    assert bool((made["model.layers.0.mlp.up_proj.scales"] < 0).any())
    assert "16 bits" in next(entry.reason for entry in plan.entries if entry.slot.module.endswith("down_proj"))
    again: Any = anybit.load(tmp_path / "made")
    assert {entry.slot.module for entry in again.anybit_plan.entries if entry.action == "packed"} >= {"lm_head"}


@pytest.mark.parametrize(
    ("options", "packing"),
    [
        ({"sym": False}, "auto_round:auto_awq"),
        ({"sym": False, "bits": 3}, "auto_round"),
        ({"sym": False, "extra_config": {"model.layers.0.mlp.up_proj": {"bits": 8}}}, "auto_round"),
        ({"sym": True, "extra_config": {"model.layers.0.mlp.up_proj": {"sym": False}}}, "auto_round"),
        ({"sym": False, "packing_format": "auto_round:gptqmodel"}, "auto_round:gptqmodel"),
    ],
    ids=str,
)
def test_asymmetric_creation_chooses_a_format_that_keeps_zero_points(
    options: dict[str, Any], packing: str, tmp_path: Path
) -> None:
    anybit.quantize(dense(tmp_path), tmp_path / "made", AutoRoundConfig(group_size=32, **options))
    config = json.loads((tmp_path / "made" / "config.json").read_text())["quantization_config"]
    assert config["packing_format"] == packing
    assert anybit.load(tmp_path / "made").anybit_plan.coverage > 0.5


def test_a_format_that_loses_zero_points_is_refused(tmp_path: Path) -> None:
    config = AutoRoundConfig(sym=False, packing_format="auto_round:auto_gptq")
    with pytest.raises(InvalidOption, match="cannot store a zero point of 0"):
        anybit.quantize(dense(tmp_path), tmp_path / "made", config)


def test_a_dense_tensor_of_another_dtype_is_saved_as_it_came_unless_it_changed(tmp_path: Path) -> None:
    source = GOLDEN / "auto-round" / "w5_g32_asym"  # float16 by its config.json, bfloat16 in the file
    model: Any = anybit.load(source)
    assert model.lm_head.weight.dtype == torch.float16
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert torch.equal(saved["lm_head.weight"], load_file(source / "model.safetensors")["lm_head.weight"])
    assert saved["model.norm.weight"].dtype == torch.float16
    assert torch.equal(saved["model.norm.weight"], model.model.norm.weight)


def test_that_the_source_may_be_gone(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "auto-round" / "w5_g32_asym", tmp_path / "source")
    model: Any = anybit.load(tmp_path / "source")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    save_file({**tensors, "another": torch.zeros(3)}, tmp_path / "source" / "model.safetensors")
    model.save_pretrained(tmp_path / "changed")
    assert load_file(tmp_path / "changed" / "model.safetensors")["lm_head.weight"].dtype == torch.float16
    shutil.rmtree(tmp_path / "source")
    model.save_pretrained(tmp_path / "gone")
    assert load_file(tmp_path / "gone" / "model.safetensors")["lm_head.weight"].dtype == torch.float16
