"""Small transformers models written as GGUF files the way llama.cpp's converter writes them. Independent of the library."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf_files as g
import numpy as np
import torch
from torch import Tensor

F32, F16, Q8_0 = 0, 1, 8
Made = list[tuple[str, Tensor]]
VOCABULARY, HIDDEN, HEADS, KV_HEADS, LAYERS, WIDTH, LENGTH = 96, 64, 4, 2, 2, 128, 64

# transformers' names -> GGUF's, both without the layer's number
LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp", "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp", "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}  # fmt: skip
ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
SANDWICH = {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip


def paired(rows: Tensor, heads: int) -> Tensor:
    """llama.cpp's `permute`: halves of a head -> pairs."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def experts(name: str, tensor: Tensor) -> Made | None:
    """A fused stack -> gate, up and down stacks."""
    match = re.match(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up_proj|down_proj)$", name)
    if match is None:
        return None
    if match[2] == "down_proj":
        return [(f"blk.{match[1]}.ffn_down_exps.weight", tensor)]
    gate, up = tensor.chunk(2, 1)
    return [(f"blk.{match[1]}.ffn_gate_exps.weight", gate), (f"blk.{match[1]}.ffn_up_exps.weight", up)]


@dataclass
class Case:
    """One architecture: transformers' configuration, GGUF's metadata, and what the converter does to tensors."""

    architecture: str
    config: dict[str, Any]
    metadata: dict[str, Any]
    layer: dict[str, str] = field(default_factory=dict)
    ends: dict[str, str] = field(default_factory=dict)
    rotary_pairs: bool = False
    norms_plus_one: bool = False
    special: Callable[[str, Tensor], Made | None] = experts
    extra: Sequence[tuple[str, Tensor]] = ()
    atol: float = 2e-5

    def tensors(self, model: Any) -> Made:
        found: Made = []
        for name, tensor in model.state_dict().items():
            if name in getattr(model, "all_tied_weights_keys", {}):
                continue
            special = self.special(name, tensor)
            found += special if special is not None else [self._plain(name, tensor, model.config)]
        return [*found, *self.extra]

    def _plain(self, name: str, tensor: Tensor, config: Any) -> tuple[str, Tensor]:
        module, _, kind = name.rpartition(".")
        match = re.match(r"(?:model\.layers|transformer\.h)\.(\d+)\.(.+)", module)
        if match is None:
            own = {**ENDS, **self.ends}[module]
        else:
            own = {**LAYER, **self.layer}[match[2]]
            if self.rotary_pairs and own in ("attn_q", "attn_k"):
                tensor = paired(tensor, config.num_attention_heads if own == "attn_q" else config.num_key_value_heads)
            own = f"blk.{match[1]}.{own}"
        if self.norms_plus_one and "norm" in own and kind == "weight":
            tensor = tensor + 1
        return f"{own}.{kind}", tensor


def q8_0(matrix: np.ndarray) -> tuple[bytes, np.ndarray]:
    """Blocks, and the numbers they stand for."""
    blocks = matrix.reshape(-1, 32)
    scale = (np.abs(blocks).max(1, keepdims=True) / 127).astype(np.float16)
    inverse = np.where(scale == 0, 0, 1 / np.where(scale == 0, 1, scale.astype(np.float32)))
    codes = np.clip(np.round(blocks * inverse), -127, 127).astype(np.int8)
    raw = np.concatenate([scale.view(np.uint8), codes.view(np.uint8)], 1).tobytes()
    return raw, (codes.astype(np.float32) * scale.astype(np.float32)).reshape(matrix.shape)


def write(file: Path, case: Case, model: Any, *, kind: int = F32, tokenizer: dict[str, Any] | None = None) -> None:
    """Matrices become Q8_0 where rows allow, and the model gets the numbers of the blocks: both have the same weights."""
    if kind == Q8_0:
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if tensor.dim() > 1 and "norm" not in name and _blocks_lie_along_rows(model, name, tensor):
                    tensor.copy_(torch.from_numpy(q8_0(tensor.float().numpy())[1]))
    stored = []
    for name, tensor in case.tensors(model):
        content = tensor.detach().float().contiguous().numpy()
        quantized = kind == Q8_0 and content.ndim > 1 and content.shape[-1] % 32 == 0 and "ffn_gate_inp" not in name
        raw = q8_0(content)[0] if quantized else content.tobytes()
        stored.append((name, content.shape[::-1], Q8_0 if quantized else F32, raw))
    prefix = case.architecture
    metadata = {"general.architecture": prefix, **{
        key if key.startswith("tokenizer.") else f"{prefix}.{key}": value for key, value in case.metadata.items()
    }, **(tokenizer or {})}  # fmt: skip
    file.write_bytes(g.build(metadata, stored))


def _blocks_lie_along_rows(model: Any, name: str, tensor: Tensor) -> bool:
    return tensor.shape[-1] % 32 == 0 and not getattr(model, "weights_are_turned", False)
