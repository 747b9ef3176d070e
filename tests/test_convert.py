"""Conversion through the weight tree: exact where grids nest, stated where they do not, refused where nobody allowed more."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import anybit
from anybit import AwqConfig, BitsAndBytesConfig, GPTQConfig
from anybit.errors import ConfigError, NotRepresentable
from anybit.weight import Codes, Grid, Transpose, Values, View, Weight
from anybit.weight.rewriting import rewrite

GOLDEN = Path(__file__).parent / "golden"
IDS = torch.arange(24).view(2, 12) * 5 % 64


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(IDS).logits
    return logits


EXACT = {
    "awq gemm -> gptq": ("awq/w4_g128_zp_gemm", lambda: GPTQConfig(bits=4, group_size=128, sym=False, format="gptq_v2")),
    "awq gemv -> gptq, smaller groups": ("awq/w4_g64_zp_gemv", lambda: GPTQConfig(bits=4, group_size=32, format="gptq_v2", sym=False)),
    "gptq -> awq": ("gptq/w4_g128_sym", lambda: AwqConfig(bits=4, group_size=128)),
    "gptq 3 bit -> gptq 8 bit": ("gptq/w3_g64_sym", lambda: GPTQConfig(bits=8, group_size=64)),
    "nf4 nested -> nf4": ("bitsandbytes/nf4_double_quant", lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")),
}  # fmt: skip


@pytest.mark.parametrize("row", EXACT)
def test_exact(row: str, tmp_path: Path) -> None:
    source, config = EXACT[row]
    report = anybit.convert(GOLDEN / source, tmp_path / "out", config())
    assert set(report.counts) == {"exact"}, report.counts
    before: Any = anybit.load(GOLDEN / source, dtype=torch.float32)
    after: Any = anybit.load(tmp_path / "out", dtype=torch.float32)
    assert after.hf_quantizer.quantization_config.quant_method == config().quant_method
    for (name, ours), (_, theirs) in zip(after.named_modules(), before.named_modules(), strict=True):
        if hasattr(ours, "quantized_weight"):
            assert torch.equal(ours.dequantize(torch.float32), theirs.dequantize(torch.float32)), name
    # the weights are equal; kernels for other widths add products in another order
    assert (logits_of(after) - logits_of(before)).abs().max() <= 1e-4 * logits_of(before).abs().max()


def test_there_and_back_gives_the_same_bytes(tmp_path: Path) -> None:
    source = GOLDEN / "awq" / "w4_g128_zp_gemm"
    anybit.convert(source, tmp_path / "gptq", GPTQConfig(bits=4, group_size=128, sym=False, format="gptq_v2"))
    anybit.convert(tmp_path / "gptq", tmp_path / "awq", AwqConfig(bits=4, group_size=128))
    from anybit.containers import Checkpoint

    first, last = Checkpoint.open(source), Checkpoint.open(tmp_path / "awq")
    assert set(first.tensors) == set(last.tensors)
    for name in first.tensors:
        a, b = first.read(name), last.read(name)
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name


def test_rescaled_states_its_error(tmp_path: Path) -> None:
    report = anybit.convert(
        GOLDEN / "awq" / "w4_g128_zp_gemv_fast",
        tmp_path / "out",
        GPTQConfig(bits=4, group_size=128, sym=False, format="gptq_v2"),
    )
    assert set(report.counts) == {"rescaled"}
    assert 0 < report.largest_error < 1e-3
    assert all("fewer bits" in module.reason for module in report.modules)


def test_requantizing_needs_permission_and_states_its_error(tmp_path: Path) -> None:
    source = GOLDEN / "gptq" / "w4_g32_asym_desc_act"
    config = AwqConfig(bits=4, group_size=128)
    with pytest.raises(
        NotRepresentable, match=r"q_proj cannot be written as awq with its codes kept.*groups.*allow_requantize"
    ):
        anybit.convert(source, tmp_path / "out", config)
    assert list(tmp_path.iterdir()) == []
    report = anybit.convert(source, tmp_path / "out", config, allow_requantize=True)
    assert set(report.counts) == {"requantized"}
    assert 0.01 < report.largest_error < 0.3
    assert json.loads(json.dumps(report.to_dict()))["counts"] == report.counts
    assert torch.isfinite(logits_of(anybit.load(tmp_path / "out"))).all()


def test_a_dense_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not quantized"):
        anybit.convert(Path(__file__).parent.parent / "examples" / "tiny-llama", tmp_path / "out", GPTQConfig(bits=4))


# --- the rewrite itself -----------------------------------------------------------------------------------------------------


def grid(codes: torch.Tensor, bits: int, signed: bool = False, **parts: Any) -> Weight:
    return Weight(Grid(Codes.of(codes, bits, signed), **parts), "float32")


def on_meta(weight: Weight) -> Weight:
    return weight.map(lambda tensor: tensor.to("meta"))


def test_a_symmetric_grid_becomes_one_with_an_offset() -> None:
    """w = s * c with c in -8..7 is s * (c + 8) - 8 s: MLX's form, with the offset exact when s has bits to spare."""
    codes = torch.randint(-8, 8, (6, 64), generator=torch.Generator().manual_seed(0))
    codes[0, 0] = -8
    scale = torch.rand(6, 2).to(torch.bfloat16)
    source = grid(codes, 4, True, scale=Values(scale), block=(1, 32))
    target = grid(
        torch.zeros(6, 64), 4, scale=Values(torch.ones(6, 2, dtype=torch.bfloat16)), offset=Values(torch.ones(6, 2, dtype=torch.bfloat16)),
        block=(1, 32),
    )  # fmt: skip
    found = rewrite(source, on_meta(target))
    assert torch.equal(found.to_dense(torch.float32), source.to_dense(torch.float32))


def test_groups_over_a_flattened_weight_and_transposed_targets() -> None:
    codes = torch.randint(0, 16, (8, 64), generator=torch.Generator().manual_seed(1))
    scale = torch.rand(8, 4)
    source = grid(codes, 4, scale=Values(scale), zero=Values(torch.full((8, 4), 7.0)), block=(1, 16))
    flat = Grid(Codes.of(torch.zeros(32, 16), 4), Values(torch.ones(32, 1)), Values(torch.ones(32, 1)), block=(1, 16))
    turned = Grid(Codes.of(torch.zeros(64, 8), 4), Values(torch.ones(4, 8)), Values(torch.ones(4, 8)), block=(16, 1))
    for tree in (View(flat, 8, 64), Transpose(turned)):
        found = rewrite(source, on_meta(Weight(tree, "float32")))
        assert torch.equal(found.to_dense(), source.to_dense())


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (lambda: grid(torch.zeros(4, 32), 2, scale=Values(torch.ones(4, 2)), block=(1, 16)), "do not fit"),
        (lambda: grid(torch.zeros(4, 32), 4, scale=Values(torch.ones(4, 1)), block=(1, 32)), "several values of scale"),
        (
            lambda: grid(torch.zeros(4, 32), 4, levels="nf4", scale=Values(torch.ones(4, 2)), block=(1, 16)),
            "table has no value",
        ),
        (lambda: grid(torch.zeros(4, 16), 4), "cannot take the form"),
    ],
)
def test_what_does_not_fit_is_said(target: Any, words: str) -> None:
    codes = torch.arange(4 * 32).view(4, 32) % 16
    source = grid(codes, 4, scale=Values(torch.rand(4, 2) + 0.5), block=(1, 16))
    with pytest.raises(NotRepresentable, match=words):
        rewrite(source, on_meta(target()))
