"""Calibrated algorithms beside GPTQ: what their papers and vendors say of them, on layers, blocks and the bundled model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import anybit
from anybit import AutoRoundConfig, AwqConfig, BitsAndBytesConfig, GPTQConfig, MetalConfig, algorithms
from anybit.algorithms import autoround, awq, gptq, rtn, smoothquant
from anybit.errors import ConfigError, InvalidOption, NotRepresentable
from anybit.quantizers import AutoHfQuantizer
from anybit.weight import ModuleInfo

ROOT = Path(__file__).parent.parent
TINY = ROOT / "examples" / "tiny-llama"
TEXT = (ROOT / "examples" / "data" / "calibration.txt").read_text(encoding="utf-8")
EVALUATION = (ROOT / "examples" / "data" / "evaluation.txt").read_text(encoding="utf-8")


def layout_of(config: Any, rows: int = 64, columns: int = 128) -> Any:
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    return quantizer.layout_for(ModuleInfo("model.layers.0.mlp.up_proj", "linear", (rows, columns), "float32"))


# --- names ------------------------------------------------------------------------------------------------------------------


def test_steps_are_foldings_and_then_one_rounding() -> None:
    assert algorithms.steps("awq") == algorithms.Steps(("awq",), None)
    assert algorithms.steps("smoothquant+awq+gptq") == algorithms.Steps(("smoothquant", "awq"), "gptq")
    assert algorithms.steps("autoround") == algorithms.Steps((), "autoround")
    for wrong in ("gptq+awq", "gptq+autoround", "awq+gptq+rtn"):
        with pytest.raises(InvalidOption, match=r"foldings \(awq, .*smoothquant\)"):
            algorithms.steps(wrong)
    with pytest.raises(InvalidOption, match=r"'autoruond'.*autoround"):
        algorithms.steps("autoruond")
    with pytest.raises(InvalidOption, match="needs calibration data"):
        algorithms.get("awq")


# --- GPTQ -------------------------------------------------------------------------------------------------------------------


def test_a_singular_hessian_is_damped_until_it_has_a_factor() -> None:
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))  # rank 3 of 128
    dense = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    layout = layout_of(GPTQConfig(bits=3, group_size=32))
    options = layout.algorithm_options()
    made = gptq.quantize(dense, layout.scheme(), hessian=2 / 3 * x.T @ x, damp=1e-9, **options).to_dense(torch.float32)
    nearest = rtn.quantize(dense, layout.scheme(), **options).to_dense(torch.float32)
    assert torch.isfinite(made).all()
    # three directions matter and 128 columns can make up for each other: hardly any error is left
    assert ((made - dense) @ x.T).norm() < 0.2 * ((nearest - dense) @ x.T).norm()


def test_a_layer_whose_inputs_are_zero_is_filled() -> None:
    layout = layout_of(GPTQConfig(bits=4, group_size=32))
    weight = gptq.quantize(
        torch.randn(64, 128), layout.scheme(), hessian=torch.zeros(128, 128), **layout.algorithm_options()
    )
    assert torch.isfinite(weight.to_dense(torch.float32)).all()


def test_a_weight_that_is_not_finite_is_named() -> None:
    dense = torch.randn(64, 128)
    dense[3, 5] = float("nan")
    with pytest.raises(NotRepresentable, match="nan at row 3, column 5"):
        gptq.quantize(dense, layout_of(GPTQConfig(bits=4, group_size=32)).scheme(), hessian=torch.eye(128))


# --- AWQ --------------------------------------------------------------------------------------------------------------------


def test_candidates_are_autoawqs_formula() -> None:
    weights = [torch.tensor([[1.0, 2.0, 4.0, 4.0]]), torch.tensor([[2.0, -2.0, 1.0, 4.0]])]
    inputs = torch.tensor([1.0, 4.0, 0.25, 9.0])
    found = awq.candidates(weights, inputs, inputs, 2)
    # |w| over the largest of its two columns: (1/2, 1, 1, 1) and (1, 1, 1/4, 1)
    mean = torch.tensor([0.75, 1.0, 0.625, 1.0])
    half = inputs**0.5 / (mean**0.5 + 1e-4)
    assert len(found) == 21
    assert torch.equal(found[0], torch.ones(4))
    assert torch.allclose(found[11], half / (half.max() * half.min()).sqrt(), rtol=1e-4)


def test_clipping_gives_up_an_outlier_that_no_input_meets() -> None:
    generator = torch.Generator().manual_seed(0)
    dense, x = torch.randn(8, 32, generator=generator), torch.randn(64, 32, generator=generator)
    dense[:, 0], x[:, 0] = 5.0, 0.0
    layout = layout_of(AwqConfig(bits=4, group_size=32), 8, 32)

    def rounded(numbers: torch.Tensor) -> torch.Tensor:
        return rtn.quantize(numbers, layout.scheme(), **layout.algorithm_options()).to_dense(torch.float32)

    clipped = awq.clipped(dense, x, 32, rounded)
    assert (clipped[:, 0] <= 3.75).all()  # bounds go down to 2.75, 0.55 of 5, and leave the columns that are met alone
    assert ((rounded(clipped) - dense) @ x.T).norm() < 0.9 * ((rounded(dense) - dense) @ x.T).norm()
    assert not awq.clips("model.layers.0.self_attn.q_proj")
    assert awq.clips("model.layers.0.mlp.down_proj")


def test_smoothing_shares_outliers_between_inputs_and_weights() -> None:
    weights = [torch.tensor([[0.5, -4.0], [1.0, 2.0]])]
    (scales,) = smoothquant.candidates(weights, torch.zeros(2), torch.tensor([16.0, 4.0]), 2)
    assert torch.allclose(scales, torch.tensor([4.0, 1.0]))  # sqrt(16 / 1), sqrt(4 / 4)


# --- AutoRound --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [AutoRoundConfig(bits=2, group_size=32), AutoRoundConfig(bits=3, group_size=32, sym=False)]
)
def test_untrained_it_is_rounding_by_its_own_ranges(config: Any) -> None:
    dense = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).to(torch.float32)
    layout = layout_of(config)
    known = {name: value for name, value in layout.algorithm_options().items() if name == "ranges"}
    rounding = autoround.Rounding(dense, layout.scheme(), symmetric=layout.symmetric, **known)
    rounding.keep()
    made = rounding.weight().to_dense(torch.float32)
    low, high = (part(dense.view(64, 4, 32), -1) for part in (torch.amin, torch.amax))
    low, high = low.clamp(max=0), high.clamp(min=0)
    steps = 1 << config.bits
    if layout.symmetric:  # the facts: scale = -m / 2^(b-1) where the largest is positive, else m / 2^(b-1)
        scale = torch.where(high >= -low, -high, -low) / (steps // 2)
        zero = torch.full_like(scale, steps // 2)
    else:
        scale = (high - low) / (steps - 1)
        zero = torch.round(-low / scale.half().float())
    scale = scale.half().float().repeat_interleave(32, 1).view(64, 128)
    zero = zero.repeat_interleave(32, 1).view(64, 128)
    wanted = ((torch.round(dense / scale) + zero).clamp(0, steps - 1) - zero) * scale
    assert torch.equal(made, wanted)


def test_symmetric_ranges_use_the_lowest_code_in_every_format() -> None:
    dense = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    layout = layout_of(GPTQConfig(bits=2, group_size=32))
    known = {name: value for name, value in layout.algorithm_options().items() if name == "ranges"}
    rounding = autoround.Rounding(dense, layout.scheme(), symmetric=layout.symmetric, **known)
    rounding.keep()
    tree = rounding.weight().tree
    assert tree.codes.integers().unique().tolist() == [0, 1, 2, 3]  # type: ignore[union-attr]
    assert bool((tree.scale.dense() < 0).any())  # type: ignore[union-attr]


def test_training_lowers_the_error_of_a_layer_below_nearest() -> None:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(64, 128, generator=generator)
    x = torch.randn(256, 128, generator=generator) @ torch.randn(128, 128, generator=generator)
    layout = layout_of(GPTQConfig(bits=2, group_size=32))
    rounding = autoround.Rounding(dense, layout.scheme(), ranges=layout.algorithm_options()["ranges"])
    wanted = x @ dense.T

    def loss(rows: torch.Tensor) -> torch.Tensor:
        return (x[rows] @ rounding.value().T - wanted[rows]).pow(2).mean()

    first = loss(torch.arange(256)).item()
    history = list(autoround.tune([rounding], loss, 256, steps=100, batch=256))
    assert history[0] == pytest.approx(first)
    stored = layout.decode(layout.encode(rounding.weight())).to_dense(torch.float32)
    found = (x @ stored.T - wanted).pow(2).mean().item()
    assert found <= 1.001 * min(history)  # the best seen or what the last step led to; codes stand for what was trained
    assert found < 0.6 * first


def test_a_tree_without_trainable_ranges_is_refused() -> None:
    layout = layout_of(BitsAndBytesConfig(load_in_4bit=True))
    with pytest.raises(NotRepresentable, match="AutoRound trains grids of integer codes"):
        autoround.Rounding(torch.randn(64, 128), layout.scheme())


# --- the engine -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first block of the bundled model, with its embeddings and head."""
    folder = tmp_path_factory.mktemp("model") / "short"
    folder.mkdir()
    config = json.loads((TINY / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder / name)
    tensors = load_file(TINY / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "layers" not in name or ".layers.0." in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def quantized(source: Path, folder: Path, config: Any, algorithm: str | None = None, **options: Any) -> Any:
    return anybit.quantize(
        source, folder, config, calibration=TEXT, algorithm=algorithm, samples=8, sequence_length=128, **options
    )


def kl_of(folder: Path, source: Path) -> float:
    return anybit.evaluate(folder, EVALUATION, reference=source, context=128, max_tokens=800).kl  # type: ignore[no-any-return]


def test_awq_folds_into_norms_and_linears_and_the_function_stays(short: Path, tmp_path: Path) -> None:
    plan = quantized(short, tmp_path / "out", AwqConfig(bits=8, group_size=64))
    reasons = {entry.slot.parameter: entry.reason for entry in plan.entries}
    first = "model.layers.0."
    assert reasons[first + "self_attn.q_proj.weight"] == f"awq: inverse scales in {first}input_layernorm"
    assert reasons[first + "mlp.gate_proj.weight"] == f"awq: inverse scales in {first}post_attention_layernorm"
    assert reasons[first + "mlp.down_proj.weight"] == f"awq: inverse scales in {first}mlp.up_proj"
    # two value heads serve four query heads, so rows of v_proj are no columns of o_proj
    assert (
        reasons[first + "self_attn.o_proj.weight"] == "awq: not scaled, nothing in front of it takes the inverse scales"
    )
    source, made = load_file(short / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    norm = first + "input_layernorm.weight"
    assert not torch.equal(source[norm], made[norm])
    assert made[norm].dtype == source[norm].dtype
    assert kl_of(tmp_path / "out", short) < 1e-3


def test_awq_does_better_than_nearest_at_three_bits(short: Path, tmp_path: Path) -> None:
    config = GPTQConfig(bits=3, group_size=128)
    anybit.quantize(short, tmp_path / "nearest", config)
    quantized(short, tmp_path / "awq", GPTQConfig(bits=3, group_size=128), "awq")
    assert kl_of(tmp_path / "awq", short) < 0.97 * kl_of(tmp_path / "nearest", short)


def test_autoround_at_two_bits_into_mlx(short: Path, tmp_path: Path) -> None:
    config = MetalConfig(bits=2, group_size=64)
    anybit.quantize(short, tmp_path / "nearest", config)
    plan = quantized(short, tmp_path / "trained", config, "autoround", algorithm_options={"steps": 20, "batch": 4})
    assert all("trained for 20 steps" in entry.reason for entry in plan.entries if entry.action == "quantize")
    assert kl_of(tmp_path / "trained", short) < 0.85 * kl_of(tmp_path / "nearest", short)


def test_a_configurations_own_texts_are_used_and_not_kept(short: Path, tmp_path: Path) -> None:
    config = GPTQConfig(bits=4, group_size=64, dataset=[TEXT], tokenizer=str(TINY))
    anybit.quantize(short, tmp_path / "own", config, samples=2, sequence_length=64)
    anybit.quantize(
        short, tmp_path / "given", GPTQConfig(bits=4, group_size=64), calibration=TEXT, samples=2, sequence_length=64
    )
    own, given = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("own", "given"))
    assert own == given
    assert TEXT[:50] not in (tmp_path / "own" / "config.json").read_text()
    assert config.dataset == [TEXT]
    with pytest.raises(ConfigError, match="would have to be downloaded"):
        anybit.quantize(short, tmp_path / "named", GPTQConfig(bits=4, dataset="wikitext2"))


def test_options_are_checked(short: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match=r"gptq: .*'mze'"):
        quantized(short, tmp_path / "out", GPTQConfig(bits=4), algorithm_options={"mze": 2.4})
    assert not (tmp_path / "out").exists()


def test_activations_that_are_not_finite_end_the_run(short: Path, tmp_path: Path) -> None:
    shutil.copytree(short, tmp_path / "src")
    tensors = load_file(short / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"][3] = float("nan")
    save_file(tensors, tmp_path / "src" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidOption, match=r"model\.layers\.0 gives numbers that are not finite"):
        quantized(tmp_path / "src", tmp_path / "out", GPTQConfig(bits=4))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("algorithm", ["gptq", "awq", "autoround"])
def test_experts_and_one_that_no_token_reaches(algorithm: str, tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        num_local_experts=4, num_experts_per_tok=1, dtype="float32",
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[0] = 0
            layer.mlp.gate.weight[1] = layer.mlp.gate.weight[2]  # ties go to the first, so the second sees nothing
    model.save_pretrained(tmp_path / "dense")
    ids = torch.randint(0, 96, (8, 16), generator=torch.Generator().manual_seed(0))
    options = {"algorithm_options": {"steps": 3}} if algorithm == "autoround" else {}
    for name, target in (("gptq", GPTQConfig(bits=4, group_size=32)), ("mlx", MetalConfig(bits=4, group_size=32))):
        plan = anybit.quantize(
            tmp_path / "dense", tmp_path / name, target, calibration=ids, algorithm=algorithm, **options
        )
        experts = [entry for entry in plan.entries if entry.slot.kind == "experts" and entry.action == "quantize"]
        words = {"gptq": "0 to", "awq": "a stack of experts", "autoround": "trained for 3 steps"}[algorithm]
        assert all(words in entry.reason for entry in experts)
        loaded: Any = anybit.load(tmp_path / name)
        with torch.no_grad():
            assert torch.isfinite(loaded(ids).logits).all()


def test_static_groups_keep_the_stored_order() -> None:
    layout = layout_of(GPTQConfig(bits=4, group_size=32))
    x = torch.randn(200, 128, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, 128)
    dense = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    weight: Any = gptq.quantize(
        dense, layout.scheme(), hessian=x.T @ x, order="columns", static_groups=True, **layout.algorithm_options()
    )
    nearest: Any = rtn.quantize(dense, layout.scheme(), **layout.algorithm_options())
    assert weight.tree.group_index is None
    assert torch.equal(weight.tree.scale.tensor, nearest.tree.scale.tensor)  # found before anything is made up for
    made, rounded = (own.to_dense(torch.float32) for own in (weight, nearest))
    assert ((made - dense) @ x.T).norm() < 0.8 * ((rounded - dense) @ x.T).norm()
