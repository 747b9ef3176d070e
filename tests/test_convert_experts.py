"""Stacks of experts in other methods: GPT-OSS' rows by turns, Llama 4's one above the other, both ways, codes kept."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import anybit
from anybit.cli.schemes import from_scheme
from anybit.errors import CorruptFile, MissingTensor
from anybit.modules.packed import joined
from anybit.weight import Codes, Grid, Transpose, Values, View, Weight
from anybit.weight.joining import Alternating, alternate_rows, split_alternating

GOLDEN = Path(__file__).parent / "golden"
GPT_OSS, LLAMA4 = GOLDEN / "mxfp4" / "gptoss", GOLDEN / "fbgemm_fp8" / "llama4_experts"
STACKS = {GPT_OSS: "model.layers.0.mlp.experts", LLAMA4: "model.layers.0.feed_forward.experts"}


def converted(source: Path, folder: Path, scheme: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """(report, stored tensors). Attention, dense in one method and packed in the other, is allowed to be rounded."""
    report = anybit.convert(source, folder, from_scheme(scheme), allow_requantize=True)
    return report, load_file(folder / "model.safetensors")


def fates(report: Any) -> set[str]:
    return {module.kind for module in report.modules if ".experts." in module.name}


@pytest.mark.parametrize(
    ("source", "scheme", "stored"),
    [
        (GPT_OSS, "ct-mxfp4a16", "weight_packed"),
        (GPT_OSS, "quark-mxfp4", "weight"),
        (GPT_OSS, "mlx-mxfp4", "weight"),
        (GPT_OSS, "ct-nvfp4a16", "weight_packed"),
        (GPT_OSS, "modelopt-w4a16-nvfp4", "weight"),
        (LLAMA4, "modelopt-fp8-pc", "weight"),
    ],
)
def test_the_vendors_numbers_expert_by_expert(source: Path, scheme: str, stored: str, tmp_path: Path) -> None:
    """`dense.*`: what the vendor's own package says the stack is, [experts, in, out]."""
    report, tensors = converted(source, tmp_path / "out", scheme)
    assert fates(report) == {"exact"}
    start = STACKS[source]
    assert {f"{start}.{e}.{own}_proj.{stored}" for e in (0, 1) for own in ("gate", "up", "down")} <= set(tensors)
    assert not [name for name in tensors if name.startswith(f"{start}.gate_up") or name.startswith(f"{start}.down")]
    reference = load_file(source / "reference.safetensors")
    model: Any = anybit.load(tmp_path / "out", dtype=torch.float32)
    for own in ("gate_up_proj", "down_proj"):
        wanted = reference[f"dense.{start}.{own}"]
        stack = model.get_submodule(start).get_submodule(own)
        assert torch.equal(stack.dequantize(torch.float32), wanted), own


@pytest.mark.parametrize(
    ("source", "there", "back"),
    [(GPT_OSS, "ct-mxfp4a16", "mxfp4"), (GPT_OSS, "mlx-mxfp4", "mxfp4"), (LLAMA4, "modelopt-fp8-pc", "fbgemm-fp8")],
)
def test_there_and_back_gives_the_same_bytes(source: Path, there: str, back: str, tmp_path: Path) -> None:
    converted(source, tmp_path / "there", there)
    report, tensors = converted(tmp_path / "there", tmp_path / "back", back)
    assert fates(report) == {"exact"}
    stored = load_file(source / "model.safetensors")
    experts = [name for name in stored if ".experts." in name]
    assert {name for name in tensors if ".experts." in name} == set(experts)
    for name in experts:
        assert torch.equal(tensors[name].view(torch.uint8), stored[name].view(torch.uint8)), name


def test_biases_go_with_their_experts_and_come_back(tmp_path: Path) -> None:
    """GPT-OSS: gate is every other row from the first, up from the second (transformers' GptOssExperts)."""
    _, tensors = converted(GPT_OSS, tmp_path / "ct", "ct-mxfp4a16")
    stored = load_file(GPT_OSS / "model.safetensors")
    start = STACKS[GPT_OSS]
    for expert in range(4):
        both = stored[f"{start}.gate_up_proj_bias"][expert]
        assert torch.equal(tensors[f"{start}.{expert}.gate_proj.bias"], both[::2])
        assert torch.equal(tensors[f"{start}.{expert}.up_proj.bias"], both[1::2])
    anybit.dequantize(tmp_path / "ct", tmp_path / "dense", dtype="float32")
    dense, reference = load_file(tmp_path / "dense" / "model.safetensors"), load_file(GPT_OSS / "reference.safetensors")
    for own in ("gate_up_proj", "down_proj"):
        assert torch.equal(dense[f"{start}.{own}"], reference[f"dense.{start}.{own}"])
        assert torch.equal(dense[f"{start}.{own}_bias"], stored[f"{start}.{own}_bias"].float())
    assert not [name for name in dense if ".experts.0." in name]


def test_saved_again_it_is_the_same(tmp_path: Path) -> None:
    _, tensors = converted(GPT_OSS, tmp_path / "ct", "ct-mxfp4a16")
    model: Any = anybit.load(tmp_path / "ct")
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert tensors.keys() == again.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor.contiguous().view(torch.uint8), again[name].contiguous().view(torch.uint8)), name


@pytest.mark.parametrize("scheme", ["int8", "bitnet", "gptq-4bit-g32", "hqq-4bit-g64", "fp-quant-mxfp4"])
def test_products_are_those_of_the_weights(scheme: str, tmp_path: Path) -> None:
    """Methods whose rows cannot be put in order in memory, or that round inputs: what they compute has the rows in order."""
    converted(GPT_OSS, tmp_path / "out", scheme)
    model: Any = anybit.load(tmp_path / "out", dtype=torch.float32)
    stack = model.get_submodule(STACKS[GPT_OSS]).gate_up_proj
    dense = stack.dequantize(torch.float32)  # [experts, in, out]
    x = torch.randn(12, dense.shape[1], generator=torch.Generator().manual_seed(0))
    found = stack.grouped(x, torch.tensor([3, 6, 9, 12]))
    wanted = torch.cat([x[3 * expert : 3 * expert + 3] @ dense[expert] for expert in range(4)])
    limit = 0.2 if scheme == "fp-quant-mxfp4" else 0.02  # its inputs have 4 bits, those of int8 and bitnet 8
    assert (found - wanted).norm() < limit * wanted.norm()


def test_what_stays_dense_says_why_in_the_targets_words(tmp_path: Path) -> None:
    report, tensors = converted(GPT_OSS, tmp_path / "out", "fbgemm-fp8")
    reasons = {module.reason for module in report.modules if module.kind == "dense" and ".experts." in module.name}
    assert reasons == {
        "FBGEMM FP8 has a form for the experts of Llama 4, not for GptOssExperts; one by one: "
        "FBGEMM FP8 has no form for experts that are stored one by one"
    }
    assert f"{STACKS[GPT_OSS]}.gate_up_proj" in tensors


@pytest.mark.parametrize(
    ("lost", "error", "words"),
    [
        (
            "2.up_proj.weight_packed",
            MissingTensor,
            r"experts\.2\.up_proj\.weight' is not stored, nor is 'weight_packed'",
        ),
        ("2.up_proj.bias", CorruptFile, "gate_up_proj_bias.*some are missing"),
    ],
)
def test_a_lost_expert_is_named(lost: str, error: Any, words: str, tmp_path: Path) -> None:
    _, tensors = converted(GPT_OSS, tmp_path / "out", "ct-mxfp4a16")
    del tensors[f"{STACKS[GPT_OSS]}.{lost}"]
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(error, match=words):
        anybit.load(tmp_path / "out")


# --- rows by turns ----------------------------------------------------------------------------------------------------------


def grid(seed: int) -> Weight:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (6, 64), generator=generator)
    scale = torch.rand(6, 2, generator=generator)
    return Weight(Grid(Codes.of(codes, 4), Values(scale), block=(1, 32)), "float32")


def flat(seed: int) -> Weight:
    """Groups over the flattened matrix, as HQQ and bitsandbytes have them: rows cannot be picked."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (4, 96), generator=generator)
    return Weight(View(Grid(Codes.of(codes, 4), Values(torch.rand(4, 1, generator=generator))), 6, 64), "float32")


@pytest.mark.parametrize("make", [grid, flat])
def test_rows_by_turns_and_apart_again(make: Any) -> None:
    gate, up = make(0), make(1)
    both = alternate_rows([gate, up])
    dense = both.to_dense(torch.float32)
    assert torch.equal(dense[::2], gate.to_dense(torch.float32))
    assert torch.equal(dense[1::2], up.to_dense(torch.float32))
    assert isinstance(both.tree, Transpose) == (make is flat)
    for own, wanted in zip(split_alternating(both, 2), (gate, up), strict=True):
        assert own.structure() == wanted.structure()
        assert all(torch.equal(a, b) for a, b in zip(own.tensors, wanted.tensors, strict=True))
    stack = joined([(e, Alternating(p)) for e in range(2) for p in range(2)], [gate, up, up, gate])
    assert torch.equal(stack.to_dense(torch.float32)[1, ::2], up.to_dense(torch.float32))


def test_positions_by_turns_are_not_those_of_rows_one_above_the_other() -> None:
    assert Alternating(1) != 1
    assert Alternating(1) == Alternating(1)
    assert len({(0, 1), (0, Alternating(1))}) == 2
