"""Against optimum-quanto itself, on the CPU: layers it makes, layers we make, what its layers give.

Run it in an environment with optimum-quanto 0.2.7, transformers and torch: python -m pytest -m interop tests/interop/test_quanto.py
"""

from types import SimpleNamespace

import pytest
import torch

from anybit import QuantoConfig, algorithms
from anybit.kernels.reference import multiply
from anybit.quantizers import AutoHfQuantizer
from anybit.weight import ModuleInfo

quanto = pytest.importorskip("optimum.quanto")
pytestmark = pytest.mark.interop
OURS = {"qint2": "int2", "qint4": "int4", "qint8": "int8", "qfloat8_e4m3fn": "float8"}


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def layer_of(weight, bias, name, activations=None, optimizer="max"):
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    linear.weight.data, linear.bias.data = weight.clone(), bias
    own = quanto.HqqOptimizer() if optimizer == "hqq" and name in ("qint2", "qint4") else None
    layer = quanto.QLinear.from_module(
        linear, weights=quanto.qtypes[name], activations=activations and quanto.qtypes[activations], optimizer=own
    )
    if activations is not None:
        layer.input_scale = torch.tensor(0.03, dtype=weight.dtype)
        layer.output_scale = torch.tensor(0.02, dtype=weight.dtype)
    layer.freeze()
    return layer


def read(layer, name, activations):
    stored = {own: tensor.detach() for own, tensor in layer.state_dict().items() if own != "bias"}
    infos = {
        own: SimpleNamespace(
            name=f"m.q.{own}", file="", dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape)
        )
        for own, tensor in stored.items()
    }
    config = QuantoConfig.from_dict({"m.q": {"weights": name, "activations": activations or "none"}})
    shape = (layer.out_features, layer.in_features)
    layout = AutoHfQuantizer.from_config(config).layout_of(
        ModuleInfo("m.q", "linear", shape, "float32"), infos, stored.get
    )
    return layout, stored


@pytest.mark.parametrize("name", ["qint2", "qint4", "qint8", "qfloat8_e4m3fn", "qfloat8_e5m2", "qfloat8_e4m3fnuz"])
@pytest.mark.parametrize("activations", [None, "qint8", "qfloat8_e4m3fn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(48, 256), (33, 128), (7, 160), (16, 100), (3, 130)])
@pytest.mark.parametrize("optimizer", ["max", "hqq"])
def test_layers(name, activations, dtype, shape, optimizer):
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(shape, generator=generator) * 0.05).to(dtype)
    bias = (torch.rand(shape[0], generator=generator) * 0.1).to(dtype)
    layer = layer_of(weight, bias, name, activations, optimizer)
    layout, stored = read(layer, name, activations)
    found = layout.decode(stored)
    again = layout.encode(found)
    assert set(again) == set(stored)
    assert all(torch.equal(raw(again[own]), raw(tensor)) for own, tensor in stored.items())
    if "TinyGemm" not in type(layer.weight).__name__:
        assert torch.equal(found.to_dense(), layer.weight.dequantize())
    if name in OURS and activations is None:
        config = QuantoConfig(weights=OURS[name], optimizer=optimizer)
        module = ModuleInfo("m.q", "linear", shape, str(dtype).removeprefix("torch."))
        new = AutoHfQuantizer.from_config(config, pre_quantized=False).layout_for(module)
        made = new.encode(algorithms.get("quanto")(weight, new.scheme(), **new.algorithm_options()))
        assert all(torch.equal(raw(made[own]), raw(tensor)) for own, tensor in stored.items())
    if dtype == torch.bfloat16 and activations is None and name == "qint8":
        return  # torch._weight_int8pack_mm ends the process
    x = torch.randn(5, shape[1], generator=generator).to(dtype)
    with torch.no_grad():
        y = layer(x)
    y = y.dequantize() if activations is not None else y
    ours = multiply(found, x, bias)
    if activations == "qint8" and name == "qint8":
        assert torch.equal(ours, y)
    elif activations is None:
        limit = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}[dtype]
        assert (ours.float() - y.float()).abs().max() <= limit * y.float().abs().max()
    else:  # rounded outputs: where two orders of summation fall on two sides of the middle, one is the other's neighbour
        difference = (ours.float() - y.float()).abs()
        step = 0.02 if activations == "qint8" else y.float().abs().clamp(min=0.02 * 2**-6) / 7
        assert (difference <= 1e-6).float().mean() > 0.7
        assert (difference <= 1.02 * step).all()
