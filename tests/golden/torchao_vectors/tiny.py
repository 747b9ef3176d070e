"""What make.py and make_old.py share: a tiny model, and the folder that a golden is."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

GOLDEN = Path(__file__).parent.parent / "torchao"
LAYERS = ("model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj")


def dense_model(folder: str, dtype: torch.dtype, bias: bool = True) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=64, tie_word_embeddings=False, attention_bias=bias,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.1)
    model.to(dtype).save_pretrained(folder)


def finish(
    folder: Path, model: torch.nn.Module, peer: str, made_by: str, dtype: torch.dtype, **fixture: object
) -> None:
    """Write reference.safetensors and fixture.json beside a saved model."""
    ids = (torch.arange(16) * 7 % 32)[None]
    with torch.no_grad():
        reference = {"input_ids": ids, "logits": model(ids).logits.float()}
        for number, name in enumerate(LAYERS):
            layer = model.get_submodule(name)
            generator = torch.Generator().manual_seed(number)
            x = torch.randn(1, 24, layer.weight.shape[1], generator=generator).to(dtype)
            reference[f"x.{name}"], reference[f"y.{name}"] = x, layer(x).float()
            reference[f"dense.{name}"] = layer.weight.dequantize().float()
    save_file({name: tensor.contiguous() for name, tensor in reference.items()}, folder / "reference.safetensors")
    described: Mapping[str, object] = {
        "method": "torchao", "variant": folder.name, "peer": peer, "made_by": made_by, "logits_from": "peer", **fixture,
    }  # fmt: skip
    (folder / "fixture.json").write_text(json.dumps(described, indent=2) + "\n")
    for name in ("generation_config.json", "README.md"):
        (folder / name).unlink(missing_ok=True)
