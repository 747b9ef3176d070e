"""vectors.safetensors of this folder: what fouroversix 1.0.5 makes of one weight and one input. Run with that package installed.

Stored for each <dtype>.<rule>.<1d|2d>: values and scales (row-major, padding cut off), amax, and y, the layer's output.
"""

from pathlib import Path

import torch
from fouroversix.matmul.pytorch import PyTorchMatmulBackend
from fouroversix.quantize import QuantizationConfig
from fouroversix.quantize.dequantize_utils import from_blocked
from fouroversix.quantize.pytorch.backend import PyTorchQuantizeBackend
from fouroversix.utils import DataType
from safetensors.torch import save_file

RULES = {
    "nvfp4": ("static_6", "static_4", "mse", "mae", "abs_max"),
    "mxfp4": ("static_6", "static_4"),
    "if4": ("mse", "mae", "abs_max"),
    "nvint4": ("static_6",),
}
torch.manual_seed(0)
rows, columns = 40, 104  # neither is whole tiles; the last block is short
weight = (torch.randn(rows, columns) * torch.exp(torch.randn(rows, 1) * 0.5)).to(torch.bfloat16)
x = torch.randn(5, columns).to(torch.bfloat16)
found = {"weight": weight, "x": x}
for dtype, rules in RULES.items():
    for rule in rules:
        for two in (False, True):
            name = f"{dtype}.{rule}.{'2d' if two else '1d'}"
            size = DataType(dtype).block_size
            config = QuantizationConfig(dtype=dtype, scale_rule=rule, block_scale_2d=two)
            made = PyTorchQuantizeBackend.quantize_to_fp4(weight, config)
            outer, inner = made.padded_shape
            scales = made.scale_factors.view(torch.uint8)
            if made.scale_factors_are_in_blackwell_layout:
                scales = from_blocked(scales, (outer, inner // size))
            scales = scales.reshape(outer, inner // size)
            found[f"{name}.values"] = made.values[:rows, : columns // 2].contiguous()
            found[f"{name}.scales"] = scales[:rows, : -(-columns // size)].contiguous()
            found[f"{name}.amax"] = made.amax.float().reshape(1)
            inputs = PyTorchQuantizeBackend.quantize_to_fp4(x, QuantizationConfig(dtype=dtype, scale_rule=rule))
            y = torch.nan_to_num(PyTorchMatmulBackend.fp4_matmul(inputs, made, out_dtype=DataType.float32))
            found[f"{name}.y"] = y
save_file(
    found,
    Path(__file__).parent / "vectors.safetensors",
    {"made_by": "fouroversix 1.0.5, its torch backend, torch 2.13.0"},
)
