"""What is said of an architecture of GGUF files, and the ways a file keeps a tensor otherwise than transformers does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from anybit._lazy import torch
from anybit.methods._gguf_metadata import Metadata

if TYPE_CHECKING:
    from torch import Tensor

Settings = Mapping[str, Any]  # in the words of transformers' configuration
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Change:
    """A dense parameter that a file keeps in another form. Each function gets the tensor (or its shape) and the settings."""

    there: Callable[[Tensor, Settings], Tensor]
    back: Callable[[Tensor, Settings], Tensor]
    shape_there: Callable[[Shape, Settings], Shape] = lambda shape, settings: shape
    shape_back: Callable[[Shape, Settings], Shape] = lambda shape, settings: shape


# [1, n] <-> [n]; some converters leave the first axis in the file
ROW = Change(
    lambda t, s: t.flatten(), lambda t, s: t.view(1, -1), lambda shape, s: shape[-1:], lambda shape, s: (1, shape[-1])
)


@dataclass(frozen=True)
class Joined:
    """A module of the checkpoint whose rows a file keeps in several tensors.

    `order`: for each row of those tensors, one after another, its row in the module (None: the same). `sizes`: rows of each
    (None: equal parts).
    """

    target: str
    order: Callable[[Settings, int], Tensor] | None = None
    sizes: Callable[[Settings], tuple[int, ...]] | None = None


def every_other(settings: Settings, rows: int) -> Tensor:
    """Even rows, then odd ones."""
    return torch.arange(rows).view(-1, 2).T.flatten()


@dataclass(frozen=True)
class Architecture:
    """`names`: GGUF module -> module of the checkpoint; {n} is the block, {e} the expert of a stack that is stored whole.

    A target that starts with "=" is a parameter itself, whose bias is called `_bias`. `parameters`: stored tensor -> tensor
    of the checkpoint, by full names, always float32; `changes`: what is done to them. `joined`: several GGUF modules whose
    rows are one target. `pieces`: one matrix whose rows are several targets. `rows`: GGUF module -> for each row its row in
    the checkpoint. `turned`: rows in rotary pairs. `shifted`: norms stored plus one. `transposed`: dense weights that
    transformers stores [in, out]. `padded`: modules whose rows a file fills up with zeros to those of the vocabulary.
    `latent`: the module that expands keys and values from a latent vector, which files keep in two (`_gguf_latent`).
    `constants`: metadata that transformers builds in and llama.cpp wants to read; `extra`: metadata worked out from the
    settings and the shapes of the file's tensors (None: leave it out). `refusal`: why llama.cpp does not load a model of
    these settings, or computes another one. `free`: settings that say nothing beside what is written. `others`: further model
    types that are written so. `when`: which files of the architecture's name it is; `suits`: which settings of the model
    type.
    """

    model_type: str
    model_class: str
    names: Mapping[str, str]
    settings: Callable[[Metadata], dict[str, Any]]
    joined: Mapping[tuple[str, ...], Joined] = field(default_factory=dict)
    parameters: Mapping[str, str] = field(default_factory=dict)
    changes: Mapping[str, Change] = field(default_factory=dict)
    pieces: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rows: Mapping[str, Callable[[Settings], Tensor]] = field(default_factory=dict)
    turned: tuple[str, ...] = ()
    shifted: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()
    padded: tuple[str, ...] = ()
    latent: str = ""
    constants: Mapping[str, Any] = field(default_factory=dict)
    extra: Callable[[Settings, Mapping[str, Shape]], dict[str, Any]] = lambda settings, shapes: {}
    refusal: Callable[[Settings], str | None] = lambda settings: None
    free: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    when: Callable[[Metadata], bool] = lambda metadata: True
    suits: Callable[[Settings], bool] = lambda settings: True


# --- names that many have ----------------------------------------------------------------------------------------------------

ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def blocks(names: Mapping[str, str], layers: str = "model.layers") -> dict[str, str]:
    """With the block's number on both sides."""
    return {f"blk.{{n}}.{own}": f"{layers}.{{n}}.{theirs}" for own, theirs in names.items()}


ATTENTION = {f"attn_{own}": f"self_attn.{theirs}" for own, theirs in (
    ("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("output", "o_proj"),
)}  # fmt: skip
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
MLP = {f"ffn_{own}": f"mlp.{own}_proj" for own in ("gate", "up", "down")}
TWO_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
FOUR_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    **{f"ffn_{own}_exps": f"mlp.experts.{{e}}.{own}_proj" for own in ("gate", "up", "down")},
}
SHARED_EXPERT = {f"ffn_{own}_shexp": f"mlp.shared_expert.{own}_proj" for own in ("gate", "up", "down")}
SHARED_EXPERTS = {f"ffn_{own}_shexp": f"mlp.shared_experts.{own}_proj" for own in ("gate", "up", "down")}
ROTARY = ("attn_q", "attn_k")
ALL_NORMS = ("output_norm", *FOUR_NORMS, *HEAD_NORMS)

LLAMA = {**ENDS, **blocks({**TWO_NORMS, **ATTENTION, **MLP})}
MOE = {**ENDS, **blocks({**TWO_NORMS, **ATTENTION, **MLP, **EXPERTS})}
