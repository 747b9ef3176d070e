"""Conversion through the weight tree: exact where grids nest, stated where they do not, refused where nobody allowed more."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import anybit
from anybit import AwqConfig, BitsAndBytesConfig, GPTQConfig
from anybit.cli.schemes import from_scheme
from anybit.containers import Checkpoint
from anybit.errors import ConfigError, NotRepresentable
from anybit.weight import Codes, Crop, Divided, Grid, Rotate, Transpose, Values, View, Weight
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


def dense_of(model: Any) -> dict[str, torch.Tensor]:
    return {
        name: module.dequantize(torch.float32)
        for name, module in model.named_modules()
        if hasattr(module, "quantized_weight")
    }


def converted(source: Path, target: Path, config: Any, **options: Any) -> tuple[Any, Any, Any]:
    """(report, source's model, converted model)."""
    report = anybit.convert(source, target, config, **options)
    return report, anybit.load(source, dtype=torch.float32), anybit.load(target, dtype=torch.float32)


def test_inputs_quantized_alike_are_no_reason_to_refuse(tmp_path: Path) -> None:
    """FP8 rows with a scale for each token: two packages, one thing. fbgemm stores the scale in float32, so nothing is rounded."""
    source = GOLDEN / "compressed-tensors" / "legacy-sparse24-fp8"
    report, before, after = converted(source, tmp_path / "out", from_scheme("fbgemm-fp8"))
    assert set(report.counts) == {"exact"}
    assert all("'fbgemm_fp8'" in module.inputs for module in report.modules)
    left, right = dense_of(before), dense_of(after)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_inputs_quantized_otherwise_must_be_allowed_and_keep_the_weight(tmp_path: Path) -> None:
    source = GOLDEN / "fbgemm_fp8" / "llama4_experts"
    with pytest.raises(NotRepresentable, match=r"inputs by 'fbgemm_fp8', the target by 'no rule'.*allow_requantize"):
        anybit.convert(source, tmp_path / "out", from_scheme("torchao-float8"))
    assert list(tmp_path.iterdir()) == []
    report = anybit.convert(source, tmp_path / "out", from_scheme("torchao-float8"), allow_requantize=True)
    linear = [module for module in report.modules if module.kind != "dense"]
    assert linear
    assert {module.kind for module in linear} == {"exact"}
    assert all("no rule" in module.inputs for module in linear)


def test_weights_stored_rotated_are_turned_back_before_they_are_rounded(tmp_path: Path) -> None:
    """QuIP's Hadamard matrices turn the inputs at run time; a target that does not know them must get the plain weight."""
    source = GOLDEN / "compressed-tensors" / "quip-hadamard-v-w4a16"
    config = GPTQConfig(bits=8, group_size=32)
    with pytest.raises(NotRepresentable, match="a rotation of its input"):
        anybit.convert(source, tmp_path / "out", config)
    report = anybit.convert(source, tmp_path / "out", config, allow_requantize=True)
    assert "model.layers.0.mlp.down_proj.v_input.weight" in report.left_out
    anybit.dequantize(source, tmp_path / "dense", dtype="float32")
    wanted: Any = anybit.load(tmp_path / "dense")
    found = dense_of(anybit.load(tmp_path / "out", dtype=torch.float32))
    assert found
    for name, weight in found.items():
        dense = wanted.get_submodule(name).weight
        assert (weight - dense).norm() < 0.01 * dense.norm(), name


def test_scales_of_a_cache_are_left_out_and_named(tmp_path: Path) -> None:
    report = anybit.convert(
        GOLDEN / "compressed-tensors" / "w4a16-kv-fp8", tmp_path / "out", GPTQConfig(bits=4, group_size=128)
    )
    assert report.left_out == ["model.layers.0.self_attn.k_scale", "model.layers.0.self_attn.v_scale"]
    assert not [name for name in Checkpoint.open(tmp_path / "out").tensors if "k_scale" in name]


def test_experts_stacked_under_a_name_of_their_own_come_apart(tmp_path: Path) -> None:
    """MLX's switch_mlp is one tensor for all experts; elsewhere each has a name, as in transformers' own checkpoints."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    settings = Qwen3MoeConfig(
        hidden_size=64, intermediate_size=64, moe_intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, vocab_size=64, num_experts=3, num_experts_per_tok=2, dtype="float32",
    )  # fmt: skip
    Qwen3MoeForCausalLM(settings).save_pretrained(tmp_path / "dense")
    anybit.quantize(tmp_path / "dense", tmp_path / "mlx", from_scheme("mlx-4bit-g32"))
    tensors = load_file(tmp_path / "mlx" / "model.safetensors")
    stacked = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for name in tensors:
        if ".experts.0." in name:
            own = [tensors[name.replace(".experts.0.", f".experts.{expert}.")] for expert in range(3)]
            stacked[name.replace(".experts.0.", ".switch_mlp.")] = torch.stack(own)
    save_file(stacked, tmp_path / "mlx" / "model.safetensors", metadata={"format": "mlx"})
    report, before, after = converted(
        tmp_path / "mlx", tmp_path / "out", from_scheme("hqq-4bit-g64"), allow_requantize=True
    )
    names = set(Checkpoint.open(tmp_path / "out").tensors)
    assert "model.layers.0.mlp.experts.2.down_proj.W_q" in names
    assert not [name for name in names if "switch_mlp" in name]
    assert {module.name for module in report.modules} >= {f"model.layers.0.mlp.experts.{i}.up_proj" for i in range(3)}
    assert torch.allclose(logits_of(after), logits_of(before), atol=0.3)


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


def test_an_offset_is_a_zero_point_only_if_it_is_whole_steps() -> None:
    """tinygemm's zeros: any number in bfloat16. (8 - z) s, rounded, is the zero point z; half a step more is none."""
    codes = torch.randint(0, 16, (6, 64), generator=torch.Generator().manual_seed(0))
    scale = torch.rand(6, 2) + 0.5
    zero = torch.randint(0, 16, (6, 2), generator=torch.Generator().manual_seed(1)).float()
    target = on_meta(grid(codes, 4, scale=Values(scale), zero=Codes.of(zero, 4), block=(1, 32)))
    scale, offset = scale.to(torch.bfloat16), (-zero * scale).to(torch.bfloat16)
    found = rewrite(grid(codes, 4, scale=Values(scale), offset=Values(offset), block=(1, 32)), target)
    assert torch.equal(found.tree.zero.integers(), zero)  # type: ignore[attr-defined]
    offset = (-(zero + 0.5) * scale).to(torch.bfloat16)
    with pytest.raises(NotRepresentable, match=r"steps is no whole zero point"):
        rewrite(grid(codes, 4, scale=Values(scale), offset=Values(offset), block=(1, 32)), target)


def test_an_offset_becomes_a_float_zero_point() -> None:
    """HQQ's zero points are numbers: (code - zero) * scale is MLX's code * scale + offset for zero = -offset / scale."""
    codes = torch.randint(0, 16, (6, 64), generator=torch.Generator().manual_seed(0))
    scale, offset = torch.rand(6, 2) + 0.5, torch.randn(6, 2)
    source = grid(codes, 4, scale=Values(scale), offset=Values(offset), block=(1, 32))
    target = on_meta(grid(codes, 4, scale=Values(scale), zero=Values(offset), block=(1, 32)))
    found = rewrite(source, target)
    assert torch.allclose(found.tree.zero.tensor, -offset / scale)  # type: ignore[attr-defined]
    assert torch.allclose(found.to_dense(), source.to_dense(), atol=1e-5)


def two_scales(codes: torch.Tensor, scales: torch.Tensor, unit: Any) -> Weight:
    """NVFP4: E2M1 codes, E4M3 scales of 16 columns, one scale of all scales."""
    return grid(codes, 4, levels="e2m1", scale=Grid(Codes.of(scales, 8), unit, levels="e4m3"), block=(1, 16))


def test_scales_of_scales_in_three_spellings() -> None:
    """g, 1 / g and g * 2688 / 2688: modelopt, compressed-tensors and fouroversix store one number in three ways."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (4, 64), generator=generator)
    scales = torch.randint(1, 127, (4, 4), generator=generator)  # 127 is NaN
    unit = torch.tensor([[0.0123]])
    source = two_scales(codes, scales, Values(unit))
    for spelling in (Values(1 / unit, inverted=True), Divided(Values(unit * 2688), 2688.0)):
        found = rewrite(source, on_meta(two_scales(codes, scales, spelling)))
        assert torch.equal(found.tree.scale.codes.integers(), scales)  # type: ignore[attr-defined]
        assert torch.allclose(found.to_dense(), source.to_dense(), rtol=3e-7)


def test_powers_of_two_become_scales_of_scales() -> None:
    """MXFP4's groups of 32 with scales 2^k are NVFP4's groups of 16, if the powers lie within E4M3's range."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (4, 64), generator=generator)
    powers = torch.randint(100, 110, (4, 2), generator=generator, dtype=torch.uint8)
    source = grid(codes, 4, levels="e2m1", scale=Values(powers, levels="e8m0"), block=(1, 32))
    target = on_meta(two_scales(codes, torch.zeros(4, 4, dtype=torch.int32), Values(torch.ones(1, 1))))
    assert torch.equal(rewrite(source, target).to_dense(), source.to_dense())
    powers[0, 0], powers[1, 1] = 60, 110
    with pytest.raises(NotRepresentable, match="codes times one unit"):
        rewrite(source, target)


def test_padding_repeats_what_lies_beside_it() -> None:
    """tinygemm's tiles are padded to 1024 columns, which a crop takes away again."""
    codes = torch.randint(0, 16, (6, 96), generator=torch.Generator().manual_seed(0))
    source = grid(codes, 4, scale=Values(torch.rand(6, 3) + 0.5), block=(1, 32))
    padded = Grid(Codes.of(torch.zeros(8, 128), 4), Values(torch.ones(8, 4)), block=(1, 32))
    found = rewrite(source, on_meta(Weight(Crop(padded, 6, 96), "float32")))
    assert torch.equal(found.to_dense(), source.to_dense())


def test_rotated_weights_keep_their_codes_only_under_the_same_rotation() -> None:
    codes = torch.randint(0, 16, (4, 64), generator=torch.Generator().manual_seed(0))
    plain = grid(codes, 4, scale=Values(torch.rand(4, 2)), block=(1, 32))
    turned = Weight(Rotate(plain.tree, 32), "float32")
    assert torch.equal(
        rewrite(turned, on_meta(Weight(Rotate(plain.tree, 32), "float16"))).to_dense("float32"), turned.to_dense()
    )
    wider = on_meta(Weight(Rotate(grid(codes, 8, scale=Values(torch.rand(4, 2)), block=(1, 32)).tree, 32), "float32"))
    assert torch.equal(rewrite(turned, wider).to_dense(), turned.to_dense())
    for source, target, words in (
        (turned, plain, "is stored rotated, in blocks of 32 inputs"),
        (plain, turned, "target stores the weight rotated, in blocks of 32 inputs"),
        (turned, Weight(Rotate(plain.tree, 64), "float32"), "blocks of different sizes"),
    ):
        with pytest.raises(NotRepresentable, match=words):
            rewrite(source, on_meta(target))


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
