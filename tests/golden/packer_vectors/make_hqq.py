"""What hqq makes of a small weight: every width and axis, groups that divide rows and groups that do not.

    python3 -m venv venv && venv/bin/pip install torch==2.13.0 safetensors numpy termcolor
    venv/bin/pip install --no-deps hqq==0.2.8
    venv/bin/python make_hqq.py

Writes hqq.safetensors: weight float32, and <case>.<tensor> as hqq's encoded state dict has them, with <case>.dense as hqq
dequantizes it; the settings of the cases are in its metadata.
"""

import json
from pathlib import Path

import torch
from hqq.core.quantize import HQQLinear
from safetensors.torch import save_file

torch.Tensor.pin_memory = lambda tensor: tensor  # no GPU here
generator = torch.Generator().manual_seed(0)
weight = torch.randn(24, 48, generator=generator) * 0.05
weight[3] = 0
weight[4] *= 1e-4
weight[7] = weight[7].abs()
tensors, cases = {"weight": weight.clone()}, {}


def add(name, nbits, group, axis, dtype="float32", view_as_float=False, offload_meta=False):
    settings = {
        "weight_quant_params": {
            "nbits": nbits, "channel_wise": True, "group_size": group, "optimize": True, "round_zero": nbits == 4,
            "axis": axis, "view_as_float": view_as_float,
        },
        "scale_quant_params": None, "zero_quant_params": None, "offload_meta": offload_meta,
    }  # fmt: skip
    compute = getattr(torch, dtype)
    linear = torch.nn.Linear(48, 24, bias=False)
    linear.weight.data = weight.to(compute)
    layer = HQQLinear(linear, settings, compute_dtype=compute, device="cpu")
    for own, tensor in layer.state_dict().items():
        tensors[f"{name}.{own}"] = tensor.data.contiguous().clone()
    tensors[f"{name}.dense"] = layer.dequantize().contiguous().clone()
    cases[name] = {"dtype": dtype, "quant_config": settings}


for nbits in (8, 6, 5, 4, 3, 2, 1.58, 1):
    for axis in (0, 1):
        add(f"{nbits}-{axis}", nbits, 16 if nbits != 1 or axis else 24, axis)
add("4-0-spanning", 4, 72, 0)
add("4-1-spanning", 4, 72, 1, "bfloat16")
add("3-1-spanning", 3, 32, 1, "float16")
add("4-0-whole", 4, None, 0, "float16")
add("2-1-whole", 2, None, 1, "bfloat16")
add("4-1-float16-view", 4, 16, 1, "float16", view_as_float=True)
add("3-0-bfloat16-view", 3, 24, 0, "bfloat16", view_as_float=True)
add("4-1-offloaded", 4, 16, 1, "float16", offload_meta=True)
save_file(
    tensors,
    Path(__file__).with_name("hqq.safetensors"),
    {"made_by": f"hqq 0.2.8, torch {torch.__version__}", "cases": json.dumps(cases)},
)
