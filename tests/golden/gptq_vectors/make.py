"""Written by gptqmodel 7.6.0's own GPTQ class on the CPU: codes, scales and zero points of one layer, for given inputs.

GPTQMODEL_CPU_WORKERS=2 TORCH_COMPILE_DISABLE=1 python make.py      (in an environment with gptqmodel)
"""

from pathlib import Path

import torch
from gptqmodel.quantization import QuantizeConfig
from gptqmodel.quantization.gptq import GPTQ
from safetensors.torch import save_file

HERE = Path(__file__).parent
generator = torch.Generator().manual_seed(7)
weight = (torch.randn(48, 256, generator=generator) * 0.05).to(torch.float16).float()
mix = torch.randn(256, 256, generator=generator) * torch.linspace(0.2, 2, 256)
inputs = (torch.randn(320, 256, generator=generator) @ mix * 0.1).to(torch.float16).float()
inputs[:, 17] = 0  # an input that is never seen
save_file({"weight": weight.half(), "inputs": inputs.half()}, HERE / "layer.safetensors")  # exact: rounded above
SETTINGS = {
    "4bit_g32_sym_groups": dict(bits=4, group_size=32, sym=True, desc_act=False, act_group_aware=True),
    "4bit_g64_asym_natural": dict(bits=4, group_size=64, sym=False, desc_act=False, act_group_aware=False),
    "3bit_g32_asym_columns": dict(bits=3, group_size=32, sym=False, desc_act=True, act_group_aware=False),
    "8bit_row_sym_natural": dict(bits=8, group_size=-1, sym=True, desc_act=False, act_group_aware=False),
    "2bit_g64_sym_groups": dict(bits=2, group_size=64, sym=True, desc_act=False, act_group_aware=True),
    "4bit_g64_sym_columns_static": dict(
        bits=4, group_size=64, sym=True, desc_act=True, act_group_aware=False, static_groups=True
    ),
    "3bit_g64_sym_groups_mse": dict(bits=3, group_size=64, sym=True, desc_act=False, act_group_aware=True, mse=2.4),
}
for name, settings in SETTINGS.items():
    layer = torch.nn.Linear(256, 48, bias=False)
    layer.weight.data = weight.clone()
    config = QuantizeConfig(**settings, damp_percent=0.05, device="cpu", offload_to_disk=False)
    task = GPTQ(layer, config)
    task.name = "layer"
    task.fallback = None
    task.quantizer.configure(perchannel=True)
    for batch in inputs.view(4, 80, 256):
        task.add_batch(batch[None], None)
    dense, scale, zero, index, _, _, damp, _ = task.quantize()
    assert damp == 0.05, damp
    codes = torch.round(dense.float() / scale[:, index.long()] + zero[:, index.long()]).to(torch.uint8)
    tensors = {"codes": codes, "scale": scale.float(), "zero": zero.float(), "index": index.to(torch.int32)}
    save_file({key: value.contiguous() for key, value in tensors.items()}, HERE / f"{name}.safetensors")
    print(name, scale.shape, index[:4])
