"""Sensitivity against closed forms, the solver against every combination, and that a mix pays."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

import anybit
from anybit.engine import allocate as allocating
from anybit.engine.advice_plans import bytes_written
from anybit.engine.allocate import _Unit, allocate, solve
from anybit.engine.calibration import calibration_tokens
from anybit.engine.recipe import quantize_by_recipe
from anybit.engine.sensitivity import sensitivity
from anybit.errors import ConfigError, InvalidOption, MissingDependency, NotRepresentable
from anybit.quantizers.named import from_scheme

pytest.importorskip("scipy")

EXAMPLES = Path(__file__).parents[1] / "examples"
MODEL, TEXT = EXAMPLES / "tiny-llama", EXAMPLES / "data" / "calibration.txt"
OTHER_TEXT = EXAMPLES / "data" / "evaluation.txt"
SMALL = {"samples": 2, "sequence_length": 32}
MIX = ["gptq-2bit-g64", "gptq-3bit-g64", "gptq-4bit-g64"]


@pytest.fixture(scope="module")
def little(tmp_path_factory):
    """The example model's first layer alone: cheap to measure."""
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("little")
    model = LlamaForCausalLM.from_pretrained(MODEL, num_hidden_layers=1)
    model.save_pretrained(folder)
    for file in MODEL.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


class TestSolver:
    def test_it_finds_the_optimum(self):
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            units = []
            for number in range(5):
                sizes = torch.randint(1, 50, (3,), generator=generator).tolist()
                losses = torch.rand(3, generator=generator).tolist()
                choices = tuple(zip("abc", sizes, losses))
                units.append(_Unit((str(number),), choices))
            budget = sum(sorted(size for _, size, _ in unit.choices)[1] for unit in units)
            best = min(
                sum(loss for _, _, loss in combination)
                for combination in itertools.product(*(unit.choices for unit in units))
                if sum(size for _, size, _ in combination) <= budget
            )
            found = [
                next(one for one in unit.choices if one[0] == name) for unit, name in zip(units, solve(units, budget))
            ]
            assert sum(size for _, size, _ in found) <= budget
            assert sum(loss for _, _, loss in found) == pytest.approx(best, rel=1e-9)

    def test_without_scipy(self, monkeypatch):
        import sys

        monkeypatch.setitem(sys.modules, "scipy", None)
        with pytest.raises(MissingDependency, match=r"anybit\[allocate\]"):
            allocate(MODEL, TEXT, bits=3)


class TestSensitivity:
    def test_numbers_are_those_of_the_definitions(self, little):
        found = sensitivity(little, TEXT, ["gptq-3bit-g64"], **SMALL)
        cost = {one.module: one for one in found.costs}["model.layers.0.mlp.down_proj"]
        dense = anybit.load(little, dtype="float32")
        packed = anybit.load(little, from_scheme("gptq-3bit-g64"), dtype="float32")
        name = "model.layers.0.mlp.down_proj"
        weight = dense.get_submodule(name).weight.detach()
        made = packed.get_submodule(name).dequantize().float()
        assert cost.weight_error == pytest.approx(float((made - weight).norm() / weight.norm()), rel=1e-3)
        tokens = calibration_tokens(TEXT, little, samples=2, length=32, seed=0)
        with torch.no_grad():
            expected = dense(input_ids=tokens).logits.log_softmax(-1)
            dense.get_submodule(name).weight.copy_(made)
            own = dense(input_ids=tokens).logits.log_softmax(-1)
        kl = float((expected.exp() * (expected - own)).sum(-1).mean())
        assert cost.kl == pytest.approx(kl, rel=0.02)
        assert 0 < cost.output_error < 1

    def test_costs_of_an_algorithm_that_sees_inputs(self, little, tmp_path):
        scheme, name = "gptq-3bit-g64", "model.layers.0.self_attn.q_proj"
        tokens = calibration_tokens(TEXT, little, samples=4, length=64, seed=0)
        plain, own = (
            {one.module: one for one in sensitivity(little, tokens, [scheme], kl=False, algorithm=which).costs}
            for which in (None, "gptq")
        )
        assert all(own[module].output_error < plain[module].output_error for module in own), "what GPTQ minimizes"
        # the first layer sees the same inputs in a run of `quantize`, in bfloat16
        anybit.quantize(little, tmp_path / "made", from_scheme(scheme), calibration=tokens)
        weight = anybit.load(little, dtype="float32").get_submodule(name).weight.detach()
        made = anybit.load(tmp_path / "made").get_submodule(name).dequantize().float()
        assert own[name].weight_error == pytest.approx(float((made - weight).norm() / weight.norm()), rel=0.05)
        with pytest.raises(InvalidOption, match="round by their inputs, such as gptq, not 'awq'"):
            sensitivity(little, tokens, [scheme], algorithm="awq")

    def test_costs_are_kept(self, little, tmp_path):
        file = tmp_path / "costs.json"
        first = sensitivity(little, TEXT, ["gptq-4bit-g64"], cache=file, **SMALL)
        again = sensitivity(little, TEXT, ["gptq-4bit-g64"], cache=file, **SMALL)
        assert (first.from_cache, again.from_cache) == (0, len(first.costs))
        assert again.costs == first.costs
        other = sensitivity(little, ["another text. " * 60], ["gptq-4bit-g64"], kl=False, cache=file, **SMALL)
        assert other.from_cache == 0
        file.write_text("[]")
        with pytest.raises(ConfigError, match="no file of sensitivities"):
            sensitivity(little, TEXT, ["gptq-4bit-g64"], cache=file, **SMALL)

    def test_a_quantized_model_is_refused(self, little, tmp_path):
        anybit.quantize(little, tmp_path / "q", from_scheme("nf4"))
        with pytest.raises(ConfigError, match="already"):
            sensitivity(tmp_path / "q", TEXT, ["nf4"], **SMALL)


class TestAllocation:
    @pytest.mark.parametrize(
        "schemes",
        [
            MIX,
            ["auto-round-2bit-g64", "auto-round-4bit-g64", "auto-round-8bit-g64"],
            ["mlx-2bit-g64", "mlx-4bit-g64", "mlx-8bit-g64"],
        ],
        ids=lambda schemes: schemes[0],
    )
    def test_the_recipe_has_the_size_that_was_promised(self, little, schemes, tmp_path):
        found = allocate(little, TEXT, bits=3.5, schemes=schemes, metric="output", check=False, **SMALL)
        assert len(found.counts) > 1
        assert found.bits <= 3.5
        assert found.bytes <= found.budget
        names = [part.prefix for entry in anybit.plan(little, from_scheme(schemes[0])).entries for part in entry.parts]
        plan = anybit.plan(little, found.recipe.config(names))
        assert bytes_written(plan) == found.bytes
        bits = {entry.slot.module.rpartition(".")[2]: entry.bits_per_weight for entry in plan.entries}
        assert bits["gate_proj"] == bits["up_proj"]  # fused in serving programs

    def test_a_mix_beats_the_uniform_choice_of_equal_size(self, tmp_path):
        """At the very size of 3 bits everywhere; the text that decides, and that of the test, were measured on by nothing."""
        uniform = "gptq-3bit-g64"
        size = bytes_written(anybit.plan(MODEL, from_scheme(uniform)))
        found = allocate(MODEL, TEXT, memory=size, schemes=MIX, samples=2, sequence_length=128)
        assert found.mixed
        assert (found.uniform, found.uniform_bytes) == (uniform, size)
        assert found.bytes <= size
        assert found.perplexity < found.uniform_perplexity
        quantize_by_recipe(MODEL, tmp_path / "mix", found.recipe)
        anybit.quantize(MODEL, tmp_path / "uniform", from_scheme(uniform))
        mix, same = (anybit.evaluate(tmp_path / name, OTHER_TEXT, max_tokens=8192) for name in ("mix", "uniform"))
        assert mix.perplexity < same.perplexity

    def test_impossible_budgets_say_the_smallest(self, little):
        with pytest.raises(InvalidOption, match=r"the smallest mix has .* MB of tensors \(2\.\d+ bits"):
            allocate(little, TEXT, bits=1, schemes=MIX, metric="output", **SMALL)
        with pytest.raises(InvalidOption, match="one of memory"):
            allocate(little, TEXT)
        with pytest.raises(ConfigError, match="one checkpoint is of one method"):
            allocate(little, TEXT, bits=3, schemes=["nf4", "gptq-4bit-g64"])
        with pytest.raises(NotRepresentable, match="one setting for the whole model"):
            allocate(little, TEXT, bits=3, schemes=["nf4", "fp4"])

    def test_the_uniform_choice_wins_where_it_reads_better(self, little, monkeypatch):
        monkeypatch.setattr(allocating, "_perplexity", lambda path, recipe, *rest: 1.0 if not recipe.modules else 2.0)
        found = allocate(little, TEXT, bits=4, schemes=MIX, metric="output", **SMALL)
        assert not found.mixed
        assert found.recipe.modules == {}
        assert found.recipe.quantization.scheme == found.uniform
        assert "does not read held-out text better" in found.verdict
