"""AQLM beyond the goldens: other shapes of code vectors, wrap-around of odd widths, names of parameters, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import anybit
from anybit.errors import CorruptFile
from anybit.methods._aqlm_layout import AqlmLayout
from anybit.modules.packed import PackedWeight

GOLDEN = Path(__file__).parent / "golden" / "aqlm" / "2x8_g8"


@pytest.mark.parametrize(
    ("books", "bits", "out_group", "in_group"),
    [(1, 12, 1, 8), (3, 5, 2, 4), (8, 8, 1, 16), (2, 9, 4, 1), (1, 17, 1, 8)],
)
@pytest.mark.parametrize("grouped", [False, True])
def test_any_code_vectors_by_the_formula(books: int, bits: int, out_group: int, in_group: int, grouped: bool) -> None:
    generator = torch.Generator().manual_seed(bits)
    layout = AqlmLayout((8, 32), "float32", books, bits, out_group, in_group, "float16", grouped)
    down, across = layout.tiles
    codes = torch.randint(0, 1 << bits, (down, across, books), generator=generator)
    codes[0, 0, 0] = (1 << bits) - 1
    wrapped = torch.where(codes >= 1 << (bits - 1), codes - (1 << bits), codes)
    tensors = {
        "codes": wrapped.to(getattr(torch, layout.code_dtype)),
        "codebooks": torch.randn(books, 1 << bits, out_group, in_group, generator=generator).half(),
        "scales": torch.rand(down, across if grouped else 1, 1, 1, generator=generator).half(),
    }
    weight = layout.decode(tensors)
    tables, scales = tensors["codebooks"].float(), tensors["scales"].float().expand(down, across, 1, 1)
    wanted = torch.empty(8, 32)
    for o in range(down):
        for i in range(across):
            tile = sum((tables[k, codes[o, i, k]] for k in range(books)), torch.zeros(out_group, in_group))
            wanted[o * out_group : (o + 1) * out_group, i * in_group : (i + 1) * in_group] = tile * scales[o, i]
    assert torch.equal(weight.to_dense("float32"), wanted)
    stored = layout.encode(weight)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in stored.items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()
    }
    assert all(torch.equal(stored[name], tensors[name]) for name in tensors)


def test_codes_of_another_width_are_refused() -> None:
    layout = AqlmLayout((4, 8), bits=12)
    tensors = {
        "codes": torch.full((4, 1, 1), 2048, dtype=torch.int16),  # 12 bits in two's complement end at 2047
        "codebooks": torch.zeros(1, 4096, 1, 8, dtype=torch.float16),
        "scales": torch.ones(4, 1, 1, 1, dtype=torch.float16),
    }
    with pytest.raises(CorruptFile, match="'codes' holds codes from 2048"):
        layout.decode(tensors)


def test_parameter_names_leave_the_output_layer_dense() -> None:
    config = json.loads((GOLDEN / "config.json").read_text())["quantization_config"]
    assert "lm_head.weight" in config["linear_weights_not_to_quantize"]
    model = anybit.load(GOLDEN)
    assert not isinstance(model.lm_head, PackedWeight)
    assert isinstance(model.model.layers[0].mlp.down_proj, PackedWeight)


def test_what_is_quantized_is_told_by_the_tensors(tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(GOLDEN, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["linear_weights_not_to_quantize"] = []
    (folder / "config.json").write_text(json.dumps(config))
    ids = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.equal(anybit.load(folder)(ids).logits, anybit.load(GOLDEN)(ids).logits)
