"""Configurations that lie or say little: the tensors decide, the plan says what was decided, and every key is kept on save."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import anybit
from anybit import CompressedTensorsConfig
from anybit.containers.info import TensorInfo
from anybit.errors import ConfigError, InvalidOption
from anybit.methods.modelopt import ModelOptConfig
from anybit.quantizers import AutoHfQuantizer, AutoQuantizationConfig
from anybit.weight import ModuleInfo

GOLDEN = Path(__file__).parent / "golden"
E4M3 = torch.float8_e4m3fn
IDS = torch.tensor([[3, 17, 60, 4, 99, 1, 0, 42]])


def edited(source: Path, target: Path, **changed: Any) -> Path:
    """A copy of a golden with other keys in its quantization_config; None removes a key, and the side file goes."""
    shutil.copytree(source, target)
    (target / "hf_quant_config.json").unlink(missing_ok=True)
    own = quantization(target)
    own.update(changed)
    write(target, {name: value for name, value in own.items() if name not in changed or value is not None})
    return target


def quantization(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


def write(folder: Path, own: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": own}))


def change_tensors(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def logits(folder: Path) -> torch.Tensor:
    model: Any = anybit.load(folder)
    with torch.no_grad():
        found: torch.Tensor = model(IDS % model.config.get_text_config().vocab_size).logits
    return found


def saved(folder: Path, target: Path) -> dict[str, Any]:
    """The quantization_config of a checkpoint that was loaded and saved."""
    anybit.load(folder).save_pretrained(target)  # type: ignore[operator]
    return quantization(target)


# --- one method inside another -------------------------------------------------------------------------------------------------


def test_nvfp4_experts_under_mxfp8() -> None:
    """`quant_method` says mxfp8, `moe_quant_algo` NVFP4: the tensors of each module decide."""
    stored = {
        "weight": torch.randint(0, 256, (32, 32), dtype=torch.uint8),
        "weight_scale": (torch.rand(32, 4) + 0.5).to(E4M3),
        "weight_scale_2": torch.tensor(0.01),
        "input_scale": torch.tensor(0.02),
    }
    dense = {"weight": torch.randn(32, 64).to(E4M3), "weight_scale_inv": torch.full((32, 2), 120, dtype=torch.uint8)}
    quantizer: Any = AutoHfQuantizer.from_config({"quant_method": "mxfp8", "moe_quant_algo": "NVFP4"})
    found = {}
    for name, tensors in (("mlp.experts.3.up_proj", stored), ("self_attn.q_proj", dense)):
        module = ModuleInfo(f"model.layers.0.{name}", "linear", (32, 64), "bfloat16")
        infos = {
            key: TensorInfo(key, str(one.dtype)[6:], tuple(one.shape), one.nbytes, "f") for key, one in tensors.items()
        }
        layout = quantizer.layout_of(module, infos, tensors.__getitem__)
        found[name] = layout, layout.decode(tensors)
    expert, attention = found.values()
    assert type(expert[0]).__name__ == "NvFp4Layout"
    assert expert[1].activation is not None
    assert expert[1].activation.rule == "nvfp4"
    assert type(attention[0]).__name__ != "NvFp4Layout"
    assert torch.equal(attention[1].to_dense(torch.float32), dense["weight"].float() * 2.0 ** (120 - 127))
    assert any("NvFp4Layout although quant_method is 'mxfp8'" in what for what in quantizer.decisions)
    assert quantizer.quantization_config.to_dict()["moe_quant_algo"] == "NVFP4"


@pytest.mark.parametrize("golden", ["fp8", "nvfp4"])
def test_modelopt_without_method_and_producer(golden: str, tmp_path: Path) -> None:
    source = GOLDEN / "modelopt" / golden
    bare = edited(source, tmp_path / "bare", quant_method=None, producer=None)
    assert not {"quant_method", "producer"} & quantization(bare).keys()
    assert isinstance(AutoQuantizationConfig.from_pretrained(bare), ModelOptConfig)
    assert torch.equal(logits(bare), logits(source))


def test_modelopt_names_its_exclusions_as_the_file_does(tmp_path: Path) -> None:
    names = ["lm_head", "model.embed_tokens"]
    older = edited(GOLDEN / "modelopt" / "fp8", tmp_path / "older", ignore=None, exclude_modules=names)
    written = saved(older, tmp_path / "again")
    assert written["exclude_modules"] == names
    assert "ignore" not in written
    assert saved(GOLDEN / "modelopt" / "fp8", tmp_path / "newer")["ignore"] == names
    config = ModelOptConfig.from_dict({"quant_algo": "FP8", "exclude_modules": names})
    assert config.ignore == names
    assert ModelOptConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_modelopt_config_json_counts_more_than_the_side_file(tmp_path: Path) -> None:
    folder = edited(GOLDEN / "modelopt" / "fp8", tmp_path / "both", ignore=None, exclude_modules=["lm_head"])
    shutil.copy(GOLDEN / "modelopt" / "fp8" / "hf_quant_config.json", folder)
    config = AutoQuantizationConfig.from_pretrained(folder)
    assert config.ignore == ["lm_head"]
    assert config.to_dict()["exclude_modules"] == ["lm_head"]


# --- a cache that is only a word -----------------------------------------------------------------------------------------------

OBJECT = {"dynamic": False, "num_bits": 8, "type": "float"}
# method: (golden, names of the scales under attention, the same cache in other words)
CACHES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "fp8": ("fp8/block128_awkward", "{}_scale", {"kv_cache_quant_algo": "FP8"}),
    "mxfp8": ("mxfp8/u8_scales", "{}_scale", {"kv_cache_quant_algo": "FP8"}),
    "modelopt": ("modelopt/fp8", "{0}_proj.{0}_scale", {"kv_cache_scheme": OBJECT}),
    "compressed-tensors": ("compressed-tensors/w3a16-sym-g64", "{}_scale", {"kv_cache_scheme": OBJECT}),
}


def with_cache(method: str, target: Path, scales: bool = True, **named: Any) -> Path:
    source, pattern, _ = CACHES[method]
    folder = edited(GOLDEN / source, target, **named)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        for layer in {name.split(".self_attn.")[0] for name in tensors if ".self_attn." in name}:
            for own in "kv":
                tensors[f"{layer}.self_attn.{pattern.format(own)}"] = torch.tensor([0.05])

    if scales:
        change_tensors(folder, add)
    return folder


@pytest.mark.parametrize("word", ["fp8", "FP8_E4M3"])
@pytest.mark.parametrize("method", CACHES)
def test_a_cache_that_is_a_word(method: str, word: str, tmp_path: Path) -> None:
    folder = with_cache(method, tmp_path / "word", kv_cache_scheme=word)
    found = logits(folder)
    assert torch.equal(found, logits(with_cache(method, tmp_path / "object", **CACHES[method][2])))
    assert not torch.equal(found, logits(GOLDEN / CACHES[method][0]))
    assert saved(folder, tmp_path / "again")["kv_cache_scheme"] == word
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert set(before) == set(after)
    assert torch.equal(logits(tmp_path / "again"), found)


@pytest.mark.parametrize("method", CACHES)
def test_a_word_for_a_cache_that_is_not_fp8(method: str, tmp_path: Path) -> None:
    folder = with_cache(method, tmp_path / "word", kv_cache_scheme="int8")
    assert any("not used" in note and "int8" in note.lower() for note in anybit.plan(folder).notes)
    assert torch.equal(logits(folder), logits(GOLDEN / CACHES[method][0]))


def test_a_word_for_a_cache_without_scales(tmp_path: Path) -> None:
    folder = with_cache("compressed-tensors", tmp_path / "word", scales=False, kv_cache_scheme="fp8")
    assert any("kv_cache_scheme is 'fp8'; no scale of it is stored" in note for note in anybit.plan(folder).notes)
    assert torch.equal(logits(folder), logits(GOLDEN / CACHES["compressed-tensors"][0]))


def test_a_scale_for_each_head_under_a_word(tmp_path: Path) -> None:
    folder = with_cache("compressed-tensors", tmp_path / "word", kv_cache_scheme="fp8")
    heads = json.loads((folder / "config.json").read_text())["num_key_value_heads"]

    def by_head(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(("k_scale", "v_scale"))]:
            tensors[name] = torch.full((heads, 1, 1), 0.05)

    whole = logits(folder)
    change_tensors(folder, by_head)
    assert torch.equal(logits(folder), whole)


# --- nested --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small dense model of two parts, one for images and one for text."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=128, hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=16, patch_size=8,
        projection_dim=64,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("composed") / "dense"
    model = transformers.LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


NESTED: dict[str, dict[str, Any]] = {
    "fp8": {"quant_method": "fp8"},
    "mxfp8": {"quant_method": "mxfp8"},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "MXFP8"},
    "compressed-tensors": {
        "quant_method": "compressed-tensors", "config_groups": {"FP8_DYNAMIC": ["Linear"]}, "ignore": ["lm_head"],
    },
}  # fmt: skip


@pytest.mark.parametrize("method", NESTED)
def test_nested_in_text_config(method: str, composed: Path, tmp_path: Path) -> None:
    anybit.quantize(composed, tmp_path / "outside", NESTED[method])
    shutil.copytree(tmp_path / "outside", tmp_path / "inside")
    file = tmp_path / "inside" / "config.json"
    config = json.loads(file.read_text())
    config["text_config"]["quantization_config"] = config.pop("quantization_config")
    file.write_text(json.dumps(config))
    plans = [anybit.plan(tmp_path / place) for place in ("outside", "inside")]
    packed = [[entry.slot.module for entry in plan.entries if entry.action == "packed"] for plan in plans]
    assert packed[0] == packed[1] != []
    assert torch.equal(logits(tmp_path / "inside"), logits(tmp_path / "outside"))
    anybit.load(tmp_path / "inside").save_pretrained(tmp_path / "again")  # type: ignore[operator]
    assert torch.equal(logits(tmp_path / "again"), logits(tmp_path / "outside"))


# --- bits as a map -------------------------------------------------------------------------------------------------------------

PACKED = GOLDEN / "compressed-tensors" / "w3a16-sym-g64"


def with_bits(target: Path, bits: Any, source: Path = PACKED) -> Path:
    groups = quantization(source)["config_groups"]
    for group in groups.values():
        group["weights"]["num_bits"] = bits
    return edited(source, target, config_groups=groups)


def test_bits_as_a_map_are_told_from_the_codes(tmp_path: Path) -> None:
    bits = {"default": 8, "layers": {"re:.*proj": 3}}
    folder = with_bits(tmp_path / "map", bits)
    plan = anybit.plan(folder)
    assert any("num_bits" in note and "is a map; the stored codes have 3 bits" in note for note in plan.notes)
    assert torch.equal(logits(folder), logits(PACKED))
    written = saved(folder, tmp_path / "again")
    assert [group["weights"]["num_bits"] for group in written["config_groups"].values()] == [bits]
    assert torch.equal(logits(tmp_path / "again"), logits(PACKED))


def test_bits_as_a_map_that_the_codes_contradict(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"num_bits.*is a map with 4, 8; tensor '.*weight_packed'.*has none of these"):
        anybit.plan(with_bits(tmp_path / "map", {"a": 4, "b": 8}))


def test_bits_as_a_map_that_the_codes_leave_open() -> None:
    """A byte holds 4 bits as well as 8."""
    weights = {"num_bits": {"a": 4, "b": 8}, "strategy": "channel"}
    inputs = {"num_bits": 8, "strategy": "token", "dynamic": True}
    config = CompressedTensorsConfig(
        config_groups={"g": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}}
    )
    quantizer: Any = AutoHfQuantizer.from_config(config)
    stored = {
        "weight": TensorInfo("model.q.weight", "int8", (8, 32), 256, "f"),
        "weight_scale": TensorInfo("model.q.weight_scale", "bfloat16", (8, 1), 16, "f"),
    }
    with pytest.raises(ConfigError, match="could have 4 or 8"):
        quantizer.layout_of(ModuleInfo("model.q", "linear", (8, 32), "bfloat16"), stored, None)
    with pytest.raises(InvalidOption, match="make one group for each number of bits"):
        AutoHfQuantizer.from_config(config, pre_quantized=False)


@pytest.mark.parametrize(
    ("weights", "inputs"),
    [({"num_bits": {"a": "four"}}, None), ({"num_bits": {}}, None), ({"num_bits": 4}, {"num_bits": {"a": 8}})],
)
def test_maps_that_nothing_stored_could_settle(weights: dict[str, Any], inputs: dict[str, Any] | None) -> None:
    with pytest.raises(InvalidOption, match=r"num_bits is \{"):
        CompressedTensorsConfig(
            config_groups={"g": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}}
        )


# --- what peers load silently wrong --------------------------------------------------------------------------------------------

METHODS = (
    "fp8", "mxfp8", "fbgemm_fp8", "mxfp4", "nvfp4", "modelopt", "fp_quant", "fouroversix", "compressed-tensors", "quark",
)  # fmt: skip
VARIANTS = [f"{method}/{folder.name}" for method in METHODS for folder in sorted((GOLDEN / method).iterdir())]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_saved_from_the_cpu_loads_again(variant: str, tmp_path: Path) -> None:
    """transformers makes FP8 and MXFP4 dense on the CPU, saves codes without their configuration, and reloads nonsense."""
    source = GOLDEN / variant
    model: Any = anybit.load(source, device_map="cpu")
    model.save_pretrained(tmp_path / "again")
    assert AutoQuantizationConfig.from_pretrained(tmp_path / "again") == model.config.quantization_config
    again = anybit.load(tmp_path / "again")
    actions = [[(entry.slot.module, entry.layout) for entry in one.anybit_plan.entries] for one in (model, again)]
    assert actions[0] == actions[1]
    assert torch.equal(logits(tmp_path / "again"), logits(source))
