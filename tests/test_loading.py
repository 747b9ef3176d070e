"""Where packed models live and what can be done with them: devices, offloading, compile, copies, training, dtypes."""

import copy
import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import anybit
from anybit import AutoModelForCausalLM, BitsAndBytesConfig, GPTQConfig
from anybit.errors import ConfigError, InvalidOption, UnsafeFile
from anybit.modules import PackedWeight, QuantEmbedding, QuantLinear, TiedLinear

ROOT = Path(__file__).parent.parent
TINY = ROOT / "examples" / "tiny-llama"
NF4 = ROOT / "tests" / "golden" / "bitsandbytes" / "nf4_double_quant"
GPTQ = ROOT / "tests" / "golden" / "gptq" / "w4_g32_asym_desc_act"
IDS = torch.arange(24).view(2, 12) * 5 % 64


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(IDS).logits
    return logits


@pytest.fixture(scope="module")
def nf4() -> Any:
    return anybit.load(NF4)


# --- devices --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, torch.device("cpu"), "sequential"])
def test_device_maps_that_mean_the_cpu(device_map: Any, nf4: Any) -> None:
    model = anybit.load(NF4, device_map=device_map)
    assert torch.equal(logits_of(model), logits_of(nf4))


def test_packed_weights_offloaded_to_disk(nf4: Any, tmp_path: Path) -> None:
    layers = {f"model.layers.{number}": "disk" for number in range(nf4.config.num_hidden_layers)}
    device_map = {
        "model.embed_tokens": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
        **layers,
    }
    model: Any = anybit.load(NF4, device_map=device_map, offload_folder=str(tmp_path / "offload"))
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.packed[0].device.type == "meta"
    assert list((tmp_path / "offload").iterdir())
    assert torch.equal(logits_of(model), logits_of(nf4))
    assert {entry.device for entry in model.anybit_plan.entries if ".layers." in entry.slot.module} == {"disk"}
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits_of(anybit.load(tmp_path / "saved")), logits_of(nf4))


def test_a_map_with_a_hole_names_the_module() -> None:
    with pytest.raises(InvalidOption, match=r"device_map places no device for 'lm_head'"):
        anybit.load(NF4, device_map={"model": "cpu", "other": "disk"})


def test_a_device_that_does_not_exist() -> None:
    with pytest.raises(InvalidOption, match=r"'gpu' is no device"):
        anybit.load(NF4, device_map="gpu")


# --- what a model can do ---------------------------------------------------------------------------------------------------


def test_the_whole_model_compiles_without_graph_breaks(nf4: Any) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(nf4, fullgraph=True, backend="aot_eager")
    assert (logits_of(compiled) - logits_of(nf4)).abs().max() < 0.05
    torch._dynamo.reset()


def test_copies_share_nothing_and_agree(nf4: Any) -> None:
    twin = copy.deepcopy(nf4)
    wanted = logits_of(nf4)
    assert torch.equal(logits_of(twin), wanted)
    next(module for module in twin.modules() if isinstance(module, PackedWeight)).packed[0].data.zero_()
    assert not torch.equal(logits_of(twin), wanted)
    assert torch.equal(logits_of(nf4), wanted)
    assert twin.save_pretrained.args == (twin,)  # bound to the copy, not to the original


def test_models_survive_pickling(nf4: Any, tmp_path: Path) -> None:
    again = pickle.loads(pickle.dumps(nf4))
    assert torch.equal(logits_of(again), logits_of(nf4))
    again.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").read_bytes() == (NF4 / "model.safetensors").read_bytes()


def test_a_state_dict_has_the_checkpoints_names(nf4: Any) -> None:
    from anybit.containers import Checkpoint

    assert set(nf4.state_dict()) == set(Checkpoint.open(NF4).tensors)
    other: Any = anybit.load(NF4)
    other.load_state_dict(nf4.state_dict())
    assert torch.equal(logits_of(other), logits_of(nf4))


def test_casting_a_model_leaves_packed_bytes_alone() -> None:
    model: Any = anybit.load(GPTQ)
    layer = model.model.layers[0].self_attn.q_proj
    before = [tensor.clone() for tensor in layer.packed]
    torch.nn.Module.float(model)  # transformers refuses model.float() for quantized models
    assert model.model.norm.weight.dtype == torch.float32
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(before, layer.packed, strict=True))
    assert logits_of(model).dtype == torch.float32


def test_layers_are_what_wrappers_expect(nf4: Any) -> None:
    layer = nf4.model.layers[0].self_attn.q_proj
    assert isinstance(layer, QuantLinear)
    assert isinstance(layer, torch.nn.Linear)
    assert layer.weight.shape == (layer.out_features, layer.in_features)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.weight.device.type == "cpu"
    assert layer.dequantize().shape == layer.weight.shape
    x = torch.randn(3, layer.in_features, dtype=torch.bfloat16)
    assert torch.equal(torch.nn.functional.linear(x, layer.weight, layer.bias), layer(x))
    with pytest.raises(anybit.errors.NoKernel, match=r"dequantize\(\) gives the"):
        layer.weight + 1


def test_footprints_count_packed_bytes(nf4: Any) -> None:
    dense = transformers.AutoModelForCausalLM.from_config(nf4.config).get_memory_footprint()
    plan = anybit.explain(nf4)
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in nf4.buffers())
    assert nf4.get_memory_footprint() == plan.bytes_in_memory + buffers
    assert nf4.get_memory_footprint() < dense


def test_lora_trains_and_the_loss_falls() -> None:
    peft = pytest.importorskip("peft")
    for path, options in ((GPTQ, {}), (TINY, {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)})):
        torch.manual_seed(0)
        model: Any = anybit.load(path, dtype=torch.float32, **options)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
        tuned = peft.get_peft_model(model, config)
        optimizer = torch.optim.AdamW([tensor for tensor in tuned.parameters() if tensor.requires_grad], lr=1e-2)
        losses = []
        for _ in range(6):
            loss = tuned(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 0.05, losses


def test_tied_embeddings_share_one_packed_table(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    model: Any = anybit.load(tmp_path / "dense", GPTQConfig(bits=8, group_size=32), dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight

    from anybit.engine.materialize import tie
    from anybit.modules import Part

    layout = replace(model.model.layers[0].self_attn.q_proj.parts[0].layout, shape=(128, 64))
    dense = model.model.embed_tokens.weight.detach()
    from anybit import algorithms

    weight = algorithms.get(layout.algorithm)(dense, layout.scheme(), **layout.algorithm_options())
    table = QuantEmbedding(128, 64)
    table.set_weights((Part(layout),), [weight])
    model.model.embed_tokens = table
    tie(model, model.anybit_plan)
    assert isinstance(model.lm_head, TiedLinear)
    assert model.lm_head.owner is model.model.embed_tokens
    x = torch.randn(2, 64)
    assert (model.lm_head(x) - x @ weight.to_dense().T).abs().max() < 1e-4
    twin = copy.deepcopy(model)
    assert twin.lm_head.owner is twin.model.embed_tokens


# --- arguments -------------------------------------------------------------------------------------------------------------


def test_a_dense_checkpoint_without_a_configuration_stays_dense() -> None:
    model = AutoModelForCausalLM.from_pretrained(TINY)
    assert type(model) is transformers.LlamaForCausalLM
    assert not any(isinstance(module, PackedWeight) for module in model.modules())


def test_configurations_of_transformers_are_taken() -> None:
    theirs = transformers.BitsAndBytesConfig(load_in_8bit=True)
    model: Any = AutoModelForCausalLM.from_pretrained(TINY, quantization_config=theirs)
    assert model.hf_quantizer.quantization_config.load_in_8bit


def test_another_configuration_for_a_quantized_checkpoint_is_refused() -> None:
    with pytest.raises(ConfigError, match="quantized with GPTQConfig, but a BitsAndBytesConfig was passed"):
        AutoModelForCausalLM.from_pretrained(GPTQ, quantization_config=BitsAndBytesConfig(load_in_4bit=True))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"load_in_4bit": True}, InvalidOption, "BitsAndBytesConfig"),
        ({"trust_remote_code": True}, UnsafeFile, "never"),
        ({"dtype": "bfloat17"}, InvalidOption, "did you mean 'bfloat16'"),
        ({"divice_map": "cpu"}, InvalidOption, "divice_map"),
    ],
)
def test_arguments_that_cannot_be_meant(arguments: dict[str, Any], error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        AutoModelForCausalLM.from_pretrained(GPTQ, **arguments)


def test_the_backend_is_checked_before_any_weight_is_read(tmp_path: Path) -> None:
    """The shard is unreadable: whoever touches it fails otherwise than by the environment's answer."""
    (tmp_path / "config.json").write_text((GPTQ / "config.json").read_text())
    (tmp_path / "model.safetensors").mkdir()
    asked = []

    class Stop(Exception):
        pass

    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        asked.append(kwargs)
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(anybit.GptqHfQuantizer, "validate_environment", refuse)
        with pytest.raises(Stop):
            anybit.load(tmp_path, device_map="cpu")
    assert asked[0]["device_map"] == "cpu"
    with pytest.raises(anybit.errors.CheckpointError, match=r"model\.safetensors"):
        anybit.load(tmp_path)


def test_plan_predicts_what_load_does() -> None:
    planned = anybit.plan(GPTQ)
    model: Any = anybit.load(GPTQ)
    assert planned.to_dict() == model.anybit_plan.to_dict()
    held = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    assert planned.bytes_in_memory == held
    stored = sum(file.stat().st_size for file in GPTQ.glob("model*.safetensors"))
    assert stored - 100_000 < planned.bytes_on_disk < stored  # headers aside
    assert all(entry["kernel"] for entry in planned.to_dict()["modules"] if entry["action"] == "packed")


PEAK = """
import json, sys
import torch, transformers
from transformers import LlamaForCausalLM
import anybit, anybit.engine.save
from anybit._memory import peak_resident_bytes
planned = anybit.plan(sys.argv[1])
before = peak_resident_bytes()
model = anybit.load(sys.argv[1])
print(json.dumps([peak_resident_bytes() - before, planned.peak_bytes]))
"""


def test_peak_memory_is_predicted_within_a_tenth(tmp_path: Path) -> None:
    from anybit.testing.goldens import Golden
    from anybit.testing.memory import ENLARGED, enlarged_checkpoint

    sizes = {**ENLARGED, "num_hidden_layers": 12}
    enlarged_checkpoint(Golden(ROOT / "tests" / "golden" / "gptq" / "w4_g128_sym"), tmp_path / "large", sizes)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "large")], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    measured, predicted = json.loads(done.stdout.splitlines()[-1])
    assert abs(measured - predicted) <= 0.1 * predicted, f"measured {measured >> 20} MB, predicted {predicted >> 20} MB"


def test_a_saved_checkpoint_is_the_file_that_was_loaded(tmp_path: Path) -> None:
    for folder in (GPTQ, NF4, ROOT / "tests" / "golden" / "awq" / "w4_g128_zp_gemm"):
        model: Any = anybit.load(folder)
        model.save_pretrained(tmp_path / folder.name)
        for name in ("model.safetensors", "config.json"):
            assert (tmp_path / folder.name / name).read_bytes() == (folder / name).read_bytes(), (folder.name, name)


def test_shards_stay_as_they_were_or_become_what_was_asked_for(tmp_path: Path) -> None:
    anybit.quantize(TINY, tmp_path / "shards", GPTQConfig(bits=4, group_size=64), max_shard_size="1MB")
    shards = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 3
    model: Any = anybit.load(tmp_path / "shards")
    model.save_pretrained(tmp_path / "same")
    for name in [*shards, "model.safetensors.index.json", "config.json"]:
        assert (tmp_path / "same" / name).read_bytes() == (tmp_path / "shards" / name).read_bytes(), name
    model.save_pretrained(tmp_path / "one", max_shard_size="1GB")
    assert [path.name for path in (tmp_path / "one").glob("*.safetensors")] == ["model.safetensors"]
    assert torch.equal(logits_of(anybit.load(tmp_path / "one")), logits_of(model))


def test_a_new_head_is_initialised_only_when_asked_for(tmp_path: Path) -> None:
    with pytest.raises(anybit.errors.MissingTensor, match=r"'score\.weight'.*strict=False"):
        anybit.AutoModelForSequenceClassification.from_pretrained(
            TINY, quantization_config=GPTQConfig(bits=4, group_size=64)
        )
    model: Any = anybit.AutoModelForSequenceClassification.from_pretrained(
        TINY, quantization_config=GPTQConfig(bits=4, group_size=64), strict=False, num_labels=3
    )
    assert model.score.weight.shape[0] == 3
    assert 0 < model.score.weight.float().std() < 1
    assert model.anybit_plan.missing == ["score.weight"]
    assert any("score.weight" in note for note in model.anybit_plan.notes)
    model.save_pretrained(tmp_path / "head")
    again: Any = anybit.AutoModelForSequenceClassification.from_pretrained(tmp_path / "head")
    assert torch.equal(again.score.weight, model.score.weight)


def test_a_configuration_can_ask_for_dense_weights() -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(
        next((ROOT / "tests" / "golden" / "fp8").iterdir()),
        quantization_config=anybit.FineGrainedFP8Config(dequantize=True),
    )
    assert not any(isinstance(module, PackedWeight) for module in model.modules())
    assert torch.isfinite(logits_of(model)).all()
