"""Writes vectors.safetensors (weights, and what mlx.core.quantize and dequantize make of them) and ../metal/mlx-mixed.

Made on the CPU with: pip install "mlx[cpu]==0.32.4" mlx-lm==0.32.2 torch==2.13.0 transformers==5.23.0
"""

import json
import shutil
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from mlx_lm.utils import load_config, load_model, quantize_model, save_config, save_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
MODES = {"mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def to_torch(array: mx.array) -> torch.Tensor:
    if array.dtype == mx.bfloat16:
        return torch.tensor(np.array(array.astype(mx.float32))).to(torch.bfloat16)
    if array.dtype == mx.uint32:
        return torch.tensor(np.array(array.view(mx.int32))).view(torch.uint32)
    return torch.tensor(np.array(array))


def matrix(dtype: torch.dtype) -> torch.Tensor:
    """Rows of many sizes, some of one sign, one constant, one empty; small steps so that ties occur."""
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(24, 128, generator=generator) * torch.exp2(torch.rand(24, 1, generator=generator) * 8 - 8)
    found[0], found[1], found[2], found[3] = 0, 0.5, found[2].abs(), -found[3].abs()
    found[4:10] = (found[4:10] * 64).round() / 64
    return found.to(dtype)


def vectors() -> None:
    tensors = {}
    for name, dtype in DTYPES.items():
        dense = matrix(getattr(torch, name))
        tensors[f"{name}.dense"] = dense
        own = mx.array(dense.float().numpy()).astype(dtype)
        wanted = [
            ("affine", size, bits) for bits in (2, 3, 4, 5, 6, 8) for size in ((32, 64, 128) if bits == 4 else (64,))
        ]
        for mode, size, bits in [*wanted, *((mode, *sizes) for mode, sizes in MODES.items())]:
            parts = mx.quantize(own, group_size=size, bits=bits, mode=mode)
            back = mx.dequantize(*parts, group_size=size, bits=bits, mode=mode)
            for part, array in zip(("weight", "scales", "biases"), parts):
                tensors[f"{name}.{mode}.{bits}.{size}.{part}"] = to_torch(array)
            if bits in (3, 8) or mode == "nvfp4":
                tensors[f"{name}.{mode}.{bits}.{size}.back"] = to_torch(back)
    save_file(tensors, HERE / "vectors.safetensors")


def settings(path: str, module: object) -> object:
    """One mode or width for each layer; None is the default."""
    chosen = {
        "q_proj": {"mode": "mxfp4"}, "k_proj": {"bits": 6, "group_size": 32}, "v_proj": {"mode": "nvfp4"}, "o_proj": {"mode": "mxfp8"},
        "gate_proj": {"bits": 5, "group_size": 64}, "up_proj": False, "embed_tokens": {"bits": 8, "group_size": 128},
    }.get(path.rpartition(".")[2], True)  # fmt: skip
    if isinstance(chosen, dict) and "mode" in chosen:
        size, bits = MODES[chosen["mode"]]
        return {"group_size": size, "bits": bits, **chosen}
    return chosen


def mixed() -> None:
    """A whole model with tied embeddings, by mlx-lm, with the logits of its own forward."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=128, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=64, max_position_embeddings=128, tie_word_embeddings=True, dtype="bfloat16", attention_bias=True,
    )  # fmt: skip
    target = HERE.parent / "metal" / "mlx-mixed"
    shutil.rmtree(target, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        model = LlamaForCausalLM(config)
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.05)
        model.to(torch.bfloat16).save_pretrained(folder)
        loaded, _ = load_model(Path(folder))
        made, made_config = quantize_model(
            loaded, load_config(Path(folder)), group_size=32, bits=4, mode="mxfp4", quant_predicate=settings
        )
    save_model(target, made)
    save_config(made_config, target / "config.json")
    ids = torch.randint(0, 128, (1, 16), generator=torch.Generator().manual_seed(2))
    reference = {"input_ids": ids, "logits": to_torch(made(mx.array(ids.numpy()))).float()}
    for name, module in made.named_modules():
        if hasattr(module, "bits") and "down_proj" not in name:
            dense = mx.dequantize(
                module.weight, module.scales, module.get("biases"), group_size=module.group_size, bits=module.bits,
                mode=module.mode,
            )  # fmt: skip
            reference[f"dense.{name}"] = to_torch(dense)
    save_file(reference, target / "reference.safetensors")
    fixture = {
        "method": "metal", "variant": "mlx-mixed", "peer": "mlx-lm 0.32.2 + mlx 0.32.4",
        "made_by": "tests/golden/mlx_vectors/make.py", "logits_from": "peer", "activation_quant": False,
        "logits_atol": 0.25, "dense_rtol": 0.0,
    }  # fmt: skip
    (target / "fixture.json").write_text(json.dumps(fixture, indent=2) + "\n")


if __name__ == "__main__":
    vectors()
    mixed()
