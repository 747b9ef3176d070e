"""Against AWQ's own software, on the CPU: gptqmodel's packers on larger weights, and a checkpoint of ours in its hands.

Run it in an environment with gptqmodel 7.6, torch and this package, and GPTQMODEL_CPU_WORKERS=2 TORCH_COMPILE_DISABLE=1:
python -m pytest -m interop tests/interop/test_awq.py
AutoAWQ, which imports beside no present transformers, is the referee of tests/golden/packer_vectors/make_awq.py.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import anybit
from anybit import AwqConfig
from anybit.algorithms import rtn
from anybit.methods.awq import AwqQuantizer
from anybit.weight import ModuleInfo

gptqmodel = pytest.importorskip("gptqmodel")
pytestmark = pytest.mark.interop

MODEL = Path(__file__).parents[2] / "examples" / "tiny-llama"


def theirs(weight, bits, group_size, zero_point, form):
    from gptqmodel.looper.awq_processor import AWQProcessor
    from gptqmodel.nn_modules.qlinear.gemv_awq import AwqGEMVLinear
    from gptqmodel.nn_modules.qlinear.gemv_fast_awq import AwqGEMVFastLinear, LLMAwqLinear
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    packers = {"gemm": AwqTorchLinear, "gemv": AwqGEMVLinear, "gemv_fast": AwqGEMVFastLinear, "llm-awq": LLMAwqLinear}
    rows, columns = weight.shape
    settings = SimpleNamespace(qcfg=SimpleNamespace(bits=bits, group_size=group_size, sym=not zero_point))
    quantized, scales, zeros = AWQProcessor.pseudo_quantize_tensor(settings, weight.half())
    linear = torch.nn.Linear(columns, rows, bias=False).half()
    linear.weight.data = quantized
    packed = packers[form](
        bits=bits, group_size=group_size, sym=not zero_point, desc_act=False, in_features=columns, out_features=rows,
        pack_dtype=torch.int16 if form in ("gemv_fast", "llm-awq") else torch.int32,
    )  # fmt: skip
    packed.pack(linear, scales, zeros)
    names = ("qweight", "qzeros", "scaled_zeros", "scales")
    return {name: getattr(packed, name) for name in names if getattr(packed, name, None) is not None}


@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize(
    ("form", "bits", "group_size"),
    [("gemm", bits, 128) for bits in range(2, 9)]
    + [(form, 4, 64) for form in ("gemm", "gemv", "gemv_fast", "llm-awq")],
)
def test_rounding_to_nearest(form, bits, group_size, zero_point):
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(320, 512, generator=generator) * torch.exp(torch.randn(320, 1, generator=generator))
    weight = (weight * 0.03).to(torch.bfloat16)
    config = AwqConfig(bits, group_size, zero_point, format=form)
    layout = AwqQuantizer(config, pre_quantized=False).layout_for(
        ModuleInfo("model.layers.0.x", "linear", tuple(weight.shape), "float32")
    )
    ours = layout.encode(rtn.quantize(weight, layout.scheme(), **layout.algorithm_options()))
    wanted = theirs(weight, bits, group_size, zero_point, form)
    assert set(ours) == set(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize(
    "options",
    [
        {"group_size": 128},
        {"group_size": 32, "zero_point": False},
        {"bits": 8, "group_size": 64},
        {"bits": 3, "group_size": 64},
    ],
    ids=str,
)
def test_gptqmodel_computes_the_same_logits_from_our_checkpoint(options, tmp_path):
    from gptqmodel import BACKEND, GPTQModel

    anybit.quantize(MODEL, tmp_path / "made", AwqConfig(**options), dtype="float16")
    ids = torch.arange(5, 37)[None]
    model = GPTQModel.load(str(tmp_path / "made"), backend=BACKEND.AWQ_TORCH, device="cpu", dtype=torch.float16)
    ours = anybit.load(tmp_path / "made", dtype="float16")
    with torch.no_grad():
        wanted, found = model.model(ids).logits.float(), ours(ids).logits.float()
    # float16 products, theirs of weights rounded to float16
    assert (wanted - found).abs().max() < 2e-2 * wanted.abs().max()
    assert (wanted.argmax(-1) == found.argmax(-1)).float().mean() > 0.95
