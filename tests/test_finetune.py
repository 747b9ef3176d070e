"""Fine-tuning of codebooks and scales: what is trained, what is not, and what it does to a block's output."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import anybit
from anybit import AutoRoundConfig, GPTQConfig, HiggsConfig, algorithms
from anybit.algorithms import finetune
from anybit.errors import InvalidOption, NotRepresentable
from anybit.methods.aqlm import AqlmConfig
from anybit.methods.spqr import SpQRConfig
from anybit.quantizers import AutoHfQuantizer
from anybit.weight import ModuleInfo, Weight
from anybit.weight.nodes import tensors_of
from anybit.weight.weight import same

ROWS = 16
generator = torch.Generator().manual_seed(0)
DENSE = torch.randn(256, 64, generator=generator) * 0.02
X = torch.randn(ROWS, 32, 64, generator=generator) @ torch.randn(64, 64, generator=generator)


def rounded(config: Any) -> tuple[Any, Weight]:
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    layout = quantizer.layout_for(ModuleInfo("model.layers.0.a", "linear", (256, 64), "float16"))
    assert layout is not None, quantizer.skip_reasons
    name = quantizer.calibrated_algorithm
    options = algorithms.accepted(algorithms.get(name), {**layout.algorithm_options(), "hessian": torch.eye(64)})
    return layout, algorithms.get(name)(DENSE, layout.scheme(), **options)


def error_of(tuned: finetune.Tuned) -> Any:
    return lambda rows: (X[rows] @ (tuned.value() - DENSE).T).square().mean()


@pytest.mark.parametrize(
    ("config", "share"),
    [
        (AqlmConfig(num_codebooks=1, nbits_per_codebook=4), 0.985),
        (GPTQConfig(bits=2, group_size=32), 0.9),
        (HiggsConfig(bits=2, group_size=64, hadamard_size=64), 0.99),
        (SpQRConfig(), 0.97),
    ],
    ids=["aqlm", "gptq", "higgs", "spqr"],
)
def test_numbers_are_trained_and_codes_stay(config: Any, share: float) -> None:
    layout, weight = rounded(config)
    tuned = finetune.Tuned(weight, fixed_tables="grid" in layout.algorithm_options())
    before, after = finetune.refine([tuned], error_of(tuned), ROWS, tuning_steps=60, tuning_batch=4)
    made = tuned.finished()
    assert after < share * before
    assert same(layout.decode(layout.encode(made)), made)  # what is stored is what was trained
    wrong = X @ (made.to_dense(torch.float32) - DENSE).T
    assert abs(float(wrong.square().mean()) / after - 1) < 0.01  # but for a format's own half precision
    for old, new in zip(tensors_of(weight.tree), tensors_of(made.tree), strict=True):
        assert old.dtype == new.dtype
        assert old.is_floating_point() or torch.equal(old, new)


def test_a_table_of_the_format_stays() -> None:
    _, weight = rounded(HiggsConfig(bits=2, group_size=64, hadamard_size=64))
    free, bound = finetune.Tuned(weight), finetune.Tuned(weight, fixed_tables=True)
    assert len(free.parameters) == len(bound.parameters) + 1


def test_what_does_not_help_is_undone() -> None:
    _, weight = rounded(AqlmConfig(num_codebooks=1, nbits_per_codebook=4))
    tuned = finetune.Tuned(weight)
    before, after = finetune.refine([tuned], error_of(tuned), ROWS, tuning_steps=3, tuning_rate=50.0)
    assert before == after
    assert same(tuned.finished(), weight)


def test_a_weight_without_such_numbers_is_refused() -> None:
    _, weight = rounded(AqlmConfig(num_codebooks=1, nbits_per_codebook=4))
    tree: Any = weight.tree
    with pytest.raises(NotRepresentable, match="leave out finetune"):
        finetune.Tuned(Weight(tree.codes, "float32"))


def test_it_comes_last() -> None:
    assert algorithms.steps("awq+gptq+finetune") == algorithms.Steps(("awq",), "gptq", "finetune")
    assert algorithms.steps("finetune") == algorithms.Steps((), None, "finetune")
    for name in ("finetune+gptq", "gptq+finetune+finetune", "gptq+ldlq+finetune"):
        with pytest.raises(InvalidOption, match="at most one refinement"):
            algorithms.steps(name)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks of random weights."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        dtype="float32", initializer_range=0.1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("dense")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("config", "algorithm"),
    [
        (AqlmConfig(num_codebooks=1, nbits_per_codebook=5), "aqlm"),
        (AutoRoundConfig(bits=2, group_size=32), "autoround"),
    ],
    ids=["aqlm", "autoround"],
)
def test_blocks_come_closer_on_other_data_at_the_same_size(
    config: Any, algorithm: str, small: Path, tmp_path: Path
) -> None:
    ids = torch.randint(0, 64, (40, 48), generator=torch.Generator().manual_seed(1))
    own: dict[str, Any] = {"steps": 10, "batch": 4} if algorithm == "autoround" else {"passes": 2}
    anybit.quantize(small, tmp_path / "a", config, calibration=ids[:32], algorithm=algorithm, algorithm_options=own)
    plan = anybit.quantize(
        small, tmp_path / "b", config, calibration=ids[:32], algorithm=f"{algorithm}+finetune",
        algorithm_options={**own, "tuning_steps": 40, "tuning_batch": 4},
    )  # fmt: skip
    for entry in plan.entries:
        if entry.action == "quantize":
            found = re.search(r"; trained: error of the block (\S+) -> (\S+)$", entry.reason)
            assert found is not None, entry.reason
            assert float(found[2]) < float(found[1])
    with torch.no_grad():
        wanted = anybit.load(small, dtype="float32")(ids[32:]).logits
        wrong = [
            float((anybit.load(tmp_path / name, dtype="float32")(ids[32:]).logits - wanted).norm()) for name in "ab"
        ]
    assert wrong[1] < 0.97 * wrong[0]
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in "ab"]
    assert sizes[0] == sizes[1]
