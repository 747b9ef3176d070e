"""Settings of Gemma 3n (its language model) in GGUF files. llama.cpp builds most of them in: only the two published sizes fit."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

from anybit.methods import _gguf_settings as read
from anybit.methods._gguf_architecture import Settings, Shape
from anybit.methods._gguf_metadata import Metadata

# built into llama.cpp: blocks whose MLP is sparse, and how sparse; blocks with keys of their own
SPARSE, SPARSITY, OWN_KEYS = 10, 0.95, 20
BUILT_IN = {"altup_num_inputs": 4, "altup_active_idx": 0, "laurel_rank": 64, "hidden_size_per_layer_input": 256}


def read_settings(m: Metadata) -> dict[str, Any]:
    found = read.gemma(m)
    scales = m.numbers("activation_sparsity_scale", array("f"))
    theta = m.number("rope.freq_base_swa", 10_000.0)
    full = dict(found["rope_parameters"])
    if not m.has("rope.freq_base"):
        full["rope_theta"] = 1_000_000.0
    return {
        **found,
        "rope_parameters": {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": theta}},
        "sliding_window": m.whole("attention.sliding_window"),
        "layer_types": read.windows(m, 5),
        "final_logit_softcapping": m.number("final_logit_softcapping") if m.has("final_logit_softcapping") else None,
        "vocab_size_per_layer_input": m.shape("per_layer_token_embd.weight")[0],
        "hidden_size_per_layer_input": m.whole("embedding_length_per_layer_input", 256),
        "num_kv_shared_layers": m.whole("attention.shared_kv_layers", max(0, m.blocks - OWN_KEYS), least=0),
        "altup_num_inputs": m.whole("altup.num_inputs", 4),
        "altup_active_idx": m.whole("altup.active_idx", 0, least=0),
        "laurel_rank": m.shape("blk.0.laurel_l.weight")[0],
        # a share of the MLP's channels that is cut off; the file has the limit in standard deviations
        "activation_sparsity_pattern": [round(NormalDist().cdf(scale), 4) for scale in scales]
        or [SPARSITY] * SPARSE + [0.0] * (m.blocks - SPARSE),
    }


def extra(settings: Settings, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    limits = [
        NormalDist().inv_cdf(share) if share else -float("inf") for share in settings["activation_sparsity_pattern"]
    ]
    widths = settings["intermediate_size"]
    return {
        "feed_forward_length": array("i", widths) if isinstance(widths, (list, tuple)) else widths,
        "altup.active_idx": settings["altup_active_idx"],
        "altup.num_inputs": settings["altup_num_inputs"],
        "embedding_length_per_layer_input": settings["hidden_size_per_layer_input"],
        "attention.shared_kv_layers": settings["num_kv_shared_layers"],
        "activation_sparsity_scale": array("f", limits),
    }


def refusal(settings: Settings) -> str | None:
    layers, shares = settings["num_hidden_layers"], list(settings["activation_sparsity_pattern"])
    for name, value in BUILT_IN.items():
        if settings[name] != value:
            return f"its Gemma 3n has {name}={value}, and this is {settings[name]}"
    if shares != [SPARSITY if number < SPARSE else 0.0 for number in range(layers)]:
        return f"the MLPs of its first {SPARSE} blocks are cut at {SPARSITY}, and of no others"
    if settings["num_kv_shared_layers"] != max(0, layers - OWN_KEYS):
        return (
            f"its blocks from {OWN_KEYS} on take the keys of others (num_kv_shared_layers={max(0, layers - OWN_KEYS)})"
        )
    return None
