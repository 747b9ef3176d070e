"""SmoothQuant end to end: outliers planted in a trained model's inputs, W8A8 with and without it; errors that progress tells."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import anybit
from anybit import CompressedTensorsConfig, GPTQConfig

ROOT = Path(__file__).parent.parent
TINY = ROOT / "examples" / "tiny-llama"
CALIBRATION = ROOT / "examples" / "data" / "calibration.txt"
EVALUATION = (ROOT / "examples" / "data" / "evaluation.txt").read_text(encoding="utf-8")
FACTOR = 64.0
OPTIONS: dict[str, Any] = {"calibration": CALIBRATION, "samples": 8, "sequence_length": 64}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, with four channels of every norm's output sixty-four times as large, and their columns as much smaller.

    A power of two, so the model computes exactly what it did; but inputs now have outliers in fixed channels, as large models do.
    """
    folder = tmp_path_factory.mktemp("planted") / "dense"
    folder.mkdir()
    for file in TINY.iterdir():
        if file.name != "model.safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(TINY / "model.safetensors")
    channels = [3, 77, 150, 201]
    for number in range(6):
        start = f"model.layers.{number}."
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            tensors[f"{start}{norm}.weight"][channels] *= FACTOR
            for reader in readers:
                tensors[f"{start}{reader}.weight"][:, channels] /= FACTOR
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def w8a8() -> CompressedTensorsConfig:
    return CompressedTensorsConfig(config_groups={"INT8": ["Linear"]}, ignore=["lm_head"])


def kl_of(folder: Path) -> float:
    return float(anybit.evaluate(folder, EVALUATION, reference=TINY, max_tokens=700).kl)


def test_planted_outliers_change_nothing_and_hurt_int8(planted: Path, tmp_path: Path) -> None:
    assert kl_of(planted) < 1e-6
    anybit.quantize(TINY, tmp_path / "calm", w8a8())
    anybit.quantize(planted, tmp_path / "plain", w8a8())
    plan = anybit.quantize(planted, tmp_path / "smooth", w8a8(), algorithm="smoothquant", **OPTIONS)
    calm, plain, smooth = (kl_of(tmp_path / name) for name in ("calm", "plain", "smooth"))
    assert plain > 5 * calm
    assert smooth < 0.3 * plain  # outliers are out of the inputs
    reasons = {
        entry.slot.module.rpartition(".")[2]: entry.reason for entry in plan.entries if entry.action == "quantize"
    }
    assert "smoothquant: inverse scales in model.layers.5.input_layernorm" in reasons["q_proj"]
    assert "smoothquant: inverse scales in model.layers.5.mlp.up_proj" in reasons["down_proj"]
    assert "not scaled" in reasons["o_proj"]  # heads share values: no rows are its columns
    stored = load_file(tmp_path / "smooth" / "model.safetensors")
    gain = stored["model.layers.0.input_layernorm.weight"].float()
    before = load_file(planted / "model.safetensors")["model.layers.0.input_layernorm.weight"].float()
    assert (gain[[3, 77, 150, 201]] / before[[3, 77, 150, 201]]).abs().max() < 0.5


def test_smoothquant_goes_before_gptq(planted: Path, tmp_path: Path) -> None:
    anybit.quantize(planted, tmp_path / "plain", w8a8(), algorithm="gptq", **OPTIONS)
    anybit.quantize(planted, tmp_path / "smooth", w8a8(), algorithm="smoothquant+gptq", **OPTIONS)
    assert kl_of(tmp_path / "smooth") < 0.5 * kl_of(tmp_path / "plain")


def test_progress_tells_the_error_of_every_block(tmp_path: Path) -> None:
    def errors(bits: int) -> list[float]:
        seen: list[str] = []
        config = GPTQConfig(bits=bits, group_size=64)
        anybit.quantize(TINY, tmp_path / str(bits), config, progress=lambda label, *_: seen.append(label), **OPTIONS)
        found = [re.fullmatch(r"model\.layers\.(\d), error ([0-9.e-]+)", label) for label in seen]
        blocks = [match for match in found if match is not None]
        assert [int(match[1]) for match in blocks] == list(range(6))
        return [float(match[2]) for match in blocks]

    four, eight = errors(4), errors(8)
    assert all(0 < fine < 0.2 * coarse < 1 for fine, coarse in zip(eight, four, strict=True))
