"""FP-Quant where the goldens cannot see it: quest, other transforms, master weights, rounding, what a bias is added to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import anybit
from anybit.algorithms import rotated_fp4
from anybit.containers.info import TensorInfo
from anybit.errors import CheckpointError, MissingTensor
from anybit.kernels.reference import multiply
from anybit.methods import _fp_quant_layouts as layouts
from anybit.methods.fp_quant import FPQuantConfig, FPQuantHfQuantizer
from anybit.weight import ModuleInfo, Weight
from anybit.weight.joining import join_rows
from anybit.weight.weight import same

GOLDEN = Path(__file__).parent / "golden" / "fp_quant"
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FORMS: tuple[dict[str, bool], ...] = ({}, {"pseudoquantization": True}, {"store_master_weights": True})
KINDS = (("nvfp4", "abs_max"), ("mxfp4", "abs_max"), ("mxfp4", "quest"))


def linear(rows: int, columns: int) -> ModuleInfo:
    return ModuleInfo("a", "linear", (rows, columns), "bfloat16")


def made(layout: Any, dense: torch.Tensor) -> Weight:
    return rotated_fp4.quantize(dense, layout.scheme(), **layout.algorithm_options())


def infos(tensors: dict[str, torch.Tensor]) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(f"a.{name}", str(tensor.dtype)[6:], tuple(tensor.shape), tensor.nbytes, "f")
        for name, tensor in tensors.items()
    }


def nearest(number: float, even: bool) -> float:
    """One number to E2M1: ties to the even code, or towards zero."""
    size = min(abs(number), 6.0)
    code = min(range(8), key=lambda own: (abs(E2M1[own] - size), own % 2 if even else own))
    return E2M1[code] if number >= 0 else -E2M1[code]


def slowly(block: list[float], dtype: str, method: str, even: bool) -> list[float]:
    """What a block of rotated numbers becomes, one number at a time."""
    highest = max(map(abs, block))
    if dtype == "nvfp4":
        scale = float(torch.tensor(3.0 * highest / 6).to(torch.float8_e4m3fn))
        return [nearest(y * 3.0 / scale, even) * scale / 3.0 for y in block]
    if method == "abs_max":
        power = 2.0 ** float(torch.tensor(highest).log2().floor())
        return [nearest(3 * y / power, even) * power / 3 for y in block]
    mean = sum(block) / len(block)
    deviation = (sum(y * y for y in block) / len(block) - mean * mean) ** 0.5
    power = 2.0 ** float(torch.tensor(deviation * 2.92247856 / 6 + 1e-8).log2().floor())
    return [nearest(y / power, even) * power for y in block]


@pytest.mark.parametrize(("dtype", "method"), KINDS)
@pytest.mark.parametrize("pseudo", [False, True])
def test_numbers_are_those_of_the_formulas(dtype: str, method: str, pseudo: bool) -> None:
    dense = torch.randn(3, 128, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    dense[0, :8] = torch.tensor([1.25, -1.25, 0.75, -0.75, 2.5, 3.5, 5.0, 0.25])  # ties, where the rotation is none
    config = FPQuantConfig(
        forward_dtype=dtype, forward_method=method, pseudoquantization=pseudo, transform_init="identity"
    )
    weight = made(layouts.layout_for(config, linear(3, 128)), dense)
    size = rotated_fp4.GROUP[dtype]
    wanted = [
        [
            value
            for start in range(0, 128, size)
            for value in slowly(row[start : start + size], dtype, method, not pseudo)
        ]
        for row in dense.float().tolist()
    ]
    exact = torch.tensor(wanted)
    ours = weight.to_dense(torch.float32)
    assert (ours - (exact.to(torch.bfloat16).float() if pseudo else exact)).abs().max() <= 1e-6 * exact.abs().max()


def test_ties_go_to_even_in_hardware_and_towards_zero_in_emulation() -> None:
    y = torch.tensor([[6.0, 1.75, 2.5, 0.75, 5.0, -0.25, -1.25, 3.5] * 2])  # the scale is 3, and G is 3
    even, zero = (rotated_fp4.rounded(y, "nvfp4", "abs_max", torch.tensor(3.0), emulated) for emulated in (False, True))
    assert even[0, :8].tolist() == [6.0, 2.0, 2.0, 1.0, 4.0, 0.0, -1.0, 4.0]
    assert zero[0, :8].tolist() == [6.0, 1.5, 2.0, 0.5, 4.0, 0.0, -1.0, 3.0]


def test_the_package_made_the_golden_from_what_it_stands_for() -> None:
    """Rotating its dense weight again gives numbers next to codes, and the codes themselves."""
    stored = load_file(GOLDEN / "nvfp4_pseudo" / "model.safetensors")["model.layers.0.mlp.up_proj.dqweight"]
    dense = rotated_fp4.turned(stored, rotated_fp4.matrix("hadamard", 16).T)
    layout: Any = layouts.layout_for(FPQuantConfig(pseudoquantization=True), linear(*stored.shape))
    again = layout.encode(made(layout, dense))
    assert (again["dqweight"] - stored).float().norm() < 0.02 * stored.float().norm()
    assert torch.equal(
        again[layouts.FORWARD],
        load_file(GOLDEN / "nvfp4_pseudo" / "model.safetensors")["model.layers.0.mlp.up_proj.forward_hadamard_matrix"],
    )


@pytest.mark.parametrize("transform", ["hadamard", "identity", "gsr"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "method"), KINDS)
def test_every_form_survives_storing_and_multiplies(
    dtype: str, method: str, form: dict[str, bool], transform: str
) -> None:
    config = FPQuantConfig(
        forward_dtype=dtype, forward_method=method, hadamard_group_size=64, transform_init=transform, **form
    )
    dense = torch.randn(24, 192, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    layout: Any = layouts.layout_for(config, linear(24, 192))
    weight = made(layout, dense)
    stored = layout.encode(weight)
    found = layouts.layout_of(FPQuantHfQuantizer(config), linear(24, 192), infos(stored))
    assert found is not None
    assert found.specs() == layout.specs()
    assert same(found.decode(stored), weight)
    effective = weight.to_dense(torch.float32)
    assert (effective - dense.float()).norm() < 0.2 * dense.float().norm()
    x = torch.randn(5, 192)
    turned = rotated_fp4.turned(x, stored[layouts.FORWARD])
    common = stored[layouts.INPUT_SCALE].float()
    rounded = rotated_fp4.rounded(turned, dtype, method, common, config.pseudoquantization)
    wanted = rounded @ rotated_fp4.turned(effective, stored[layouts.FORWARD]).T
    # bfloat16 matrices are not quite orthogonal, so turning there and back is off by as much
    assert (multiply(weight, x, None) - wanted).abs().max() < 1e-2 * wanted.abs().max()


def test_columns_of_gsr_change_sign_ever_more_often() -> None:
    matrix = rotated_fp4.matrix("gsr", 32).float()
    changes = (matrix[1:].sign() != matrix[:-1].sign()).sum(0)
    assert changes.tolist() == list(range(32))
    assert torch.allclose(matrix @ matrix.T, torch.eye(32), atol=1e-2)


def test_a_bias_is_added_once() -> None:
    layout: Any = layouts.layout_for(FPQuantConfig(pseudoquantization=True), linear(16, 64))
    weight, x, bias = made(layout, torch.randn(16, 64)), torch.randn(3, 64), torch.randn(16)
    assert torch.allclose(multiply(weight, x, bias) - multiply(weight, x, None), bias.expand(3, 16), atol=1e-5)


def test_joined_rows_are_rotated_by_their_own_matrices() -> None:
    x = torch.randn(3, 64)
    parts = [
        made(layouts.layout_for(FPQuantConfig(transform_init=own), linear(16, 64)), torch.randn(16, 64))
        for own in ("hadamard", "gsr")
    ]
    assert torch.allclose(
        multiply(join_rows(parts), x, None), torch.cat([multiply(part, x, None) for part in parts], 1), atol=1e-5
    )


def test_empty_blocks_are_zeros() -> None:
    for (dtype, method), form in [(kind, own) for kind in KINDS for own in FORMS]:
        config = FPQuantConfig(forward_dtype=dtype, forward_method=method, **form)
        weight = made(layouts.layout_for(config, linear(8, 64)), torch.zeros(8, 64))
        assert not weight.to_dense(torch.float32).any(), (dtype, method, form)
        assert not multiply(weight, torch.zeros(2, 64), None).any(), (dtype, method, form)


def test_dense_models_become_every_form_and_load_again(tmp_path: Path) -> None:
    anybit.dequantize(GOLDEN / "nvfp4_pseudo", tmp_path / "dense")
    for number, form in enumerate(FORMS):
        config = FPQuantConfig(forward_dtype="mxfp4", modules_to_not_convert=["lm_head", "o_proj"], **form)
        folder = tmp_path / str(number)
        plan = anybit.quantize(tmp_path / "dense", folder, config)
        dense = {entry.slot.module.split(".")[-1] for entry in plan.entries if entry.action == "dense"}
        assert dense == {"lm_head", "embed_tokens", "o_proj"}
        model: Any = anybit.load(folder)
        model.save_pretrained(tmp_path / f"{number}.saved")
        ours, saved = (load_file(path / "model.safetensors") for path in (folder, tmp_path / f"{number}.saved"))
        assert {name: tensor.dtype for name, tensor in ours.items()} == {name: own.dtype for name, own in saved.items()}
        assert all(
            torch.equal(tensor.view(torch.uint8), saved[name].view(torch.uint8)) for name, tensor in ours.items()
        )


def test_tensors_tell_the_form_and_the_plan_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "lying"
    folder.mkdir()
    for file in (GOLDEN / "nvfp4_pseudo").glob("*"):
        text = file.read_bytes().replace(b'"pseudoquantization": true', b'"pseudoquantization": false')
        (folder / file.name).write_bytes(text)
    notes = " ".join(anybit.load(folder).anybit_plan.notes)
    assert "stored as dqweight" in notes


def test_a_weight_without_its_matrix_is_refused() -> None:
    layout: Any = layouts.layout_for(FPQuantConfig(), linear(16, 64))
    stored = layout.encode(made(layout, torch.randn(16, 64)))
    config = FPQuantHfQuantizer(FPQuantConfig())
    for name in (layouts.FORWARD, "qweight"):
        with pytest.raises(MissingTensor, match=name):
            layouts.layout_of(config, linear(16, 64), infos({own: t for own, t in stored.items() if own != name}))
    stored[layouts.WEIGHT_SCALE] = torch.zeros(1, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match=layouts.WEIGHT_SCALE):
        layout.decode(stored)
