"""Against hqq itself, on the CPU: layers it makes, layers we make; and what transformers does with its checkpoints.

Run it in an environment with hqq 0.2.8, transformers and torch: python -m pytest -m interop tests/interop/test_hqq.py
"""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file

import anybit
from anybit import HqqConfig, algorithms
from anybit.quantizers import AutoHfQuantizer
from anybit.weight import ModuleInfo

quantize = pytest.importorskip("hqq.core.quantize")
pytestmark = pytest.mark.interop
GOLDEN = Path(__file__).parents[1] / "golden" / "hqq"


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("nbits", [8, 6, 5, 4, 3, 2, 1.58, 1])
@pytest.mark.parametrize("group", [8, 64, 24, None, 96, 160])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("view", [False, True])
def test_layers(nbits, group, axis, dtype, view):
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(48, 160, generator=generator) * 0.05).to(dtype)
    weight[3], weight[4] = 0, weight[4] * 1e-4
    settings = {
        "weight_quant_params": {
            "nbits": nbits, "channel_wise": True, "group_size": group, "optimize": True, "round_zero": nbits == 4,
            "axis": axis, "view_as_float": view,
        },
        "scale_quant_params": None, "zero_quant_params": None, "offload_meta": False,
    }  # fmt: skip
    linear = torch.nn.Linear(160, 48, bias=False)
    linear.weight.data = weight.clone()
    theirs = quantize.HQQLinear(linear, settings, compute_dtype=dtype, device="cpu")
    stored = {name: tensor.data for name, tensor in theirs.state_dict().items()}
    infos = {
        name: SimpleNamespace(
            name=name, file="", dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape)
        )
        for name, tensor in stored.items()
    }
    config = HqqConfig(quant_config=settings)
    module = ModuleInfo("model.layers.0.q", "linear", (48, 160), str(dtype).removeprefix("torch."))
    layout = AutoHfQuantizer.from_config(config).layout_of(module, infos, stored.get)
    assert torch.equal(layout.decode(stored).to_dense(), theirs.dequantize())
    new = AutoHfQuantizer.from_config(config, pre_quantized=False).layout_for(module)
    made = new.encode(algorithms.get("hqq")(weight, new.scheme(), **new.algorithm_options()))
    for tensors in (layout.encode(layout.decode(stored)), made):
        assert set(tensors) == set(stored)
        assert all(torch.equal(raw(tensors[name]), raw(tensor)) for name, tensor in stored.items())
    ours = quantize.HQQLinear(None, None, compute_dtype=dtype, device="cpu")
    ours.load_state_dict(dict(made))
    assert torch.equal(ours.dequantize(), theirs.dequantize())


def test_transformers_5_loads_random_linears_and_we_do_not():
    golden = GOLDEN / "tf-3bit-g64-axis1-f32"
    reference = load_file(golden / "reference.safetensors")
    logging.disable(logging.WARNING)
    try:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(golden, device_map=None)
    except (ImportError, ValueError, RuntimeError) as error:
        pytest.skip(f"transformers refuses it: {error}")
    finally:
        logging.disable(logging.NOTSET)
    ours = anybit.load(golden)
    with torch.no_grad():
        wrong, right = theirs(reference["input_ids"]).logits, ours(reference["input_ids"]).logits
    assert (right - reference["logits"]).abs().max() < 1e-3
    assert (wrong - reference["logits"]).abs().max() > 0.1
