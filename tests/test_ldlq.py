"""LDLQ: rounding to HIGGS's table with calibration data, against rounding without, and against what cannot be beaten."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import anybit
from anybit import GPTQConfig, HiggsConfig
from anybit.algorithms import higgs, ldlq
from anybit.errors import NotRepresentable
from anybit.quantizers import AutoHfQuantizer
from anybit.weight import Codebook, Codes, ModuleInfo, Values, Weight
from anybit.weight.weight import same

ROOT = Path(__file__).parent.parent
TINY = ROOT / "examples" / "tiny-llama"
CALIBRATION = ROOT / "examples" / "data" / "calibration.txt"
EVALUATION = (ROOT / "examples" / "data" / "evaluation.txt").read_text(encoding="utf-8")


def layout_of(config: HiggsConfig, shape: tuple[int, int]) -> Any:
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    layout = quantizer.layout_for(ModuleInfo("layers.0.a", "linear", shape, "float32"))
    assert layout is not None, quantizer.skip_reasons
    return layout


def loss(weight: Weight, dense: torch.Tensor, hessian: torch.Tensor) -> float:
    error = weight.to_dense(torch.float32) - dense
    return float((error @ hessian * error).sum())


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (HiggsConfig(bits=2, hadamard_size=256, group_size=64), (256, 256)),
        (HiggsConfig(bits=4, hadamard_size=128, group_size=128), (128, 384)),
        (HiggsConfig(bits=3, p=1, hadamard_size=64, group_size=64), (512, 64)),
        (HiggsConfig(bits=2, hadamard_size=256, group_size=256), (256, 200)),  # 56 columns of padding
    ],
)
def test_it_beats_rounding_without_data(config: HiggsConfig, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(shape, generator=generator) * 0.02
    mixed = torch.randn(shape[1], shape[1], generator=generator) * 0.05 + torch.diag(torch.logspace(-1, 1, shape[1]))
    x = torch.randn(4096, shape[1], generator=generator) @ mixed
    hessian = 2 / len(x) * x.T @ x
    layout = layout_of(config, shape)
    options = layout.algorithm_options()
    plain = higgs.quantize(dense, layout.scheme(), **options)
    made = ldlq.quantize(dense, layout.scheme(), hessian=hessian, **options)
    assert same(layout.decode(layout.encode(made)), made)
    assert loss(made, dense, hessian) < 0.7 * loss(plain, dense, hessian)
    once = ldlq.quantize(dense, layout.scheme(), hessian=hessian, sweeps=1, **options)
    assert loss(made, dense, hessian) <= loss(once, dense, hessian)
    assert same(made, ldlq.quantize(dense, layout.scheme(), hessian=hessian, **options))


def test_near_the_best_of_all_codes() -> None:
    """Four columns and a table of four pairs: all sixteen codes of a row can be tried."""
    generator = torch.Generator().manual_seed(2)
    table = torch.tensor([[-1.0, -0.5], [-0.4, 0.8], [0.5, -0.7], [1.0, 0.6]])
    dense = torch.randn(64, 4, generator=generator)
    x = torch.randn(512, 4, generator=generator) @ torch.randn(4, 4, generator=generator)
    hessian = 2 / len(x) * x.T @ x
    book = Codebook(
        Codes(torch.empty(64, 1, dtype=torch.uint8, device="meta"), 2, 2),
        torch.empty(1, 4, 1, 2, device="meta"),
        (1, 2),
        Values(torch.empty(64, 1, device="meta")),
        block=(1, 4),
    )
    made = ldlq.quantize(dense, Weight(book, torch.float32), hessian=hessian, grid=table, damp=1e-6)
    tree: Any = made.tree
    scales = tree.scale.tensor
    every = torch.tensor(list(itertools.product(range(4), repeat=2)))
    values = table[every].flatten(1)  # [16, 4]
    wrong = values[None] * scales[:, None] - dense[:, None]
    best = ((wrong @ hessian) * wrong).sum(2).amin(1)
    error = made.to_dense(torch.float32) - dense
    found = ((error @ hessian) * error).sum(1)
    nearest = (dense[:, None].unflatten(2, (2, 2)) / scales[:, None, None] - table[every][None]).square().sum((2, 3))
    plain = ((wrong @ hessian) * wrong).sum(2).gather(1, nearest.argmin(1, keepdim=True)).sum()
    assert best.sum() <= found.sum() * (1 + 1e-5)
    assert found.sum() - best.sum() < 0.4 * (plain - best.sum())


def test_clearly_closer_to_the_model_at_equal_size(tmp_path: Path) -> None:
    def made(name: str, **options: Any) -> tuple[float, int]:
        dense = ["lm_head", "layers.3", "layers.4", "layers.5"]  # half of the model, for the sake of time
        config = HiggsConfig(bits=4, hadamard_size=256, group_size=64, modules_to_not_convert=dense)
        anybit.quantize(TINY, tmp_path / name, config, **options)
        kl = anybit.evaluate(tmp_path / name, EVALUATION, reference=TINY, max_tokens=700).kl
        return float(kl), (tmp_path / name / "model.safetensors").stat().st_size  # type: ignore[arg-type]

    plain, before = made("plain")
    options = {"samples": 48, "sequence_length": 256, "algorithm_options": {"sweeps": 1}}
    fitted, after = made("fitted", calibration=CALIBRATION, **options)
    assert abs(after - before) < 1000  # the header alone
    assert fitted < 0.85 * plain


def test_what_it_cannot_fill_is_refused() -> None:
    quantizer = AutoHfQuantizer.from_config(GPTQConfig(bits=4, group_size=32), pre_quantized=False)
    grid: Any = quantizer.layout_for(ModuleInfo("layers.0.a", "linear", (64, 64), "float16"))
    with pytest.raises(NotRepresentable, match="pairs of columns to one table"):
        ldlq.quantize(torch.randn(64, 64), grid.scheme(), hessian=torch.eye(64))
    layout = layout_of(HiggsConfig(bits=2, hadamard_size=256, group_size=64), (256, 256))
    with pytest.raises(NotRepresentable, match="not finite on the calibration text"):
        ldlq.quantize(
            torch.randn(256, 256),
            layout.scheme(),
            hessian=torch.full((256, 256), float("nan")),
            **layout.algorithm_options(),
        )
