"""SpQR beyond the goldens: tiled outliers (PTCSR), ragged tiles, missing permutations, `shapes`."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

import anybit
from anybit.errors import CorruptFile, MissingTensor, NotRepresentable, ShapeMismatch
from anybit.methods._spqr_layout import SpqrLayout
from anybit.methods.spqr import SpQRConfig, SpQRHfQuantizer
from anybit.weight import ModuleInfo

GOLDEN = Path(__file__).parent / "golden" / "spqr" / "csr_actorder"


def half(bits: int) -> torch.Tensor:
    return torch.tensor(struct.unpack("<e", struct.pack("<H", bits))[0], dtype=torch.float16)


def signed(number: int, bits: int) -> int:
    return number - (1 << bits) if number >= 1 << (bits - 1) else number


def checkpoint(rows: int, columns: int, tiled: bool, order: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Random stored tensors and the dense weight that they mean, tile by tile and bit by bit."""
    generator = torch.Generator().manual_seed(rows * columns)

    def number(limit: int) -> int:
        return int(torch.randint(0, limit, (), generator=generator))

    across = -(-columns // 16)
    words, dense = [], torch.zeros(rows, columns)
    for down in range(rows // 16):
        for over in range(across):
            floats = torch.randn(4, generator=generator).half()
            pieces = floats.view(torch.uint8).tolist()  # ss, zs, sz, zz: eight bytes
            ss, zs, sz, zz = floats
            for k in range(16):
                ws, wz = number(8), number(8)
                word = ws | wz << 3 | pieces[k // 2] << 54
                scale, zero = ss * (ws - sz), zs * (wz - zz)
                for j in range(min(16, columns - 16 * over)):
                    q = number(8)
                    word |= q << (6 + 3 * j)
                    dense[16 * down + k, 16 * over + j] = scale * (torch.tensor(float(q)).half() - zero)
                words.append(signed(word, 64))
    lists = []
    for row in range(rows):
        own = [(number(columns), number(0x7C00)) for _ in range(number(6))]  # may name a column twice
        if row % 16 == 15:
            own = []
        lists.append(own)
        extra = torch.zeros(columns)
        for column, bits in own:
            extra[column] += half(bits).float()
        dense[row] = (dense[row] + extra).half()
    offsets, entries = [0], []
    for start in range(0, rows, 16 if tiled else 1):
        if tiled:
            longest = max(len(own) for own in lists[start : start + 16])
            for place in range(longest):
                for own in lists[start : start + 16]:
                    column, bits = own[place] if place < len(own) else (0, 0)
                    entries.append(column | bits << 16)
        else:
            entries += [column | bits << 16 for column, bits in lists[start]]
        offsets.append(len(entries))
    tensors = {
        "dense_weights": torch.tensor(words, dtype=torch.int64),
        "row_offsets": torch.tensor(offsets, dtype=torch.int32),
        "col_vals": torch.tensor([signed(word, 32) for word in entries], dtype=torch.int32),
    }
    if order == "stored":
        p = torch.randperm(columns, generator=generator)
        tensors["in_perm"] = torch.tensor(
            [signed(int(p[i]) | int(p[i + 1]) << 16, 32) for i in range(0, columns, 2)], dtype=torch.int32
        )
        put_back = torch.empty_like(dense)
        for j in range(columns):
            put_back[:, p[j]] = dense[:, j]
        dense = put_back
    elif order == "empty":
        tensors["in_perm"] = torch.empty(0, dtype=torch.int32)
    return tensors, dense


@pytest.mark.parametrize("tiled", [False, True], ids=["csr", "ptcsr"])
@pytest.mark.parametrize("order", ["stored", "empty", "absent"])
@pytest.mark.parametrize("shape", [(32, 48), (16, 42), (48, 2)])
def test_every_form_by_the_formula(shape: tuple[int, int], order: str, tiled: bool) -> None:
    tensors, wanted = checkpoint(*shape, tiled, order)
    infos = {
        name: Info(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for name, tensor in tensors.items()
    }
    module = ModuleInfo("model.layers.0.proj", "linear", shape, "float16")
    layout: Any = SpQRHfQuantizer(SpQRConfig()).layout_of(module, infos, lambda name: tensors[name])
    assert (layout.tiled, layout.permutation) == (tiled, order)
    weight = layout.decode(tensors)
    dense = weight.to_dense("float32")
    # sums of outliers at one place are rounded once, in whatever order they are added
    assert torch.allclose(dense, wanted, rtol=1e-3, atol=1e-6)
    assert (dense == wanted).float().mean() > 0.99
    stored = layout.encode(weight)
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (stored[name].dtype, stored[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(stored[name], tensor), name


class Info:
    """As much of a TensorInfo as a layout is chosen by."""

    def __init__(self, dtype: str, shape: tuple[int, ...]):
        self.dtype, self.shape = dtype, shape


@pytest.mark.parametrize("shape", [(24, 32), (31, 32), (32, 33), (32, 32770)])
def test_shapes_the_format_cannot_hold(shape: tuple[int, int]) -> None:
    module = ModuleInfo("model.layers.0.proj", "linear", shape, "float16")
    with pytest.raises(NotRepresentable, match="multiple of 16 outputs"):
        SpQRHfQuantizer(SpQRConfig()).layout_of(module, {"dense_weights": Info("int64", (1,))}, lambda name: None)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("col_vals", lambda tensor: tensor | 0x3F, "codes from"),  # column 63 of 42
        ("dense_weights", lambda tensor: tensor | 1 << 62, "bits 62 and 63"),
        ("dense_weights", lambda tensor: tensor | 7 << 51, "behind the last of 42 inputs"),
        ("row_offsets", lambda tensor: tensor.flip(0), "must never fall"),
        ("in_perm", lambda tensor: tensor * 0, "each of the 42 inputs once"),
    ],
)
def test_damage_is_named(name: str, change: Any, words: str) -> None:
    tensors, _ = checkpoint(16, 42, False, "stored")
    layout = SpqrLayout((16, 42), "float16", len(tensors["col_vals"]))
    with pytest.raises(CorruptFile, match=words) as caught:
        layout.decode({**tensors, name: change(tensors[name])})
    assert name in str(caught.value)


def test_rows_of_a_tile_that_disagree_about_its_scales() -> None:
    tensors, _ = checkpoint(16, 42, False, "stored")
    tensors["dense_weights"][0] ^= 1 << 54
    with pytest.raises(CorruptFile, match=r"rows 0 and 1 of tile \[0, 0\] disagree"):
        SpqrLayout((16, 42), "float16", len(tensors["col_vals"])).decode(tensors)


def edited(folder: Path, name: str, length: int | None) -> Path:
    shutil.copytree(GOLDEN, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["shapes"][name] = length
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_shapes_of_the_configuration_hold(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.col_vals"
    with pytest.raises(ShapeMismatch, match=f"'{name}' has shape .* 'shapes' says 7"):
        anybit.load(edited(tmp_path / "copy", f"{name}.shape", 7))


def test_a_permutation_that_shapes_lists_must_be_there() -> None:
    module = ModuleInfo("model.layers.0.proj", "linear", (16, 32), "float16")
    stored = {
        "dense_weights": Info("int64", (32,)),
        "row_offsets": Info("int32", (17,)),
        "col_vals": Info("int32", (0,)),
    }
    quantizer = SpQRHfQuantizer(SpQRConfig(shapes={"model.layers.0.proj.in_perm.shape": 16}))
    with pytest.raises(MissingTensor, match=r"model\.layers\.0\.proj\.in_perm"):
        quantizer.layout_of(module, stored, lambda name: None)
    empty = SpQRHfQuantizer(SpQRConfig(shapes={"model.layers.0.proj.in_perm.shape": 0}))
    assert empty.layout_of(module, stored, lambda name: None).permutation == "absent"  # type: ignore[union-attr]
