"""Against gptqmodel itself, on the CPU: its quantizer and packer on larger weights, and a checkpoint of ours in its hands.

Run it in an environment with gptqmodel 7.6, torch and this package, and GPTQMODEL_CPU_WORKERS=2 TORCH_COMPILE_DISABLE=1:
python -m pytest -m interop tests/interop/test_gptq.py
"""

from pathlib import Path

import pytest
import torch

import anybit
from anybit import GPTQConfig
from anybit.algorithms import rtn
from anybit.methods.gptq import GptqHfQuantizer
from anybit.weight import ModuleInfo

gptqmodel = pytest.importorskip("gptqmodel")
pytestmark = pytest.mark.interop

MODEL = Path(__file__).parents[2] / "examples" / "tiny-llama"


def theirs(weight, bits, group_size, sym, form):
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import FORMAT
    from gptqmodel.quantization.config import QuantizeConfig, RTNConfig
    from gptqmodel.quantization.rtn import RTN
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    rows, columns = weight.shape
    linear = torch.nn.Linear(columns, rows, bias=False, dtype=weight.dtype)
    linear.weight.data = weight.clone()
    quantized, scales, zeros, g_idx, *_ = RTN(linear, RTNConfig(bits=bits, group_size=group_size, sym=sym)).quantize()
    linear.weight.data = quantized
    packed = TorchLinear(
        bits=bits, group_size=group_size, sym=sym, desc_act=False, in_features=columns, out_features=rows, bias=False,
        pack_dtype=torch.int32, format=FORMAT(form), register_buffers=True,
    )  # fmt: skip
    packed.pack_block(linear=linear, scales=scales, zeros=zeros, g_idx=g_idx)
    if form == "gptq":
        convert_gptq_v2_to_v1_format_module(packed, QuantizeConfig(bits=bits, group_size=group_size, sym=sym))
    return {name: getattr(packed, name) for name in ("qweight", "qzeros", "scales", "g_idx")}


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("group_size", "sym", "form"), [(128, True, "gptq"), (32, False, "gptq"), (-1, False, "gptq_p")]
)
def test_rounding_to_nearest(bits, dtype, group_size, sym, form):
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(320, 512, generator=generator) * torch.exp(torch.randn(320, 1, generator=generator))
    weight = (weight * 0.03).to(dtype)
    config = GPTQConfig(bits, group_size=group_size, sym=sym, format=form)
    layout = GptqHfQuantizer(config, pre_quantized=False).layout_for(
        ModuleInfo("model.layers.0.x", "linear", tuple(weight.shape), "float32")
    )
    ours = layout.encode(rtn.quantize(weight, layout.scheme(), **layout.algorithm_options()))
    for name, tensor in theirs(weight, bits, group_size, sym, form).items():
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4, "group_size": 128},
        {"bits": 4, "group_size": 32, "sym": False, "format": "gptq_v2"},
        {"bits": 3, "group_size": 64},
        {"bits": 8, "group_size": -1},
        {"bits": 5, "group_size": 64, "sym": False, "format": "gptq_p"},
        {"bits": 4, "group_size": 64, "dynamic": {"-:.*k_proj": {}, "+:.*down_proj": {"bits": 8, "group_size": 32}}},
    ],
    ids=str,
)
def test_gptqmodel_computes_the_same_logits_from_our_checkpoint(options, tmp_path):
    from gptqmodel import BACKEND, GPTQModel

    anybit.quantize(MODEL, tmp_path / "made", GPTQConfig(**options), dtype="float16")
    ids = torch.arange(5, 37)[None]
    model = GPTQModel.load(str(tmp_path / "made"), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16)
    ours = anybit.load(tmp_path / "made", dtype="float16")
    with torch.no_grad():
        wanted, found = model.model(ids).logits.float(), ours(ids).logits.float()
    # float16 products, theirs of weights rounded to float16
    assert (wanted - found).abs().max() < 2e-2 * wanted.abs().max()
    assert (wanted.argmax(-1) == found.argmax(-1)).float().mean() > 0.95
