"""Writes golden/toy8/rows: a small Llama, quantized with NumPy. Run once; a golden is never made again to please a test."""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

target = Path(__file__).parent / "golden" / "toy8" / "rows"
target.mkdir(parents=True)
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    dtype="float32",
)  # fmt: skip
model = LlamaForCausalLM(config).eval()
tensors, reference = {}, {}
for name, module in model.named_modules():
    if isinstance(module, torch.nn.Linear) and name != "lm_head":
        weight = module.weight.detach().numpy()
        scale = (np.abs(weight).max(axis=1) / np.float32(127)).astype(np.float32)
        codes = np.clip(np.rint(weight / scale[:, None]), -127, 127).astype(np.int8)
        dense = codes.astype(np.float32) * scale[:, None]
        tensors[f"{name}.codes"], tensors[f"{name}.scale"] = torch.from_numpy(codes), torch.from_numpy(scale)
        reference[f"dense.{name}"] = torch.from_numpy(dense)
        x = np.linspace(-1, 1, 16 * weight.shape[1], dtype=np.float32).reshape(16, -1)
        reference[f"x.{name}"], reference[f"y.{name}"] = torch.from_numpy(x), torch.from_numpy(x @ dense.T)
        module.weight.data = torch.from_numpy(dense).clone()
for name, tensor in model.state_dict().items():
    if f"{name.removesuffix('.weight')}.codes" not in tensors:
        tensors[name] = tensor.clone()
ids = torch.arange(24).view(2, 12) * 5 % 64
with torch.no_grad():
    reference |= {"input_ids": ids, "logits": model(ids).logits}
save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
save_file(reference, target / "reference.safetensors")
written = config.to_dict() | {"architectures": ["LlamaForCausalLM"], "quantization_config": {"quant_method": "toy8"}}
written["quantization_config"]["modules_to_not_convert"] = None
(target / "config.json").write_text(json.dumps(written, indent=1, sort_keys=True, default=str))
made_by = f"make_golden.py with NumPy {np.__version__}, logits by transformers {transformers.__version__}"
fixture = {
    "method": "toy8",
    "made_by": made_by,
    "logits_atol": 1e-4,
    "dense_rtol": 0.0,
    "layer_rtol": 1e-5,
    "logits_note": "float32",
}
(target / "fixture.json").write_text(json.dumps(fixture, indent=1))
