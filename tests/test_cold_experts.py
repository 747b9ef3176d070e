"""An expert that no token reaches: counted, named in the plan, rounded as without data, and never NaN."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import anybit
from anybit import AutoRoundConfig, AwqConfig, GPTQConfig

COLD, EXPERTS = 3, 4
IDS = torch.randint(0, 96, (8, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral whose router cannot choose expert 3: rows 0 and 1 are opposite, so one of them is above row 3, which is zero."""
    import transformers

    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=EXPERTS, num_experts_per_tok=1, dtype="float32",
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    with torch.no_grad():
        gate = router(model).weight
        gate[1], gate[COLD] = -gate[0], 0
    folder = tmp_path_factory.mktemp("moe") / "dense"
    model.save_pretrained(folder)
    return folder


def router(model: Any) -> Any:
    return next(module for name, module in model.named_modules() if name.endswith(".gate"))


def reached(folder: Path) -> list[int]:
    """Tokens that each expert gets from the calibration rows, by what goes into the router."""
    model: Any = anybit.load(folder, dtype="float32")
    counts: list[int] = []

    def count(module: Any, args: Any) -> None:
        logits = args[0].reshape(-1, args[0].shape[-1]) @ module.weight.T
        counts.extend(torch.bincount(logits.argmax(1), minlength=EXPERTS).tolist())

    router(model).register_forward_pre_hook(count)
    with torch.no_grad():
        assert torch.isfinite(model(IDS).logits).all()
    return counts


def of_expert(tensors: dict[str, torch.Tensor], number: int) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if f".experts.{number}." in name}


@pytest.mark.parametrize(
    ("config", "algorithm", "options"),
    [
        (GPTQConfig(bits=3, group_size=32), "gptq", {}),
        (AwqConfig(bits=4, group_size=32), "awq", {}),
        (AwqConfig(bits=4, group_size=32), "gptq", {}),
        (AutoRoundConfig(bits=3, group_size=32), "autoround", {"steps": 3, "batch": 2}),
    ],
    ids=["gptq", "awq", "gptq into awq's layout", "autoround"],
)
def test_it_is_counted_named_and_rounded_without_data(
    config: Any, algorithm: str, options: dict[str, Any], dense: Path, tmp_path: Path
) -> None:
    anybit.quantize(dense, tmp_path / "rounded", copy.deepcopy(config))
    plan = anybit.quantize(
        dense, tmp_path / "made", config, calibration=IDS, algorithm=algorithm, algorithm_options=options
    )
    entries = [entry for entry in plan.entries if entry.slot.kind == "experts"]
    assert len(entries) == 2
    # gptq counts behind a quantized attention; what does not observe inputs counts in the dense block
    counts = reached(tmp_path / "made" if algorithm == "gptq" else dense)
    assert counts[COLD] == 0
    assert min(counts[:COLD]) > 0
    for entry in entries:
        found = re.search(
            r"(\d+) to (\d+) tokens per expert; (\d+) of (\d+) (?:units|experts) saw fewer than 1 and", entry.reason
        )
        assert found is not None, entry.reason
        least, most, few, total = map(int, found.groups())
        assert (least, most) == (0, max(counts))
        assert few * EXPERTS == total  # a unit is a matrix of one expert, as it is stored
    made, rounded = (load_file(tmp_path / name / "model.safetensors") for name in ("made", "rounded"))
    assert all(torch.isfinite(tensor).all() for tensor in made.values() if tensor.is_floating_point())
    cold = of_expert(made, COLD)
    assert len(cold) >= 3 * 3  # matrices, tensors of each
    assert all(torch.equal(tensor, rounded[name]) for name, tensor in cold.items())
    if algorithm != "awq":  # which leaves stacks of experts alone
        for number in range(COLD):
            assert not all(torch.equal(tensor, rounded[name]) for name, tensor in of_expert(made, number).items())


def test_one_token_leaves_all_experts_but_one_cold(dense: Path, tmp_path: Path) -> None:
    """One token: every expert but one is cold."""
    plan = anybit.quantize(
        dense, tmp_path / "made", GPTQConfig(bits=4, group_size=32), calibration=IDS[:1, :1], algorithm="gptq"
    )
    reasons = [entry.reason for entry in plan.entries if entry.slot.kind == "experts"]
    counts = [re.search(r"0 to 1 tokens per expert; (\d+) of (\d+) units", reason) for reason in reasons]
    assert [found and found.groups() for found in counts] == [("6", "8"), ("3", "4")]
    tensors = load_file(tmp_path / "made" / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values() if tensor.is_floating_point())
