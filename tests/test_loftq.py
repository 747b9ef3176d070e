"""LoftQ: base plus adapter is closer to the dense weights than the base, for every method; PEFT loads it and starts lower."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils.loftq_utils import _low_rank_decomposition
from safetensors.torch import load_file

import anybit
from anybit import (
    AwqConfig,
    BitsAndBytesConfig,
    CompressedTensorsConfig,
    GPTQConfig,
    HiggsConfig,
    HqqConfig,
    Mxfp4Config,
    QuantoConfig,
    SinqConfig,
)
from anybit.algorithms._low_rank import factors
from anybit.cli.app import run
from anybit.engine.lora_start import alternating
from anybit.errors import ConfigError, InvalidOption
from anybit.quantizers import AutoHfQuantizer
from anybit.weight import ModuleInfo

ROOT = Path(__file__).parent.parent
TINY = ROOT / "examples" / "tiny-llama"
TEXT = (ROOT / "examples" / "data" / "calibration.txt").read_text(encoding="utf-8")


def nf4(dense: torch.Tensor) -> Any:
    """One matrix in bitsandbytes' NF4 without double quantization, as PEFT's LoftQ has it."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    layout: Any = quantizer.layout_for(ModuleInfo("a", "linear", tuple(dense.shape), "float32"))
    return anybit.algorithms.get(layout.algorithm)(dense, layout.scheme(), **layout.algorithm_options())


@pytest.mark.parametrize("iterations", [1, 3])
def test_turns_are_pefts(iterations: int) -> None:
    """The loop of peft.utils.loftq_utils.loftq_init (which needs a GPU), with PEFT's own decomposition."""
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0)) * 0.02
    left, errors, bases = weight, [], []
    for _ in range(iterations):
        base = nf4(left).to_dense(torch.float32)
        found = _low_rank_decomposition(weight - base, reduced_rank=8)
        left = weight - found["L"] @ found["R"]
        errors.append(float((left - base).norm()))
        bases.append(base)
    best = errors.index(min(errors))
    made = alternating(weight, 8, iterations, nf4).to_dense(torch.float32)
    assert torch.equal(made, bases[best])
    up, down = factors(weight - made, 8)
    assert float((weight - made - up @ down).norm()) == pytest.approx(errors[best], rel=1e-5)
    if iterations == 1:
        assert torch.allclose(up @ down, found["L"] @ found["R"], atol=1e-6)
        assert torch.allclose(
            up.norm(dim=0), found["L"].norm(dim=0), rtol=1e-4
        )  # each carries half of a singular value


def test_subspace_iteration_finds_what_the_decomposition_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(200, 160, generator=torch.Generator().manual_seed(1))
    exact = [part.clone() for part in factors(matrix, 12)]
    monkeypatch.setattr("anybit.algorithms._low_rank.EXACT", 64)
    up, down = factors(matrix, 12)
    least = (matrix - exact[0] @ exact[1]).norm()
    assert (matrix - up @ down).norm() < 1.002 * least  # of a matrix without structure, the hardest there is
    assert torch.equal(factors(matrix, 12)[0], up)


@pytest.mark.parametrize(
    "config",
    [
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        GPTQConfig(bits=3, group_size=64),
        AwqConfig(bits=4, group_size=64),
        HqqConfig(nbits=2, group_size=64),
        QuantoConfig(weights="int4"),
        HiggsConfig(bits=2),
        SinqConfig(nbits=4, group_size=64),
        CompressedTensorsConfig(config_groups={"W4A16": ["Linear"]}, ignore=["lm_head"]),
    ],
    ids=lambda config: str(getattr(config.quant_method, "value", config.quant_method)),
)
def test_every_method_gets_an_adapter(config: Any, tmp_path: Path) -> None:
    anybit.quantize(TINY, tmp_path / "base", config, lora_iterations=1, lora_init="loftq", rank=16)
    adapter = load_file(tmp_path / "base" / "loftq_init" / "adapter_model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    dense = load_file(TINY / "model.safetensors")[f"{name}.weight"].float()
    base: Any = anybit.load(tmp_path / "base", dtype=torch.float32)
    values = base.get_submodule(name).dequantize().float()
    key = f"base_model.model.{name}"
    product = adapter[f"{key}.lora_B.weight"] @ adapter[f"{key}.lora_A.weight"]
    before, after = (dense - values).norm(), (dense - values - product).norm()
    assert after < before
    best = torch.linalg.svdvals(dense - values)[16:].square().sum().sqrt()  # Eckart and Young
    assert float(after) == pytest.approx(float(best), rel=2e-3)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loftq") / "base"
    done = ["quantize", str(TINY), "-o", str(folder), "--method", "gptq", "--set", "bits=2", "--set", "group_size=64"]
    assert run([*done, "--lora-init", "loftq", "--rank", "32", "--quiet"]) == 0
    return folder


def test_training_starts_lower(made: Path) -> None:
    ids = anybit.AutoTokenizer.from_pretrained(str(TINY))(TEXT[:3000], return_tensors="pt")["input_ids"][:, :256]

    def loss(model: Any) -> float:
        with torch.no_grad():
            return float(model(input_ids=ids, labels=ids).loss)

    dense = loss(anybit.load(TINY, dtype=torch.float32))
    plain = loss(anybit.load(made, dtype=torch.float32))  # a plain adapter adds nothing at step 0
    base: Any = anybit.load(made, dtype=torch.float32)
    tuned = peft.PeftModel.from_pretrained(base, str(made), subfolder="loftq_init", is_trainable=True)
    started = loss(tuned)
    assert dense < started < plain - 0.25 * (plain - dense)
    trained = [tensor for name, tensor in tuned.named_parameters() if tensor.requires_grad]
    assert len(trained) == 2 * 7 * 6  # A and B of seven layers of six blocks
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    for _ in range(3):
        step = tuned(input_ids=ids, labels=ids).loss
        step.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss(tuned) < started


def test_more_turns_are_no_worse(made: Path, tmp_path: Path) -> None:
    """The base of five turns leaves less to lose than that of one."""
    config = GPTQConfig(bits=2, group_size=64)
    anybit.quantize(TINY, tmp_path / "once", config)
    five = anybit.lora_init(made, TINY, tmp_path / "five", rank=32, targets=["down_proj", "q_proj"])
    once = anybit.lora_init(tmp_path / "once", TINY, rank=32, targets=["down_proj", "q_proj"])
    assert [own.name for own in once.modules] == [own.name for own in five.modules]
    assert all(left.adapted <= right.adapted * 1.0001 for left, right in zip(five.modules, once.modules, strict=True))
    assert sum(own.adapted for own in five.modules) < 0.99 * sum(own.adapted for own in once.modules)
    config_written = json.loads((tmp_path / "once" / "loftq_init" / "adapter_config.json").read_text())
    assert config_written["target_modules"] == ["down_proj", "q_proj"]
    assert (config_written["r"], config_written["lora_alpha"]) == (32, 32)


def test_rotated_and_calibrated_bases(tmp_path: Path) -> None:
    """Adapters live where the weights live: behind r1 and r2, and before r4."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}
    config = CompressedTensorsConfig(
        config_groups={"g": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"]
    )
    options: dict[str, Any] = {"calibration": TEXT[:20000], "algorithm": "gptq", "samples": 4, "sequence_length": 64}
    anybit.quantize(TINY, tmp_path / "base", config, rotate="r1+r2+r4", lora_init="loftq", rank=32, **options)
    base: Any = anybit.load(tmp_path / "base", dtype=torch.float32)
    tuned = peft.PeftModel.from_pretrained(base, str(tmp_path / "base"), subfolder="loftq_init")
    dense: Any = anybit.load(TINY, dtype=torch.float32)
    ids = torch.arange(40, 140)[None]
    with torch.no_grad():
        wanted, adapted = dense(ids).logits, tuned(ids).logits
        with tuned.disable_adapter():
            plain = tuned(ids).logits
    assert (adapted - wanted).norm() < 0.9 * (plain - wanted).norm()


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    config = GPTQConfig(bits=4, group_size=64)
    with pytest.raises(InvalidOption, match="lora_init is 'loftk'; did you mean 'loftq'"):
        anybit.quantize(TINY, tmp_path / "a", config, lora_init="loftk")
    with pytest.raises(InvalidOption, match="it must be from 1 to"):
        anybit.quantize(TINY, tmp_path / "a", config, lora_init="loftq", rank=300)
    with pytest.raises(ConfigError, match="moves scales from weights into norms"):
        anybit.quantize(TINY, tmp_path / "a", config, lora_init="loftq", algorithm="awq+gptq", calibration=TEXT)
    with pytest.raises(ConfigError, match="no layer to adapt"):
        anybit.quantize(TINY, tmp_path / "a", Mxfp4Config(), lora_init="loftq")
    assert not (tmp_path / "a").exists()
    anybit.quantize(TINY, tmp_path / "turned", config, rotate="r1")
    with pytest.raises(ConfigError, match="which is no rounding of it"):
        anybit.lora_init(tmp_path / "turned", TINY)
    with pytest.raises(ConfigError, match="a quantized base with its dense source"):
        anybit.lora_init(TINY, TINY)
