"""Quantizing while loading with calibration data, as transformers does with GPTQConfig(dataset=...); what data a method needs."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import anybit
from anybit import AqlmConfig, AutoModelForCausalLM, AutoRoundConfig, AwqConfig, GPTQConfig, SpQRConfig, VptqConfig
from anybit.errors import CalibrationNeeded, ConfigError, InvalidOption

ROOT = Path(__file__).parent.parent
TINY = ROOT / "examples" / "tiny-llama"
GPTQ = ROOT / "tests" / "golden" / "gptq" / "w4_g32_asym_desc_act"
TEXT = (ROOT / "examples" / "data" / "calibration.txt").read_text(encoding="utf-8")[:12000]
DENSE = ["lm_head", *(f"layers.{number}" for number in range(1, 6))]  # one block is enough here
KEPT = {rf"-:.*layers\.{number}\..*": {} for number in range(1, 6)}
Q = "model.layers.0.self_attn.q_proj"


def vptq() -> VptqConfig:
    own = {"vector_lens": [-1, 8], "num_centroids": [-1, 16], "num_res_centroids": [-1, -1]}
    return VptqConfig(shared_layer_config={"*": own})


def weight(model: Any) -> torch.Tensor:
    return model.get_submodule(Q).dequantize().float()  # type: ignore[no-any-return]


@pytest.mark.parametrize("make", [GPTQConfig, AwqConfig])
def test_a_dataset_is_run_while_loading(make: Any, tmp_path: Path) -> None:
    tokenizer = anybit.AutoTokenizer.from_pretrained(str(TINY))
    options: dict[str, Any] = {"bits": 4, "group_size": 64, "dynamic": KEPT, "model_seqlen": 64}
    config = make(**options, dataset=[TEXT], tokenizer=tokenizer)
    model: Any = AutoModelForCausalLM.from_pretrained(str(TINY), quantization_config=config)
    anybit.quantize(TINY, tmp_path / "made", make(**options), calibration=[TEXT])
    assert torch.equal(weight(model), weight(anybit.load(tmp_path / "made")))
    rounded: Any = anybit.load(TINY, make(**options))
    assert not torch.equal(weight(model), weight(rounded))
    assert model.name_or_path == str(TINY)
    model.save_pretrained(tmp_path / "saved")
    saved, made = (load_file(tmp_path / name / "model.safetensors") for name in ("saved", "made"))
    assert saved.keys() == made.keys()
    assert all(torch.equal(saved[name], made[name]) for name in made)
    stored = model.config.quantization_config.to_dict()
    assert stored.get("dataset") is None
    assert config.dataset == [TEXT]  # the caller's is left alone


def test_the_temporary_checkpoint_goes_with_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    config = GPTQConfig(bits=4, group_size=64, dynamic=KEPT)
    ids = torch.arange(64).view(2, 32)
    model: Any = anybit.load(TINY, config, calibration=ids)
    with torch.no_grad():
        assert bool(torch.isfinite(model(ids).logits).all())
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith("anybit-calibrated-")]
    del model
    gc.collect()
    assert not [file.name for file in tmp_path.iterdir() if file.name.startswith("anybit-calibrated-")]


def test_methods_that_need_data_load_with_it() -> None:
    config = SpQRConfig(modules_to_not_convert=[f"{name}.weight" for name in DENSE])
    ids = torch.randint(0, 4096, (4, 64), generator=torch.Generator().manual_seed(0))
    model: Any = AutoModelForCausalLM.from_pretrained(str(TINY), quantization_config=config, calibration=ids)
    assert type(model.anybit_plan.entries[1].parts[0].layout).__name__ == "SpqrLayout"


@pytest.mark.parametrize("make", [SpQRConfig, AqlmConfig, vptq], ids=["spqr", "aqlm", "vptq"])
def test_a_plan_says_that_data_is_needed(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anybit.containers.Checkpoint.read", None)  # nothing is read
    for run in (
        lambda: anybit.plan(TINY, make()),
        lambda: anybit.load(TINY, make()),
        lambda: anybit.quantize(TINY, tmp_path / "out", make()),
    ):
        with pytest.raises(CalibrationNeeded, match=r"model\.layers\.0.* and \d+ more.*Pass calibration="):
            run()
    assert list(tmp_path.iterdir()) == []


def test_what_a_dataset_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'c4', which would have to be downloaded"):
        anybit.load(TINY, GPTQConfig(bits=4, dataset="c4"))
    with pytest.raises(ConfigError, match="already quantized"):
        anybit.load(GPTQ, GPTQConfig(bits=4), calibration=[TEXT])
    with pytest.raises(InvalidOption, match="less than one row"):
        anybit.load(TINY, GPTQConfig(bits=4, dataset=["a few words"]))
    anybit.load(GPTQ, GPTQConfig(bits=4, dataset=[TEXT]))  # only loading attributes count here


# --- AutoRound's own settings ---------------------------------------------------------------------------------------------------


def test_autorounds_settings_reach_the_algorithm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from anybit.algorithms import autoround

    seen: list[dict[str, Any]] = []
    tune = autoround.tune

    def listening(roundings: Any, loss: Any, samples: int, **options: Any) -> Any:
        seen.append({"samples": samples, **options})
        return tune(roundings, loss, samples, **options)

    monkeypatch.setattr(autoround, "tune", listening)
    extra = {rf".*layers\.{number}\..*": {"bits": 16} for number in range(1, 6)}
    config = AutoRoundConfig(bits=4, group_size=64, iters=3, nsamples=5, seqlen=48, batch_size=2, extra_config=extra)
    anybit.quantize(TINY, tmp_path / "out", config, calibration=[TEXT])
    assert seen[0] == {"samples": 5, "steps": 3, "batch": 2}
    made = anybit.AutoQuantizationConfig.from_pretrained(str(tmp_path / "out"))
    assert made.iters == 3
    assert config.iters == 3
    anybit.quantize(TINY, tmp_path / "data-free", AutoRoundConfig(bits=4, group_size=64, extra_config=extra))
    assert anybit.AutoQuantizationConfig.from_pretrained(str(tmp_path / "data-free")).iters == 0
    with pytest.raises(ConfigError, match="iters is 0"):
        anybit.quantize(TINY, tmp_path / "x", AutoRoundConfig(bits=4, iters=0), calibration=[TEXT])
    with pytest.raises(InvalidOption, match="nsamples"):
        AutoRoundConfig(bits=4, nsamples=-1)


# --- numbers that no algorithm can use --------------------------------------------------------------------------------------------


def test_activations_that_are_not_finite_are_named(tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    dense.mkdir()
    for file in TINY.iterdir():
        if file.name != "model.safetensors":
            (dense / file.name).write_bytes(file.read_bytes())
    tensors = load_file(TINY / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"][3] = float("nan")
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidOption, match=r"model\.layers\.0 gives numbers that are not finite"):
        anybit.quantize(dense, tmp_path / "out", GPTQConfig(bits=4, group_size=64), calibration=torch.arange(64)[None])
    assert not (tmp_path / "out").exists()


def test_inputs_that_are_all_alike_are_damped(tmp_path: Path) -> None:
    """One token again and again: a second moment of rank one, which has no inverse."""
    config = GPTQConfig(bits=4, group_size=64, dynamic=KEPT)
    anybit.quantize(TINY, tmp_path / "out", config, calibration=torch.full((4, 16), 7))
    assert bool(torch.isfinite(weight(anybit.load(tmp_path / "out"))).all())
