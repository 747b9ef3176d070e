"""torchao beyond the laws: codes as torchao chooses them, names and headers, older pickles, which configuration counts."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import anybit
from anybit import algorithms
from anybit.containers import Checkpoint
from anybit.errors import (
    AnybitError,
    CalibrationNeeded,
    CorruptFile,
    InvalidOption,
    MissingTensor,
    NotRepresentable,
    ShapeMismatch,
    UnsafeFile,
)
from anybit.methods import _torchao_configs as configs
from anybit.methods._torchao_layouts import Int4TileLayout
from anybit.methods._torchao_records import Record
from anybit.methods.torchao import LEGACY
from anybit.weight import ModuleInfo

GOLDEN = Path(__file__).parent / "golden"
TORCHAO = GOLDEN / "torchao"
DENSE_MODEL = Path(__file__).parents[1] / "examples" / "tiny-llama"
OLD = ("legacy-bin-int8wo", "tiny-old-int8dyn-bf16", "tiny-old-int8dyn-int4", "tiny-old-float8")


def vectors() -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(GOLDEN / "torchao_vectors" / "vectors.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())  # noqa: SIM118


TENSORS, DESCRIBED = vectors()
CASES = sorted(name for name in DESCRIBED if name.partition(".")[0] in ("float32", "bfloat16", "float16"))
QUANT_TYPES = {name: json.loads(text)["default"] for name, text in DESCRIBED.items() if name not in CASES}


def module_of(dtype: str, shape: tuple[int, ...] = (16, 64), kind: str = "linear") -> ModuleInfo:
    return ModuleInfo("a", kind, shape, dtype)


def logits(path: Path, **options: Any) -> torch.Tensor:
    model: Any = anybit.load(path, **options)
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(8)[None]).logits
    return found


def same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    return (left.dtype, left.shape) == (right.dtype, right.shape) and torch.equal(
        left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8)
    )


# --- creation --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_codes_scales_and_header_are_torchaos(case: str) -> None:
    dtype, _, name = case.partition(".")
    layout = configs.layout_of(QUANT_TYPES[name], module_of(dtype), "weight")
    assert json.loads(layout.record) == json.loads(DESCRIBED[case])
    assert layout.algorithm is not None
    dense = TENSORS[f"{dtype}.dense"]
    made = layout.encode(algorithms.get(layout.algorithm)(dense, layout.scheme(), **layout.algorithm_options()))
    for part in layout.parts:
        assert same_bytes(made[layout.name(part)], TENSORS[f"{case}.{part}"]), part


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_reciprocals_are_rounded_as_scales_are(dtype: torch.dtype) -> None:
    """torchao multiplies by 1 / scale taken in the dtype of the scale, here fewer bits than the weight has."""
    quant_type = {
        "_type": "IntxWeightOnlyConfig", "_version": 2,
        "_data": {
            "weight_dtype": {"_type": "torch.dtype", "_data": "int4"},
            "granularity": {"_type": "PerGroup", "_version": 1, "_data": {"group_size": 32}},
            "scale_dtype": {"_type": "torch.dtype", "_data": "bfloat16"},
        },
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(64, 96, generator=generator).to(dtype)
    layout = configs.layout_of(quant_type, module_of(str(dtype).removeprefix("torch."), (64, 96)), "weight")
    assert layout.algorithm is not None
    made = layout.encode(algorithms.get(layout.algorithm)(dense, layout.scheme(), **layout.algorithm_options()))
    groups = dense.view(64, 3, 32)
    scale = (groups.abs().amax(-1) / 7.5).to(torch.bfloat16)
    wanted = torch.round(groups.float() * (1.0 / scale)[..., None].float()).clamp(-8, 7)
    assert torch.equal(made["._weight_scale"], scale)
    assert torch.equal(made["._weight_qdata"].view(64, 3, 32).float(), wanted)
    plain = torch.round(groups.float() / scale[..., None].float()).clamp(-8, 7)
    assert not torch.equal(plain, wanted), "the weight does not tell the two rules apart"


@pytest.mark.parametrize("case", CASES)
def test_the_header_makes_the_layout_that_the_configuration_made(case: str) -> None:
    """What is read is what was written, except for how scales were found."""
    dtype, _, name = case.partition(".")
    made = configs.layout_of(QUANT_TYPES[name], module_of(dtype), "weight")
    stored = {
        part: type("Info", (), {"name": part, "dtype": str(TENSORS[f"{case}.{part}"].dtype)[6:], "shape": TENSORS[f"{case}.{part}"].shape})
        for part in made.parts
    }  # fmt: skip
    read = Record(module_of(dtype), "weight", "a.weight", made.record, stored).layout()
    assert read.specs() == made.specs()
    assert read.scheme().structure() == made.scheme().structure()
    assert read.record == made.record


def test_int4_by_hand() -> None:
    """The formulas of the kernels' sources: 15 steps from the smallest to the largest, zero points are numbers."""
    dense = torch.zeros(16, 64)
    dense[0, :4] = torch.tensor([-0.75, 0.75, 0.05, -0.05])
    dense[1, 32:] = torch.linspace(1.0, 2.5, 32)
    config = {"_type": "Int4WeightOnlyConfig", "_version": 2, "_data": {"group_size": 32}}
    layout = configs.layout_of(config, module_of("float32"), "weight")
    weight = algorithms.get("rtn")(dense, layout.scheme(), **layout.algorithm_options())
    stored = layout.encode(weight)
    scale, zero = stored["._weight_scale"], stored["._weight_zero_point"]
    assert scale.shape == zero.shape == (2, 16)
    assert scale[0, 0] == torch.tensor(1.5) / 15
    assert zero[0, 0] == -0.75 + 8 * scale[0, 0]
    first = stored["._weight_qdata"][0, :2].view(torch.uint8).tolist()
    assert first == [0x78, 0xF0], (
        "-8 and 7; round(8.0) - 8 = 0 and round(7.0) - 8 = -1, the first column in the low half"
    )
    assert scale[1, 1] == torch.tensor(1.5) / 15
    assert zero[1, 1] == 1.0 + 8 * scale[1, 1]
    assert scale[1, 0] == torch.tensor(1e-6) / 15, "an empty group"
    back = weight.to_dense(torch.float32)
    assert torch.allclose(back[1, 32:], dense[1, 32:], atol=0.051)


def test_int4_tiles_by_hand() -> None:
    """Every element against the place that tinygemm's layout gives it."""
    generator = torch.Generator().manual_seed(0)
    layout = Int4TileLayout(
        (20, 200),
        "bfloat16",
        attributes='{"block_size": [1, 64], "shape": [20, 200]}',
        parts=("qdata", "scale_and_zero"),
    )
    specs = layout.specs()
    qdata = torch.randint(-(2**31), 2**31 - 1, specs["._weight_qdata"][1], generator=generator).to(torch.int32)
    both = (torch.rand(specs["._weight_scale_and_zero"][1], generator=generator) + 0.5).to(torch.bfloat16)
    assert (qdata.shape, both.shape) == ((3, 8, 32, 4), (16, 24, 2))
    stored = {"._weight_qdata": qdata, "._weight_scale_and_zero": both}
    weight = layout.decode(stored)
    dense = weight.to_dense(torch.float32)
    assert dense.shape == (20, 200)
    for row, column in [(0, 0), (19, 199), (7, 15), (8, 16), (13, 127), (13, 128), (5, 9), (6, 31), (11, 77), (2, 150)]:
        tile, inner = column // 16, column % 16
        lane = (row % 8) * 4 + (inner % 8) // 2
        element = inner % 2 + 2 * (inner // 8) + 4 * (tile % 2)
        word = int(qdata[row // 8, tile // 8, lane, (tile % 8) // 2]) & 0xFFFFFFFF
        code = (word >> (0, 16, 4, 20, 8, 24, 12, 28)[element]) & 15
        scale, zero = both[column // 64, row].float().tolist()
        assert dense[row, column] == torch.tensor(code - 8.0) * scale + zero
    for name, tensor in layout.encode(weight).items():
        assert same_bytes(tensor, stored[name])


def test_int4_tiles_are_made_as_tinygemm_makes_them() -> None:
    config = {"_type": "Int4WeightOnlyConfig", "_version": 2, "_data": {"group_size": 64, "int4_packing_format": "tile_packed_to_4d"}}  # fmt: skip
    layout = configs.layout_of(config, module_of("bfloat16"), "weight")
    dense = TENSORS["bfloat16.dense"]
    weight = algorithms.get("rtn")(dense, layout.scheme(), **layout.algorithm_options())
    low, high = dense.amin(1), dense.amax(1)
    scale = (high - low) / 15
    zero = low + scale * 8
    codes = torch.round((dense - (zero - scale * 8)[:, None]) / scale[:, None]).clamp(0, 15) - 8
    tree: Any = weight.tree
    assert torch.equal(tree.child.scale.tensor[:16, 0], scale)
    assert torch.equal(tree.child.offset.tensor[:16, 0], zero)
    assert torch.equal(tree.child.codes.integers()[:16, :64].float(), codes.float())
    wanted = codes.float() * scale.float()[:, None] + zero.float()[:, None]
    assert torch.equal(weight.to_dense(torch.float32), wanted)


@pytest.mark.parametrize("name", sorted(anybit.TorchAoConfig.schemes))
def test_every_scheme_makes_a_model_that_runs(name: str, tmp_path: Path) -> None:
    plan = anybit.quantize(DENSE_MODEL, tmp_path / "made", anybit.TorchAoConfig(**anybit.TorchAoConfig.schemes[name]))
    assert any(entry.action == "quantize" for entry in plan.entries)
    found = logits(tmp_path / "made").float()
    assert torch.isfinite(found).all()
    if "int2" not in name and "int3" not in name and "x2" not in name and "x3" not in name:
        assert (found - logits(DENSE_MODEL).float()).abs().mean() < 0.2 * logits(DENSE_MODEL).float().std()


# --- which configuration counts ----------------------------------------------------------------------------------------------

INT8 = {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}
INT4 = {
    "_type": "IntxWeightOnlyConfig",
    "_version": 2,
    "_data": {"weight_dtype": {"_type": "torch.dtype", "_data": "int4"}},
}


def layouts_of(table: dict[str, Any], tmp_path: Path, **options: Any) -> dict[str, str]:
    quant_type = {"_type": "FqnToConfig", "_version": 1, "_data": {"fqn_to_config": table}}
    plan = anybit.quantize(DENSE_MODEL, tmp_path / "made", anybit.TorchAoConfig(quant_type, **options))
    return {entry.slot.module.removeprefix("model.layers.0."): entry.layout for entry in plan.entries}


def test_the_most_exact_name_counts(tmp_path: Path) -> None:
    table = {
        "re:.*q_proj": INT4,
        "model.layers.0.self_attn.q_proj": INT8,
        "model.layers.0.self_attn.k_proj": INT8,
        "model.layers.0.self_attn.k_proj.weight": None,
        "re:model.layers.0.mlp.*": None,
        "re:.*up_proj.weight": INT8,
        "re:.*v_pro": INT8,
        "_default": INT4,
    }
    found = layouts_of(table, tmp_path)
    assert found["self_attn.q_proj"] == "Int8Layout", "a name before a pattern"
    assert found["self_attn.k_proj"] == "dense", "a parameter before its module"
    assert found["mlp.up_proj"] == "dense", "the first pattern"
    assert found["self_attn.v_proj"] == "IntxLayout", "a pattern must cover the whole name"
    assert found["self_attn.o_proj"] == "IntxLayout"
    assert found["lm_head"] == "dense"
    assert found["model.embed_tokens"] == "dense"


def test_embeddings_and_output_layer_on_request(tmp_path: Path) -> None:
    found = layouts_of({"_default": INT4}, tmp_path, include_input_output_embeddings=True)
    assert set(found.values()) == {"IntxLayout"}
    tensors = load_file(tmp_path / "made" / "model.safetensors")
    assert tensors["model.embed_tokens._weight_qdata"].dtype == torch.int8
    assert torch.isfinite(logits(tmp_path / "made")).all()


def test_without_a_default_only_names_are_quantized(tmp_path: Path) -> None:
    found = layouts_of({"re:.*down_proj": INT8}, tmp_path)
    assert {name.rpartition(".")[2] for name, layout in found.items() if layout != "dense"} == {"down_proj"}


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"_type": "Int8StaticActivationInt8WeightConfig"}, CalibrationNeeded, "calibration"),
        ({"_type": "UIntXWeightOnlyConfig"}, InvalidOption, "cannot quantize with UIntXWeightOnlyConfig"),
        ({"_type": "Int4WeightOnlyConfig", "_data": {"int4_packing_format": "preshuffled"}}, InvalidOption, "plain and tile"),
        ({"_type": "Int4WeightOnlyConfig", "_data": {"int4_choose_qparams_algorithm": "hqq"}}, InvalidOption, "TINYGEMM"),
        ({"_type": "IntxWeightOnlyConfig", "_data": {"weight_dtype": "int9"}}, InvalidOption, "int1 to int8"),
        ({"_type": "IntxWeightOnlyConfig", "_data": {"intx_packing_format": "OPAQUE_ATEN_KLEIDIAI"}}, InvalidOption, "one machine"),
        ({"_type": "Float8DynamicActivationInt4WeightConfig"}, InvalidOption, "only 'plain'"),
        ({"_type": "Float8WeightOnlyConfig", "_data": {"weight_dtype": "float16"}}, InvalidOption, "float8_e4m3fn or"),
    ],
)  # fmt: skip
def test_what_cannot_be_made_is_said(config: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        configs.layout_of(config, module_of("float32", (16, 128)), "weight")


@pytest.mark.parametrize(
    ("config", "shape", "message"),
    [
        ({"_type": "Int4WeightOnlyConfig", "_version": 2, "_data": {"group_size": 48}}, (16, 64), "groups of 48"),
        (
            {
                "_type": "Int8WeightOnlyConfig",
                "_data": {"granularity": {"_type": "PerGroup", "_data": {"group_size": 24}}},
            },
            (16, 64),
            "do not divide",
        ),
        ({"_type": "Float8DynamicActivationFloat8WeightConfig"}, (24, 64), "multiples of 16"),
        ({"_type": "IntxWeightOnlyConfig"}, (3, 16, 64), "is for matrices"),
    ],
)
def test_what_torchao_leaves_dense_stays_dense(config: dict[str, Any], shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(configs.StaysDense, match=message):
        configs.layout_of(config, module_of("float32", shape), "weight")


# --- names and headers -------------------------------------------------------------------------------------------------------


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata())


def changed(tmp_path: Path, variant: str, change: Any) -> Path:
    """A copy of a golden whose header `change` has seen."""
    folder = tmp_path / "changed"
    shutil.copytree(TORCHAO / variant, folder)
    found = metadata(folder / "model.safetensors")
    change(found)
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", found)
    return folder


NAME = "model.layers.0.self_attn.q_proj.weight"


def edit(found: dict[str, str], **fields: Any) -> None:
    record = json.loads(found[NAME])
    for name, value in fields.items():
        (record if name.startswith("_") else record["_data"])[name] = value
    found[NAME] = json.dumps(record)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda found: found.pop(NAME), CorruptFile, "the file's header, which says how to read it"),
        (lambda found: edit(found, _type="MXTensor"), NotRepresentable, "is a MXTensor, which anybit does not read"),
        (lambda found: edit(found, rotation="hadamard"), NotRepresentable, r"\['rotation'\], which torchao 0.18 does not have"),
        (lambda found: edit(found, block_size=[1, 48]), ShapeMismatch, r"blocks of \[1, 48\] do not divide"),
        (lambda found: edit(found, activation_quantization="int4"), NotRepresentable, "activation_quantization is 'int4'"),
        (lambda found: edit(found, target_dtype={"_type": "torch.dtype", "_data": "uint4"}), NotRepresentable, "int1 to int8"),
        (lambda found: found.update({NAME: "{"}), CorruptFile, "header"),
        (lambda found: edit(found, _tensor_data_names=["qdata", "scale"]), AnybitError, "_weight_zero_point"),
        (lambda found: edit(found, target_dtype={"_type": "torch.dtype", "_data": "int3"}), CorruptFile, "int3 ends at -4 and 3"),
    ],
)  # fmt: skip
def test_headers_that_cannot_be(tmp_path: Path, change: Any, error: type[Exception], message: str) -> None:
    folder = changed(tmp_path, "tiny-int8dyn-int4", change)
    with pytest.raises(error, match=message):
        anybit.load(folder)


def test_several_files_carry_the_whole_header(tmp_path: Path) -> None:
    model: Any = anybit.load(TORCHAO / "tiny-intx")
    model.save_pretrained(tmp_path / "saved", max_shard_size="10KB")
    files = sorted((tmp_path / "saved").glob("*.safetensors"))
    assert len(files) > 2
    wanted = metadata(TORCHAO / "tiny-intx" / "model.safetensors")
    for file in files:
        found = metadata(file)
        assert {name: json.loads(found[name]) for name in wanted if name not in ("format", "tensor_names")} == {
            name: json.loads(text) for name, text in wanted.items() if name not in ("format", "tensor_names")
        }
        assert set(json.loads(found["tensor_names"])) == set(json.loads(wanted["tensor_names"]))
    assert torch.equal(logits(tmp_path / "saved"), logits(TORCHAO / "tiny-intx"))


def test_files_with_a_header_each(tmp_path: Path) -> None:
    """As transformers writes them: every file describes the tensors it holds."""
    tensors = load_file(TORCHAO / "tiny-intx" / "model.safetensors")
    whole = metadata(TORCHAO / "tiny-intx" / "model.safetensors")
    folder = tmp_path / "parts"
    folder.mkdir()
    shutil.copy(TORCHAO / "tiny-intx" / "config.json", folder)
    placed = {}
    for number, inside in enumerate(("mlp", "")):
        own = {name: tensor for name, tensor in tensors.items() if ("mlp" in name) == bool(inside)}
        names = [name for name in json.loads(whole["tensor_names"]) if ("mlp" in name) == bool(inside)]
        file = f"model-{number + 1:05d}-of-00002.safetensors"
        save_file(
            own,
            folder / file,
            {"format": "pt", "tensor_names": json.dumps(names), **{name: whole[name] for name in names}},
        )
        placed.update(dict.fromkeys(own, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    assert torch.equal(logits(folder), logits(TORCHAO / "tiny-intx"))


# --- experts -----------------------------------------------------------------------------------------------------------------


def make_experts(folder: Path, dtype: str) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, vocab_size=64, num_experts=3, num_experts_per_tok=2, dtype=dtype,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)


EXPERTS = {
    "int8": INT8,
    "float8": {"_type": "Float8WeightOnlyConfig", "_version": 2, "_data": {}},
    "int4": {"_type": "Int4WeightOnlyConfig", "_version": 2, "_data": {"group_size": 32}},
    "int4-tiles": {"_type": "Int4WeightOnlyConfig", "_version": 2, "_data": {"group_size": 32, "int4_packing_format": "tile_packed_to_4d"}},
}  # fmt: skip


@pytest.mark.parametrize("kind", EXPERTS)
def test_stacks_of_experts_are_parameters(tmp_path: Path, kind: str) -> None:
    """transformers keeps all experts of a layer in one parameter, which torchao quantizes under its own name."""
    layer = "model.layers.0.mlp.experts"
    tensors: dict[str, torch.Tensor] = {}
    make_experts(tmp_path / "dense", "bfloat16")
    found = load_file(tmp_path / "dense" / "model.safetensors")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    names: dict[str, str] = {}
    for parameter, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
        dense = torch.stack([torch.cat([found.pop(f"{layer}.{e}.{part}.weight") for part in parts]) for e in range(3)])
        module = ModuleInfo(
            f"{layer}.{parameter}", "experts", tuple(dense.shape), "bfloat16", class_name="Qwen3MoeExperts"
        )
        layout = configs.layout_of(EXPERTS[kind], module, parameter)
        assert layout.algorithm is not None
        weight = algorithms.get(layout.algorithm)(dense, layout.scheme(), **layout.algorithm_options())
        assert (weight.to_dense(torch.float32) - dense.float()).abs().max() < 0.1 * dense.float().abs().max()
        tensors.update({f"{layer}.{name[1:]}": tensor.contiguous() for name, tensor in layout.encode(weight).items()})
        names[f"{layer}.{parameter}"] = layout.record
    assert f"{layer}._gate_up_proj_qdata" in tensors
    folder = tmp_path / "made"
    folder.mkdir()
    names.update(dict.fromkeys(found, '{"_type": "Tensor"}'))
    header = {"format": "pt", **names, "tensor_names": json.dumps(list(names))}
    save_file({**found, **tensors}, folder / "model.safetensors", header)
    quant_type = {
        "default": {
            "_type": "FqnToConfig",
            "_version": 1,
            "_data": {"fqn_to_config": {"re:.*experts.*": EXPERTS[kind]}},
        }
    }
    config["quantization_config"] = {"quant_method": "torchao", "quant_type": quant_type}
    (folder / "config.json").write_text(json.dumps(config))
    model: Any = anybit.load(folder)
    stacks = [entry for entry in model.anybit_plan.entries if entry.slot.kind == "experts"]
    assert [entry.action for entry in stacks] == ["packed", "packed"]
    assert (logits(folder) - logits(tmp_path / "dense")).abs().max() < 0.5
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == {*found, *tensors}
    assert all(same_bytes(saved[name], tensor) for name, tensor in tensors.items())
    assert metadata(tmp_path / "saved" / "model.safetensors") == header
    anybit.dequantize(folder, tmp_path / "again")
    assert (logits(tmp_path / "again") - logits(folder)).abs().max() < 0.1


def test_experts_apart_are_quantized_one_by_one(tmp_path: Path) -> None:
    make_experts(tmp_path / "dense", "float32")
    plan = anybit.quantize(tmp_path / "dense", tmp_path / "made", anybit.TorchAoConfig(INT8))
    assert {entry.slot.module: entry.action for entry in plan.entries}[
        "model.layers.0.mlp.experts.gate_up_proj"
    ] == "quantize"
    assert "model.layers.0.mlp.experts.2.up_proj._weight_qdata" in load_file(tmp_path / "made" / "model.safetensors")
    assert (logits(tmp_path / "made") - logits(tmp_path / "dense")).abs().max() < 0.05


# --- models that transformers 4 pickled --------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", OLD)
def test_pickles_are_read_on_request_only(variant: str) -> None:
    with pytest.raises(UnsafeFile, match="allow_pickle"):
        anybit.load(TORCHAO / variant)
    with pytest.raises(UnsafeFile, match=r"torchao\.|_rebuild_from_type"):
        Checkpoint.open(TORCHAO / variant, allow_pickle=True)
    assert anybit.inspect(TORCHAO / variant, allow_pickle=True).method == "torchao"


@pytest.mark.parametrize("variant", OLD)
def test_pickles_become_safetensors(variant: str, tmp_path: Path) -> None:
    """What transformers 5 refuses to load (a type that is text) loads, and is written so that it needs no pickle again."""
    model: Any = anybit.load(TORCHAO / variant, allow_pickle=True)
    model.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("*.bin"))
    assert torch.equal(logits(tmp_path / "saved"), logits(TORCHAO / variant, allow_pickle=True))
    before = json.loads((TORCHAO / variant / "config.json").read_text())["quantization_config"]
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"] == before


def test_old_weights_without_quantized_inputs_have_todays_form(tmp_path: Path) -> None:
    model: Any = anybit.load(TORCHAO / "legacy-bin-int8wo", allow_pickle=True)
    model.save_pretrained(tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    base = "model.layers.0.self_attn.q_proj._weight"
    assert {name: (tensors[f"{base}_{name}"].dtype, tensors[f"{base}_{name}"].shape) for name in ("qdata", "scale", "zero_point")} == {
        "qdata": (torch.int8, (128, 128)), "scale": (torch.bfloat16, (128, 1)), "zero_point": (torch.int8, (128, 1)),
    }  # fmt: skip
    assert json.loads(metadata(tmp_path / "saved" / "model.safetensors")[NAME])["_type"] == "Int8Tensor"


def repickled(tmp_path: Path, variant: str, change: Any) -> Path:
    """A copy of a pickled golden with the bytes of its data.pkl changed."""
    import zipfile

    folder = tmp_path / "changed"
    shutil.copytree(TORCHAO / variant, folder)
    with (
        zipfile.ZipFile(TORCHAO / variant / "pytorch_model.bin") as old,
        zipfile.ZipFile(folder / "pytorch_model.bin", "w") as new,
    ):
        for entry in old.infolist():
            content = old.read(entry)
            new.writestr(entry.filename, change(content) if entry.filename.endswith("data.pkl") else content)
    return folder


@pytest.mark.parametrize(
    ("old", "new", "error", "message"),
    [
        (b"PlainAQTTensorImpl", b"OtherAQTTensorImpl", NotRepresentable, "AffineQuantizedTensor of OtherAQTTensorImpl"),
        (b"ctorchao.dtypes.utils\nPlainLayout", b"cos\nsystem", UnsafeFile, "os.system"),
        (b"_int8_symm_per_token_reduced_range_quant", b"_int8_symm_per_token_something_new_quant", NotRepresentable, "something_new"),
        (b"int_data", b"int_dada", MissingTensor, "_weight_qdata"),
    ],
)  # fmt: skip
def test_pickles_of_another_kind(tmp_path: Path, old: bytes, new: bytes, error: type[Exception], message: str) -> None:
    def change(content: bytes) -> bytes:
        assert old in content
        return content.replace(old, new)

    folder = repickled(tmp_path, "tiny-old-int8dyn-bf16", change)
    with pytest.raises(error, match=message):
        anybit.load(folder, allow_pickle=True)


class Chain:
    """Pickled under a name of torchao's; ten ways lead from each link to the next."""

    def __init__(self, following: Any):
        self.__dict__.update({f"way{number}": following for number in range(10)})


Chain.__module__, Chain.__qualname__ = "torchao.links", "Chain"


def test_objects_that_refer_to_each_other_without_end_are_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys
    import types

    for name in ("torchao", "torchao.links"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["torchao.links"].Chain = Chain  # type: ignore[attr-defined]
    last = Chain(torch.ones(2))
    for _ in range(10):
        last = Chain(last)
    torch.save({"a": last}, tmp_path / "pytorch_model.bin")
    found = Checkpoint.open(tmp_path, allow_pickle=True, packages=("torchao",))
    assert len(found.tensors) == 10
    assert list(found.values) == ["a"]
    for _ in range(20):
        last = Chain(last)
    torch.save({"a": last}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CorruptFile, match="nests objects more than 16 deep"):
        Checkpoint.open(tmp_path, allow_pickle=True, packages=("torchao",))


def test_old_names_are_kept_in_the_configuration() -> None:
    given = {"quant_method": "torchao", "quant_type": "int4_weight_only", "quant_type_kwargs": {"group_size": 64}}
    config = anybit.TorchAoConfig.from_dict(given)
    assert config.quant_type == {"_type": "Int4WeightOnlyConfig", "_version": 1, "_data": {"group_size": 64}}
    assert {name: config.to_dict()[name] for name in given} == given
    config.update(quant_type=INT8)
    assert config.to_dict()["quant_type"] == {"default": INT8}


@pytest.mark.parametrize("variant", ["legacy-bin-int8wo", "tiny-old-int8dyn-bf16"])
def test_string_types_of_transformers_4_load(variant: str) -> None:
    """transformers 5.23 stops at them with an AssertionError ("Expected only one key 'default'")."""
    golden = TORCHAO / variant
    written = json.loads((golden / "config.json").read_text())["quantization_config"]
    assert isinstance(written["quant_type"], str)
    reference = load_file(golden / "reference.safetensors")
    model: Any = anybit.load(golden, allow_pickle=True)
    config = model.config.quantization_config
    assert config.quant_type["_type"] == LEGACY[written["quant_type"]]
    with torch.no_grad():
        error = (model(reference["input_ids"]).logits.float() - reference["logits"]).abs().max()
    assert error <= json.loads((golden / "fixture.json").read_text())["logits_atol"]
