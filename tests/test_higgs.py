"""HIGGS beyond the goldens: FLUTE's order for every width and tile, padding, mislabelled tables, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import anybit
from anybit.algorithms import higgs
from anybit.errors import AnybitError, CorruptFile, NotRepresentable
from anybit.methods._higgs_layout import HiggsLayout, are_bfloat16_bits
from anybit.methods.higgs import HiggsConfig, HiggsHfQuantizer
from anybit.weight import ModuleInfo, Weight
from anybit.weight.weight import same

GOLDEN = Path(__file__).parent / "golden" / "higgs" / "b4_p2_g128_h256_tile32"
TINY = Path(__file__).parent.parent / "examples" / "tiny-llama"
J = (0, 3, 6, 9, 12, 1, 4, 7, 10, 13, 2, 5, 8, 11, 14, 15)


def flute(q: torch.Tensor, bits: int, tile: int) -> torch.Tensor:
    """Codes [in, out] -> FLUTE's words, field by field, as the packer's inverse is described."""
    inputs, outputs = q.shape
    codes = q.tolist()
    words = [[0] * inputs for _ in range(outputs * bits // 16)]
    if bits == 3:
        for k2 in range(inputs // 2):
            for c in range(outputs // 512):
                for p in range(32):
                    stream = 0
                    for t in range(32):
                        stream |= codes[2 * k2 + 1 - t % 2][c * 512 + J[t // 2] * 32 + p] << (3 * t)
                    places = [(i, h, b) for i in range(3) for h, count in ((0, 16), (1, 14)) for b in range(count)]
                    places += [(i, 1, b) for i in range(3) for b in (14, 15)]
                    for position, (i, h, b) in enumerate(places):
                        row = c * 32 + p if i == 0 else outputs // 16 + (c * 2 + i - 1) * 32 + p
                        words[row][2 * k2 + h] |= (stream >> position & 1) << b
    else:
        fields = 16 // bits
        for c in range(outputs // (fields * tile)):
            for p in range(tile):
                for column in range(inputs):
                    k2, h = divmod(column, 2)
                    for t in range(fields):
                        n = c * fields * tile + (h * fields // 2 + t // 2) * tile + p
                        words[c * tile + p][column] |= codes[2 * k2 + 1 - t % 2][n] << (bits * t)
    return torch.tensor(words, dtype=torch.int32).to(torch.int16)


@pytest.mark.parametrize(("bits", "tile"), [(2, 32), (2, 64), (3, 32), (4, 32), (4, 64)])
def test_the_order_of_every_width_and_tile(bits: int, tile: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    layout = HiggsLayout((1024, 100), "float32", bits, 64, 64, tile)  # padded to 128 inputs
    q = torch.randint(0, 1 << bits, (128, 1024), generator=generator)
    entries = 1 << bits
    pairs = torch.randn(entries, entries, 2, generator=generator).half()
    tensors = {
        "weight": flute(q, bits, tile),
        "scales": torch.rand(1024, 2, generator=generator).half(),
        "tables": torch.arange(entries).half(),
        "tables2": pairs,
    }
    weight = layout.decode(tensors)
    rotated = pairs.float()[q[0::2].T, q[1::2].T].reshape(1024, 128)
    rotated = rotated * tensors["scales"].float().repeat_interleave(64, 1)
    index = torch.arange(64)
    parity = torch.tensor([[bin(int(i & j)).count("1") % 2 for j in index] for i in index])
    hadamard = (1 - 2 * parity).float() / 8
    wanted = (rotated.view(1024, 2, 64) @ hadamard).view(1024, 128)[:, :100]
    assert torch.allclose(weight.to_dense("float32"), wanted, atol=1e-5)
    stored = layout.encode(weight)
    assert stored.keys() == tensors.keys()
    assert all(torch.equal(stored[name], tensors[name]) for name in tensors)


def test_tables_of_a_bfloat16_model_under_the_label_float16() -> None:
    grid = torch.tensor([-1.5104, -0.45278, 0.45278, 1.5104])
    pairs = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), -1)
    mislabelled = pairs.bfloat16().view(torch.float16)
    assert are_bfloat16_bits(mislabelled)
    assert not are_bfloat16_bits(pairs.half())
    layout = HiggsLayout((256, 64), "bfloat16", 2, 64, 64, 32, "bfloat16", "bfloat16", "bfloat16", "float16")
    tensors = {
        "weight": torch.zeros(32, 64, dtype=torch.int16),
        "scales": torch.ones(256, 1, dtype=torch.bfloat16),
        "tables": grid.bfloat16(),
        "tables2": mislabelled,
    }
    weight = layout.decode(tensors)
    assert weight.to_dense("float32")[0, 0] == pytest.approx(8 * -1.5104, rel=0.01)  # a constant run: all in one input
    assert torch.equal(layout.encode(weight)["tables2"].view(torch.int16), mislabelled.view(torch.int16))


@pytest.mark.parametrize(
    ("bits", "template", "tile"), [(4, 0, 64), (4, 16, 32), (4, 48, 64), (2, 3, 64), (2, 4, 32), (3, 4, 32), (3, 8, 32)]
)
def test_templates_tell_the_tile(bits: int, template: int, tile: int) -> None:
    quantizer = HiggsHfQuantizer(HiggsConfig(bits=bits))
    assert quantizer._tile("x", {"template_id": template}) == tile


def test_templates_whose_order_is_unknown_are_refused() -> None:
    with pytest.raises(NotRepresentable, match="template_id 0"):
        HiggsHfQuantizer(HiggsConfig(bits=3))._tile("x", {"template_id": 0})


def edited(folder: Path, **changes: Any) -> Path:
    shutil.copytree(GOLDEN, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(changes)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_without_tune_metadata_nothing_is_guessed(tmp_path: Path) -> None:
    with pytest.raises(AnybitError, match="template_id"):
        anybit.load(edited(tmp_path / "copy", tune_metadata=None))


def test_damaged_tables_are_refused() -> None:
    layout = HiggsLayout((256, 64), "float16", 2, 64, 64)
    tensors = {
        "weight": torch.zeros(32, 64, dtype=torch.int16),
        "scales": torch.ones(256, 1).half(),
        "tables": torch.arange(4).half(),
        "tables2": torch.full((4, 4, 2), float("nan")).half(),
    }
    with pytest.raises(CorruptFile, match="tables2"):
        layout.decode(tensors)


# --- creation -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("bits", "p"), [(2, 1), (3, 1), (4, 1), (2, 2), (3, 2), (4, 2)])
def test_codes_are_the_vendors(bits: int, p: int, dtype: str) -> None:
    """The steps of transformers' quantize_with_higgs, written out; the order of the codes has its own test above."""
    from transformers.integrations.higgs import get_higgs_grid

    dense = torch.randn(512, 100, generator=torch.Generator().manual_seed(bits)).to(getattr(torch, dtype)) * 0.02
    dense[3] = 0
    quantizer = HiggsHfQuantizer(HiggsConfig(bits=bits, p=p, group_size=64, hadamard_size=64), pre_quantized=False)
    layout: Any = quantizer.layout_for(ModuleInfo("model.layers.0.proj", "linear", (512, 100), dtype))
    weight = higgs.quantize(dense, layout.scheme(), **layout.algorithm_options())
    stored = layout.encode(weight)
    assert same(layout.decode(stored), weight)

    grid = get_higgs_grid(p, 2 ** (p * bits))
    signs = torch.tensor([[(-1.0) ** bin(i & j).count("1") for j in range(64)] for i in range(64)])
    blocks = torch.nn.functional.pad(dense.float(), (0, 28)).view(512, 2, 64)
    norm = blocks.norm(dim=-1)
    unit = (blocks @ signs / norm.clamp(min=1e-30)[..., None]).view(-1, p)
    codes = (2 * unit @ grid.T - grid.square().sum(1)).argmax(-1)
    points = grid.to(dense.dtype).float()[codes].view(512, 2, 64)
    scale = (norm / 8).to(dense.dtype)
    wanted = (points * scale.float()[..., None] @ signs / 8).view(512, 128)[:, :100]
    off = (weight.to_dense("float32") - wanted).abs().amax(
        1
    ) > 1e-5  # a row in which another sum of products tips a code
    assert off.float().mean() < 0.01
    assert torch.equal(stored["scales"], scale)
    if p == 1:
        assert torch.equal(stored["tables2"].view(dense.dtype)[1, 2], grid[[1, 2], 0].to(dense.dtype))
        assert torch.equal(stored["tables"], grid[:, 0].to(dense.dtype))
    # mean squared errors of the best scalar codes for a Gaussian (Max 1960); pairs are a little better
    whole = Weight(weight.tree.child, "float32").to_dense("float32")  # type: ignore[attr-defined]
    error = float((whole - blocks.view(512, 128)).square().sum() / blocks.square().sum())
    best = {2: 0.1175, 3: 0.03454, 4: 0.009497}[bits]
    assert (0.9 if p == 1 else 0.75) * best < error < (1.03 if p == 1 else 1) * best


def test_a_checkpoint_made_on_load_and_file_to_file(tmp_path: Path) -> None:
    config = HiggsConfig(bits=2, group_size=256, hadamard_size=256)
    given = config.to_dict()
    plan = anybit.quantize(TINY, tmp_path / "made", config)
    assert config.to_dict() == given  # it can be used again
    skipped = {entry.slot.module for entry in plan.entries if entry.action == "dense"}
    assert "model.layers.0.self_attn.k_proj" in skipped  # 128 outputs, and 256 are stored together
    tuned = json.loads((tmp_path / "made" / "config.json").read_text())["quantization_config"]["tune_metadata"]
    assert tuned["model.layers.0.mlp.down_proj"]["template_id"] == 4
    assert tuned.keys() == {entry.slot.module for entry in plan.entries if entry.action == "quantize"}
    ids = torch.arange(20)[None]
    with torch.no_grad():
        made, loaded = (
            anybit.load(tmp_path / "made"),
            anybit.load(TINY, HiggsConfig(bits=2, group_size=256, hadamard_size=256)),
        )
        assert torch.equal(made(ids).logits, loaded(ids).logits)
    loaded.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(anybit.load(tmp_path / "saved")(ids).logits, made(ids).logits)


def test_better_than_rounding_at_the_same_size() -> None:
    """Weights of a trained model: 2.06 bits against 2.25 of groups of 64 with a scale and a zero point, 4.06 against 4.25."""
    dense = load_file(TINY / "model.safetensors")["model.layers.3.mlp.gate_proj.weight"].float()
    for bits, limit in ((2, 0.6), (4, 1.0)):
        quantizer = HiggsHfQuantizer(HiggsConfig(bits=bits, group_size=256, hadamard_size=256), pre_quantized=False)
        layout: Any = quantizer.layout_for(ModuleInfo("model.layers.3.mlp.gate_proj", "linear", (768, 256), "bfloat16"))
        ours = higgs.quantize(dense, layout.scheme(), **layout.algorithm_options()).to_dense("float32")
        groups = dense.view(768, -1, 64)
        low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
        step = (high - low) / (2**bits - 1)
        nearest = (((groups - low) / step).round() * step + low).view(dense.shape)
        assert (ours - dense).square().sum() < limit * (nearest - dense).square().sum()
