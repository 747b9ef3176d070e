"""What gptqmodel itself makes of two small weights: RTN's numbers, packed by TorchLinear, per width, rule and format.

    python3 -m venv venv && venv/bin/pip install torch==2.13.0
    echo torch==2.13.0 > constraints.txt && venv/bin/pip install -c constraints.txt gptqmodel==7.6.0
    GPTQMODEL_CPU_WORKERS=2 GPTQMODEL_DISABLE_PACK_EXT=1 TORCH_COMPILE_DISABLE=1 venv/bin/python make_gptq.py

Writes gptq.safetensors: weight.<shape>, and <case>.qweight, qzeros, scales, g_idx; the cases are in its metadata.
"""

import json
from importlib.metadata import version
from pathlib import Path

import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization import FORMAT
from gptqmodel.quantization.config import QuantizeConfig, RTNConfig
from gptqmodel.quantization.rtn import RTN
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
from safetensors.torch import save_file


def awkward(rows, columns, seed):
    """Normal numbers, with blocks that are empty, of one sign, constant, tiny or full of ties."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05
    weight[0] = 0
    weight[1] = weight[1].abs()
    weight[2] = -weight[2].abs()
    weight[3] = 0.25
    weight[4, :8] = 1e-6 * torch.arange(8)
    weight[5] = torch.arange(columns) % 16 - 7.5
    weight[6, ::7] *= 40
    return weight.to(torch.bfloat16)


WEIGHTS = {"32x96": awkward(32, 96, 0), "40x72": awkward(40, 72, 1)}
CASES = [
    ("32x96", bits, group_size, sym, form)
    for bits in range(2, 9)
    for group_size, sym, form in [
        (32, True, "gptq"), (32, False, "gptq"), (64, False, "gptq_v2"), (-1, True, "gptq_v2"), (32, False, "gptq_p"),
    ]
    if form != "gptq_v2" or bits in (2, 3, 4, 8)
] + [("40x72", bits, 32, sym, "gptq") for bits in (2, 4, 8) for sym in (True, False)]  # fmt: skip

tensors, cases = {f"weight.{name}": weight for name, weight in WEIGHTS.items()}, {}
for shape, bits, group_size, sym, form in CASES:
    weight = WEIGHTS[shape]
    rows, columns = weight.shape
    linear = torch.nn.Linear(columns, rows, bias=False, dtype=weight.dtype)
    linear.weight.data = weight.clone()
    quantized, scales, zeros, g_idx, *_ = RTN(linear, RTNConfig(bits=bits, group_size=group_size, sym=sym)).quantize()
    linear.weight.data = quantized
    packed = TorchLinear(
        bits=bits, group_size=group_size, sym=sym, desc_act=False, in_features=columns, out_features=rows, bias=False,
        pack_dtype=torch.int32, format=FORMAT(form), register_buffers=True,
    )  # fmt: skip
    arguments = {"linear": linear, "scales": scales, "zeros": zeros, "g_idx": g_idx}
    try:
        packed.pack_block(**arguments)
    except ValueError:  # as gptqmodel's pack_module falls back where a size is no multiple of 32
        packed.pack_original(**arguments)
    if form == "gptq":
        convert_gptq_v2_to_v1_format_module(packed, QuantizeConfig(bits=bits, group_size=group_size, sym=sym))
    name = f"{shape}-{bits}bit-g{group_size}-{'sym' if sym else 'asym'}-{form}"
    cases[name] = {"weight": shape, "bits": bits, "group_size": group_size, "sym": sym, "format": form}
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        tensors[f"{name}.{part}"] = getattr(packed, part).contiguous()

metadata = {"cases": json.dumps(cases), "made_by": f"gptqmodel {version('gptqmodel')}, torch {torch.__version__}"}
save_file(tensors, Path(__file__).with_name("gptq.safetensors"), metadata)
print(len(cases), "cases")
