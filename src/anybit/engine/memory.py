"""What a model takes beside its weights: key/value cache, activations, training. Closed forms over its configuration.

The factors were fitted to the largest resident memory of `generate` in processes of their own (Linux, torch 2.13, CPU, SDPA); a
test holds the sum to 10 % of the measured peak. Where a configuration does not say what a form needs, a note says what was
assumed.
"""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from anybit.engine.plan import Entry, Plan
from anybit.errors import InvalidOption
from anybit.kernels import get
from anybit.weight import Layout, Weight
from anybit.weight.activation import RULES
from anybit.weight.nodes import Grid, children

# Python with torch, transformers and a model class; beside an accelerator's memory it lies in the host's
RUNTIME_BYTES = 450 << 20
# thread pools, a tokenizer, generate's own
RUNNING_BYTES = 30 << 20
# of one layer, per token: copies of the hidden state and of the widest inner state that live at once
HIDDEN_COPIES, INNER_COPIES = 3, 4
# float32 copies of a product's input or output, the larger: torch's own for dense weights, native code for integer codes and
# for tables, the reference kernel, and activation rules whose steps depend on the numbers
DENSE_COPIES, INTEGER_COPIES, TABLE_COPIES, REFERENCE_COPIES, RULE_COPIES = 0.9, 2.5, 1.4, 2.0, 9
# what watching a rule does not show: copies that native code makes, and what the allocator keeps
NATIVE_RULE_FACTOR, REFERENCE_RULE_FACTOR = 2.2, 1.5
REFERENCE_CHUNK_BYTES = 32 << 20  # rows that it decodes at once
# QLoRA: rank 16 on every packed linear; bytes of a parameter with its gradient and AdamW's two moments, float32
LORA_RANK, LORA_BYTES = 16, 16

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
}


def parse_size(text: str | int | float, what: str = "memory") -> int:
    """ "8GB", "7.5 GiB", 8000000000 -> bytes. InvalidOption for what is no size."""
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        number, unit = float(text), ""
    else:
        words = str(text).strip().replace(" ", "").upper()
        digits = words.rstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
        unit = words[len(digits) :]
        try:
            number = float(digits)
        except ValueError:
            number = -1.0
    if unit not in _UNITS or not 0 < number < float("inf"):
        raise InvalidOption(f"{what} is {text!r}; write a number and a unit, e.g. 8GB, 7.5GiB or 600MB")
    return int(number * _UNITS[unit])


def available_memory(device: torch.device) -> int | None:
    """Free bytes on a device of this machine; None where the system does not say, or there is no such device."""
    if device.type == "cpu":
        try:
            lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
            return 1024 * int(lines["MemAvailable"].split()[0])
        except (OSError, KeyError, ValueError):
            pass
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, OSError, ValueError):
            return None
    try:
        return int(getattr(torch, device.type).mem_get_info(device)[0])
    except (AttributeError, AssertionError, RuntimeError, TypeError):
        return None


@dataclass(frozen=True)
class Shape:
    """What the forms need of a model's configuration. `layers`: positions each layer's cache keeps (None: all of them)."""

    hidden: int
    inner: int
    vocabulary: int
    layers: tuple[int | None, ...]
    cached_per_token: int
    longest: int | None
    choices: int = 0  # experts that a token goes to
    notes: tuple[str, ...] = ()


def shape_of(config: Any) -> Shape:
    """From transformers' configuration of a (text) model."""
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config

    def number(*names: str) -> int | None:
        found = (getattr(text, name, None) for name in names)
        return next(
            (value for value in found if isinstance(value, int) and not isinstance(value, bool) and value > 0), None
        )

    notes = []
    hidden = number("hidden_size", "n_embd", "d_model", "dim") or 0
    if not hidden:
        notes.append("the configuration names no hidden size: activations are left out")
    heads = number("num_attention_heads", "n_head", "num_heads")
    shared = number("num_key_value_heads", "num_kv_heads", "n_head_kv") or heads
    count = number("num_hidden_layers", "n_layer", "num_layers") or 0
    width = number("head_dim") or (hidden // heads if heads else 0)
    if number("kv_lora_rank") and heads:  # transformers keeps what the latent is expanded to
        key = (number("qk_nope_head_dim") or 0) + (number("qk_rope_head_dim") or 0)
        cached = heads * (key + (number("v_head_dim") or width))
    elif heads and shared:
        cached = 2 * shared * width
    else:
        cached = 0
        notes.append("the configuration names no attention heads: no key/value cache is counted")
    window = number("sliding_window")
    types: Sequence[str] | None = getattr(text, "layer_types", None)
    if isinstance(types, (list, tuple)) and types:
        kept = tuple(
            window if "sliding" in str(kind) else 0 if "linear" in str(kind) or "mamba" in str(kind) else None
            for kind in types
        )
        if 0 in kept:
            notes.append("layers with a recurrent state are counted without it")
    else:
        everywhere = window if window and getattr(text, "use_sliding_window", True) else None
        kept = (everywhere,) * count
    experts = number("num_experts_per_tok", "num_experts_per_token") or 0
    inner = number("intermediate_size", "n_inner", "ffn_dim", "d_ff") or 4 * hidden
    if experts and number("moe_intermediate_size"):
        inner = max(inner, experts * (number("moe_intermediate_size") or 0))
    return Shape(
        hidden, inner, number("vocab_size") or 0, kept, cached,
        number("max_position_embeddings", "n_positions"), experts, tuple(notes),
    )  # fmt: skip


def cache_bytes(shape: Shape, batch: int, context: int, itemsize: int) -> int:
    """Key/value cache of `batch` sequences of `context` positions."""
    positions = sum(context if kept is None else min(kept, context) for kept in shape.layers)
    return batch * positions * shape.cached_per_token * itemsize


def activation_bytes(shape: Shape, plan: Plan, batch: int, context: int) -> int:
    """Largest sum of temporaries while a prompt of `context` positions is read: one layer's states and its kernel's own."""
    tokens, itemsize = batch * context, plan.dtype.itemsize
    states = tokens * itemsize * HIDDEN_COPIES * shape.hidden
    inner = tokens * itemsize * INNER_COPIES * shape.inner + _kernel_bytes(plan, tokens)
    return RUNNING_BYTES + states + max(inner, _experts_bytes(shape, plan, tokens)) + 4 * batch * shape.vocabulary


def _kernel_bytes(plan: Plan, tokens: int) -> int:
    """What the hungriest product makes for itself beside its output."""
    largest = 0
    for entry in plan.entries:
        if entry.slot.kind in ("embedding", "experts"):
            continue
        if not any(part.isdigit() for part in entry.slot.module.split(".")):
            continue  # generation asks the output layer for the last position only
        largest = max(largest, _product_bytes(_layout_of(entry), entry.kernel, *entry.slot.shape[-2:], tokens))
    return largest


def _experts_bytes(shape: Shape, plan: Plan, tokens: int) -> int:
    """Of stacks of experts, whose inputs are one row for each choice of each token; rules of inputs see one expert's at a time.

    Either a product is the largest moment, or the end: what the experts say, its weighted copy in float32 and that in order.
    """
    stacks = [entry for entry in plan.entries if entry.slot.kind == "experts"]
    if not stacks or not shape.choices:
        return 0
    rows, itemsize, largest = tokens * shape.choices, plan.dtype.itemsize, 0
    for entry in stacks:
        layout = _layout_of(entry)
        seen = tokens if layout is not None and layout.scheme().activation is not None else rows
        own = _product_bytes(layout, entry.kernel, *entry.slot.shape[-2:], seen)
        largest = max(largest, own + rows * itemsize * sum(entry.slot.shape[-2:]))
    return max(largest, rows * shape.hidden * (itemsize + 8) + 4 * tokens * shape.hidden)


def _layout_of(entry: Entry) -> Layout | None:
    return next((part.layout for part in entry.parts if part.layout is not None), None)


@functools.lru_cache(maxsize=4096)
def _product_bytes(layout: Any, kernel: str, rows: int, columns: int, tokens: int) -> int:
    if layout is None:
        return int(4 * DENSE_COPIES * tokens * max(rows, columns))
    scheme = layout.scheme()
    native = kernel in ("", "unknown") or get(kernel).rank > 0
    if scheme.activation is not None:
        factor = NATIVE_RULE_FACTOR if native else REFERENCE_RULE_FACTOR
        return _rule_bytes(scheme, rows, columns, tokens, factor)
    if native:
        copies = INTEGER_COPIES if _integers(scheme) else TABLE_COPIES
        return int(4 * copies * tokens * max(rows, columns))
    return int(4 * REFERENCE_COPIES * tokens * max(rows, columns)) + REFERENCE_CHUNK_BYTES


def _integers(scheme: Weight) -> bool:
    """Whether the weight's own codes are integers, not places in a table."""
    nodes = [scheme.tree]
    while nodes:
        node = nodes.pop(0)
        if isinstance(node, Grid):
            return node.levels is None
        nodes += [inside for _, inside in children(node)]
    return False


def _rule_bytes(scheme: Weight, rows: int, columns: int, tokens: int, factor: float) -> int:
    """Largest sum of temporaries while an activation rule runs: it runs, on the meta device, and is watched."""
    x = torch.empty(tokens, columns, dtype=torch.bfloat16, device="meta")
    try:
        with torch.no_grad(), _Watch() as watch:
            RULES[scheme.activation.rule](  # type: ignore[union-attr]
                x, scheme, None, lambda given: torch.empty(given.shape[0], rows, device="meta")
            )
        return int(factor * watch.most)
    except (RuntimeError, NotImplementedError, TypeError, ValueError):  # its steps depend on the numbers
        return 4 * RULE_COPIES * tokens * columns


class _Watch(TorchDispatchMode):
    """Bytes of the tensors that operations made and that are alive, and their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.most = 0
        self.holders: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {tensor.untyped_storage()._cdata for tensor in args if isinstance(tensor, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata in given and storage._cdata not in self.holders:
                continue
            if self.holders.get(storage._cdata, 0) == 0:
                self.alive += storage.nbytes()
                self.most = max(self.most, self.alive)
            self.holders[storage._cdata] = self.holders.get(storage._cdata, 0) + 1
            weakref.finalize(tensor, self._let_go, storage._cdata, storage.nbytes())
        return result

    def _let_go(self, storage: int, size: int) -> None:
        self.holders[storage] -= 1
        if self.holders[storage] == 0:
            self.alive -= size


def training_bytes(shape: Shape, plan: Plan, batch: int, context: int) -> int:
    """QLoRA with gradient checkpointing: adapters and optimizer, one hidden state a layer, logits and one layer's graph."""
    adapters = sum(
        LORA_RANK * sum(entry.slot.shape[-2:]) * LORA_BYTES
        for entry in plan.entries
        if entry.action != "dense" and entry.slot.kind in ("linear", "conv1d")
    )
    tokens, itemsize = batch * context, plan.dtype.itemsize
    states = tokens * itemsize * shape.hidden * len(shape.layers)
    graph = 3 * tokens * itemsize * (HIDDEN_COPIES * shape.hidden + INNER_COPIES * shape.inner)
    logits = 3 * 4 * tokens * shape.vocabulary
    return RUNNING_BYTES + adapters + states + graph + logits
