"""VPTQ beyond the goldens: outlier columns, groups, norms of rows, wide indices, shared settings, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from anybit.errors import AnybitError, CorruptFile, NotRepresentable, ShapeMismatch
from anybit.methods._vptq_layout import VptqLayout
from anybit.methods.vptq import VptqConfig, VptqHfQuantizer
from anybit.weight import ModuleInfo


def stream(rows: list[list[int]], bits: int) -> torch.Tensor:
    """Numbers of `bits` bits as little-endian words of 32, bit by bit as the format is described."""
    words = [[0] * -(-len(row) * bits // 32) for row in rows]
    for own, row in zip(words, rows, strict=True):
        for column, number in enumerate(row):
            for bit in range(bits):
                place = column * bits + bit
                own[place // 32] |= (number >> bit & 1) << (place % 32)
    return torch.tensor(words, dtype=torch.int64).to(torch.int32)


def checkpoint(layout: VptqLayout, seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Random stored tensors and the dense weight that they mean, by plain loops."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = layout.shape
    v, k, r = layout.vector, layout.entries, layout.residuals
    ib, rb = k.bit_length() - 1, r.bit_length() - 1 if r else 0
    size, down = (columns - layout.outliers) // layout.groups, -(-rows // v)
    main = torch.randint(0, k, (layout.groups, down, size), generator=generator)
    rest = torch.randint(0, max(r, 1), (layout.groups, down, size), generator=generator)
    main[0, 0, 0], rest[0, 0, 0] = k - 1, max(r, 1) - 1  # all bits set
    books = torch.randn(layout.groups, k, v, generator=generator).half()
    tensors = {
        "centroids.weight": books.reshape(layout.groups, -1),
        "indices": torch.stack([stream((main[g] | rest[g] << ib).tolist(), ib + rb) for g in range(layout.groups)]),
    }
    residual = torch.randn(layout.groups, max(r, 1), v, generator=generator).half()
    if r:
        tensors["res_centroids.weight"] = residual.reshape(layout.groups, -1)
    v0, k0 = layout.outlier_vector, layout.outlier_entries
    if layout.outliers:
        outlier_books = torch.randn(k0, v0, generator=generator).half()
        chosen = torch.randint(0, k0, (-(-rows // v0), layout.outliers), generator=generator)
        tensors["outlier_centroids.weight"] = outlier_books.reshape(1, -1)
        tensors["outlier_indices"] = chosen.to(torch.int16)[None].view(getattr(torch, layout.index_dtype))
    quantized = torch.zeros(rows, columns)
    for o in range(rows):
        for c in range(layout.outliers):
            quantized[o, c] = outlier_books[chosen[o // v0, c], o % v0]
        for g in range(layout.groups):
            for c in range(size):
                value = books[g, main[g, o // v, c], o % v].float()
                if r:
                    value = value + residual[g, rest[g, o // v, c], o % v].float()
                quantized[o, layout.outliers + g * size + c] = value
    if layout.permuted:
        perm = torch.randperm(columns, generator=generator)
        tensors["perm"] = perm.to(torch.int16)
        unpermuted = torch.empty_like(quantized)
        for j in range(columns):
            unpermuted[:, perm[j]] = quantized[:, j]
        quantized = unpermuted
    if layout.norm_axis is not None:
        count = rows if layout.norm_axis == 1 else columns
        scale, bias = torch.rand(2, count, generator=generator).half()
        tensors |= {"weight_scale": scale.clone(), "weight_bias": bias.clone()}
        axis = (slice(None), None) if layout.norm_axis == 1 else (None, slice(None))
        quantized = quantized * scale.float()[axis] + bias.float()[axis]
    return tensors, quantized


@pytest.mark.parametrize(
    "layout",
    [
        VptqLayout((24, 40), "float32", 8, 16, 4, 1, 8, 4, 10),  # outlier columns, of another vector length
        # 31744 and more are infinity and NaN of float16
        VptqLayout((400, 40), "float32", 8, 16, 4, 1, 8, 2, 40000, index_dtype="float16"),
        VptqLayout((22, 40), "float32", 6, 32, 0, 4, 0, norm_axis=None),  # groups; rows that 6 does not divide
        VptqLayout((21, 42), "float32", 4, 8, 64, 2, 6, 3, 300, 1),  # all; residuals of more bits than the main index
        VptqLayout((16, 32), "float32", 8, 4096, 256, 1, norm_axis=1, permuted=False),  # norms of rows, 20 bits
        VptqLayout((4, 33), "float32", 2, 65536, 65536, 1),  # 32 bits: the sign bit of every word
        VptqLayout((4, 35), "float32", 2, 65536, 2048, 1),  # 27 bits: indices cross words at every place
    ],
    ids=["outliers", "indices as float", "groups", "all", "rows", "32 bits", "27 bits"],
)
def test_every_setting_by_the_formula(layout: VptqLayout) -> None:
    tensors, wanted = checkpoint(layout, seed=layout.entries)
    weight = layout.decode(tensors)
    assert torch.allclose(weight.to_dense("float32"), wanted, rtol=1e-6, atol=1e-6)
    stored = layout.encode(weight)
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (stored[name].dtype, stored[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(stored[name].view(torch.uint8), tensor.view(torch.uint8)), name


def settings(**changes: Any) -> dict[str, Any]:
    return {"vector_lens": [-1, 4], "num_centroids": [-1, 16], "num_res_centroids": [-1, -1], **changes}


def quantizer(**options: Any) -> VptqHfQuantizer:
    return VptqHfQuantizer(VptqConfig(**options))


def layout_of(settings: dict[str, Any], shape: tuple[int, int] = (16, 32)) -> Any:
    name = "model.layers.0.self_attn.q_proj"
    return quantizer(config_for_layers={name: settings}).layout_of(
        ModuleInfo(name, "linear", shape, "float16"), {"indices": None}, lambda name: None
    )


def test_shared_settings_go_by_the_last_part_of_the_name() -> None:
    found = quantizer(
        shared_layer_config={"q_proj": settings(), "self_attn": settings(num_centroids=[-1, 64])},
        config_for_layers={"model.layers.1.self_attn.q_proj": settings(num_centroids=[-1, 32])},
    )
    entries = [
        found.layout_of(
            ModuleInfo(f"model.layers.{block}.self_attn.q_proj", "linear", (16, 32), "float16"),
            {"indices": None},
            print,
        ).entries  # type: ignore[union-attr]
        for block in (0, 1)
    ]
    assert entries == [16, 32]
    with pytest.raises(NotRepresentable, match="neither config_for_layers nor shared_layer_config"):
        found.layout_of(ModuleInfo("model.other", "linear", (16, 32), "float16"), {"indices": None}, print)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"num_centroids": [-1, 48]}, NotRepresentable, "powers of two"),
        ({"num_centroids": [-1, 65536], "num_res_centroids": [-1, 131072]}, NotRepresentable, "more than 32 bits"),
        ({"num_res_centroids": [64, -1]}, NotRepresentable, "residual centroids of outlier columns"),
        ({"outlier_size": 8}, NotRepresentable, "outlier columns with vectors of -1"),
        ({"group_num": 5}, NotRepresentable, "5 groups of 32 columns"),
        ({"group_size": 31}, ShapeMismatch, "group_size=31"),
        ({"in_features": 64}, ShapeMismatch, "in_features=64"),
        ({"vector_quant_dim": "in"}, NotRepresentable, "vectors along 'in'"),
        ({"norm_dim": 2}, NotRepresentable, "norm_dim 2"),
    ],
)
def test_entries_that_contradict_the_format(changes: dict[str, Any], error: type[AnybitError], words: str) -> None:
    with pytest.raises(error, match=words):
        layout_of(settings(**changes))


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("perm", lambda tensor: tensor * 0, "does not name each of the 40 inputs once"),
        ("outlier_indices", lambda tensor: tensor + 10, "its table has 10 entries"),
        ("outlier_indices", lambda tensor: tensor - 11, "its table has 10 entries"),  # uint16: no negative numbers
        ("weight_scale", lambda tensor: tensor / 0, "weight_scale"),
    ],
)
def test_damage_is_named(name: str, damage: Any, words: str) -> None:
    layout = VptqLayout((24, 40), "float32", 8, 16, 4, 1, 8, 4, 10)
    tensors, _ = checkpoint(layout, seed=0)
    with pytest.raises(CorruptFile, match=words) as caught:
        layout.decode({**tensors, name: damage(tensors[name])})
    assert name in str(caught.value)


def test_bits_behind_the_last_index_are_refused() -> None:
    layout = VptqLayout((4, 35), "float32", 2, 65536, 2048, 1)
    tensors, _ = checkpoint(layout, seed=0)
    tensors["indices"][0, 0, -1] |= 1 << 20  # 35 indices of 27 bits end at bit 17 of the last word
    with pytest.raises(CorruptFile, match="bits set behind its last index"):
        layout.decode(tensors)
