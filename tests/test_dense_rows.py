"""Dense layers beside packed ones: products of a few rows, against float64; everything else is torch's."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import anybit
from anybit import GPTQConfig
from anybit.kernels.cpu import encoding, native
from anybit.modules import dense
from anybit.modules.dense import DenseLinear, quicken

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=f"needs the native library: {native.why_not()}")
LEVELS = [name for name in native.levels() if name != "avx512vbmi"] if native.why_not() is None else ["none"]
TINY = Path(__file__).parent.parent / "examples" / "tiny-llama"


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    native.use_level(request.param)
    yield request.param
    native.use_level(native.levels()[-1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "columns"), [(33, 1), (70, 15), (129, 257), (64, 2048), (5, 4099)])
def test_products_are_those_of_float64(rows: int, columns: int, dtype: torch.dtype, level: str) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    bias = torch.randn(rows, generator=generator).to(dtype)
    for shape in ((1, 1, columns), (7, columns)):
        x = torch.randn(shape, generator=generator).to(dtype)
        wanted = x.double() @ weight.double().T + bias.double()
        found = encoding.dense_product(x, weight, bias)
        assert found.dtype == dtype
        # rounding the result, and the sums in float32, whose terms are at most the sum of magnitudes
        limit = torch.finfo(dtype).eps / 2 * wanted.abs() + 1e-6 * (x.double().abs() @ weight.double().abs().T + 1)
        assert bool(((found.double() - wanted).abs() <= limit).all())
        assert torch.equal(encoding.dense_product(x.mT.contiguous().mT, weight, bias), found)


def large(dtype: torch.dtype = torch.bfloat16, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(1024, 1040, bias=bias)).to(dtype)
    quicken(model)
    return model


def test_only_large_plain_layers_are_quickened() -> None:
    class Own(nn.Linear):
        pass

    model = large()
    assert [type(layer) for layer in model] == [nn.Linear, DenseLinear]
    others = nn.Sequential(Own(1024, 1024), nn.Linear(1024, 1024, dtype=torch.float16))
    quicken(others)
    assert [type(layer) for layer in others] == [Own, nn.Linear]


def test_whoever_looks_sees_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = large()[1]
    x = torch.randn(2, 1024, dtype=torch.bfloat16)
    calls: list[int] = []
    product = dense.dense_product
    monkeypatch.setattr(dense, "dense_product", lambda *given: calls.append(1) or product(*given))
    with torch.no_grad():
        assert torch.allclose(layer(x).float(), nn.functional.linear(x, layer.weight, layer.bias).float(), atol=2e-2)
        assert len(calls) == 1
        layer(torch.randn(5, 1024, dtype=torch.bfloat16))  # many rows
        torch.jit.trace(layer, (x,), check_trace=False)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(x.float()).dtype == torch.bfloat16
        with pytest.raises(RuntimeError):
            layer(torch.randn(2, 1023, dtype=torch.bfloat16))
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert len(calls) == 1
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is DenseLinear
        assert other.state_dict().keys() == {"weight", "bias"}


def test_the_head_of_a_loaded_model(tmp_path: Path) -> None:
    anybit.quantize(TINY, tmp_path / "made", GPTQConfig(bits=4, group_size=64))
    model = anybit.load(tmp_path / "made")
    assert type(model.lm_head) is DenseLinear
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "made" / "model.safetensors"
    ).read_bytes()
    ids = torch.randint(0, 4096, (1, 1))
    with torch.no_grad():
        quick = model(ids).logits
        model.lm_head.__class__ = nn.Linear
        assert torch.allclose(quick.float(), model(ids).logits.float(), atol=0.05, rtol=0.02)
