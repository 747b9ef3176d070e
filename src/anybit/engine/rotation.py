"""Hadamard rotation before quantization (QuaRot arXiv 2404.00456, SpinQuant arXiv 2405.16406): outliers spread over all columns.

    r1  the residual stream x becomes x Q: what writes to it (embedding, o_proj, down_proj) is multiplied by Q on its output,
        what reads it (q, k, v, gate, up, routers, lm_head) on its input; gains of RMSNorms, which do not commute with Q, move
        into the readers first, and an output layer that shared the embedding's weight gets one of its own
    r2  each head of v_proj and o_proj: values become v R, and o_proj undoes it
    r4  the input of down_proj is multiplied by a Hadamard matrix at run time; only for formats that can say so

r1 and r2 are fused: the model computes what it did, with other weights. The checkpoint is seen through them, one tensor at a
time, so every method, algorithm and memory cap works as it does without. A model is taken apart by the names of its layers and
by trying its norms; anything that is not known to commute is refused by name.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from anybit.algorithms._hadamard import Turn, power_of_two_in
from anybit.containers import Checkpoint
from anybit.containers.renamed import Renamed
from anybit.engine.calibration import find_blocks
from anybit.engine.load import Prepared
from anybit.engine.rotated_tensor import Change, as_stored, one_more
from anybit.errors import ConfigError, InvalidOption, NotRepresentable, did_you_mean
from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.bundle import Derived

STEPS = {"r1": "residual stream", "r2": "heads of v and o", "r4": "input of down_proj, at run time"}
FUSED = ("r1", "r2")  # the others happen at run time
READERS = re.compile(
    r"self_attn\.(q|k|v|qkv)_proj\.weight|(mlp|block_sparse_moe)\.((shared_experts?\.)?(gate|up|gate_up)_proj\.weight"
    r"|gate\.weight|experts\.gate_up_proj|shared_expert_gate\.weight)"
)
WRITERS = re.compile(
    r"self_attn\.o_proj\.(weight|bias)|(mlp|block_sparse_moe)\.((shared_experts?\.)?down_proj\.(weight|bias)|experts\.down_proj)"
)
# what lies between readers and writers of one layer, and does not see the residual stream
INSIDE = re.compile(
    r"self_attn\.((q|k|v|qkv)_proj\.bias|[qk]_norm\.weight)"
    r"|(mlp|block_sparse_moe)\.((shared_experts?\.)?(gate|up|gate_up)_proj\.bias|gate\.(bias|e_score_correction_bias))"
)
NORMS = ("input_layernorm", "post_attention_layernorm")  # of attention, of what follows
JOINING = {"MergeModulelist", "Concatenate"}  # operations on stored tensors that leave their last two axes alone


def steps(text: str | bool) -> tuple[str, ...]:
    """The steps that "r1+r2" names, in order; True: all that can be fused. InvalidOption for an unknown one."""
    if text is True:
        return FUSED
    found = [] if text is False else [step.strip().lower() for step in str(text).split("+")]
    for step in found:
        if step not in STEPS:
            known = ", ".join(f"{name} ({what})" for name, what in STEPS.items())
            raise InvalidOption(
                f"rotate is {text!r}; {step!r} is no rotation{did_you_mean(step, STEPS) or '.'} Known: {known}"
            )
    return tuple(step for step in STEPS if step in found)


@dataclass
class Rotated:
    """How a dense checkpoint is seen rotated. `inputs`: layers whose input is turned at run time, in runs of `input_size`.

    `config`: what the model's configuration says now and did not before.
    """

    made: dict[str, Derived] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    input_size: int = 0
    notes: list[str] = field(default_factory=list)

    def through(self, checkpoint: Checkpoint, quantizer: HfQuantizer | None = None) -> Checkpoint:
        """The same tensors, rotated as they are read, in the dtype they are stored in; the quantizer is told of `inputs`."""
        if self.inputs and quantizer is not None:
            quantizer.rotate_inputs(self.inputs, self.input_size)
        return Renamed(checkpoint, self.made, self.ignored)


def rotated(ready: Prepared, wanted: tuple[str, ...], seed: int = 0) -> Rotated:
    """What `wanted` rotations make of a dense model. NotRepresentable names what cannot be rotated, and why."""
    return _Rotation(ready, wanted, seed).made()


def untied(config: Any, seen: Rotated) -> Any:
    """The model's configuration for the rotated checkpoint; None where it is the stored one."""
    if not seen.config:
        return None
    own = copy.deepcopy(config)
    for name, value in seen.config.items():
        setattr(own, name, value)
    return own


# --- the whole model ----------------------------------------------------------------------------------------------------------


class _Rotation:
    """Finds the role of every tensor of one model."""

    def __init__(self, ready: Prepared, wanted: tuple[str, ...], seed: int):
        self.ready, self.wanted, self.model = ready, wanted, ready.model
        if ready.quantizer is not None:
            raise ConfigError(
                f"{ready.folder} is quantized with {ready.quantizer.method_name}; rotations start from dense weights. "
                "Dequantize it first (anybit dequantize)"
            )
        self.prefix, self.blocks = find_blocks(self.model)
        config = self.model.config
        self.width = int(getattr(config, "hidden_size", 0) or 0)
        self.stream = Turn(self.width, seed)
        self.seed = seed
        self.result = Rotated()
        self._untied_from = ""  # the embedding, where the output layer shares it
        self.entries = {entry.slot.parameter: entry for entry in ready.plan.entries}
        self.gains: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {}  # norm -> stored name, what it multiplies by

    def made(self) -> Rotated:
        tensors = self.ready.checkpoint.tensors
        changes: dict[str, tuple[Change, str | None]] = {}
        if "r1" in self.wanted:
            self._add(changes, self._stream())
        if "r2" in self.wanted:
            self._add(changes, self._heads())
        if "r4" in self.wanted:
            self._add(changes, self._inputs())
        for name, (change, norm) in changes.items():
            source = name if name in tensors else self._untied_from
            info = tensors[source]
            sources = (source,) if norm is None else (source, norm)
            self.result.made[name] = Derived(sources, info.dtype, tuple(info.shape), make=change.run)
        self.result.notes = [f"rotated: {step}, {STEPS[step]}" for step in self.wanted]
        if self.result.config:
            self.result.notes.append(
                "rotated: the output layer no longer shares the embedding's weight, which has no gain in it"
            )
        self.result.ignored = {name: "" for name in tensors if name not in self.result.made}
        return self.result

    @staticmethod
    def _add(changes: dict[str, tuple[Change, str | None]], more: Iterator[tuple[str, Change, str | None]]) -> None:
        """Several rotations of one tensor: columns by columns, rows by rows."""
        for name, change, norm in more:
            if name in changes:
                old, own = changes[name]
                change = replace(old, columns=old.columns + change.columns, rows=old.rows + change.rows)
                norm = own
            changes[name] = change, norm

    def _refuse(self, key: str, why: str) -> NotRepresentable:
        return NotRepresentable(
            f"{key} of {type(self.model).__name__} cannot be rotated: {why}. Quantize without rotate, or with a method that "
            "rotates each layer by itself (higgs, fp_quant)"
        )

    # --- r1 ---

    def _stream(self) -> Iterator[tuple[str, Change, str | None]]:
        outside = self.prefix.rpartition(".")[0]
        final = f"{outside}.norm" if outside else "norm"
        table = f"{outside}.embed_tokens.weight" if outside else "embed_tokens.weight"
        head = self._head()
        for key in [*self.ready.names.state, *self.ready.plan.plain]:
            self._known(key, final, table, head)
        gains = [final, *(f"{self.prefix}.{number}.{norm}" for number in range(len(self.blocks)) for norm in NORMS)]
        for norm in gains:
            yield self._norm(norm)
        yield from self._changed(table, Change(columns=(self.stream,)))
        yield from self._output(head, table, final)
        for key in self.ready.names.state:
            number, own = self._inside(key)
            if number is None or own in NORMS:
                continue
            if READERS.fullmatch(own):
                norm = f"{self.prefix}.{number}.{NORMS[0] if own.startswith('self_attn.') else NORMS[1]}"
                stored, gain = self.gains[norm]
                yield from self._changed(key, Change(gain=gain, columns=(self.stream,)), stored)
            elif WRITERS.fullmatch(own):
                yield from self._changed(key, Change(rows=((self.stream, 0),)))

    def _head(self) -> str:
        output = self.model.get_output_embeddings() if hasattr(self.model, "get_output_embeddings") else None
        found = next((name for name, module in self.model.named_modules() if module is output), None)
        if found is None:
            raise self._refuse("the model", "it has no output layer, so its outputs would come out rotated")
        return f"{found}.weight"

    def _inside(self, key: str) -> tuple[int | None, str]:
        """Number of the block, and the name in it."""
        start = f"{self.prefix}."
        number, _, own = key.removeprefix(start).partition(".")
        return (int(number), own) if key.startswith(start) and number.isdecimal() else (None, key)

    def _known(self, key: str, final: str, table: str, head: str) -> None:
        number, own = self._inside(key)
        if number is None:
            if key not in (table, head, f"{final}.weight", head.removesuffix("weight") + "bias"):
                raise self._refuse(key, "what it does to the residual stream is not known")
        elif own.removesuffix(".weight") not in NORMS and not _has_role(own):
            what = "a norm of a layer's output" if "norm" in own else "what it does to the residual stream is not known"
            raise self._refuse(key, what)

    def _norm(self, path: str) -> tuple[str, Change, str | None]:
        """The norm without its gain, which is noted for those that read its output."""
        key = f"{path}.weight"
        module = self.model.get_submodule(path) if path in dict(self.model.named_modules()) else None
        infos = self.ready.plan.plain.get(key)
        if module is None or infos is None or len(infos) != 1:
            raise self._refuse(path, "there is no such norm, and readers of the stream are found by it")
        around_one = self._gain_of(path, module)
        self.gains[path] = infos[0].name, one_more if around_one else as_stored
        return infos[0].name, Change(constant=0.0 if around_one else 1.0), None

    def _gain_of(self, path: str, module: nn.Module) -> bool:
        """Whether the gain is stored around one; the norm is tried, and must be an RMSNorm."""
        if module._parameters.get("bias") is not None:
            raise self._refuse(path, f"{type(module).__name__} has a bias; only an RMSNorm commutes with a rotation")
        with torch.no_grad():
            tried = copy.deepcopy(module).to_empty(device="cpu").float()
            generator = torch.Generator().manual_seed(0)
            x, gain = (torch.randn(self.width, generator=generator) + 0.5 for _ in range(2))
            tried.weight.copy_(gain)  # type: ignore[operator]
            given = tried(x[None])[0] / (x / x.square().mean().sqrt())
        for around_one in (False, True):
            if torch.allclose(given, gain + around_one, rtol=1e-3, atol=1e-3):
                return around_one
        raise self._refuse(path, f"{type(module).__name__} is no RMSNorm, and only that commutes with a rotation")

    def _output(self, head: str, table: str, final: str) -> Iterator[tuple[str, Change, str | None]]:
        stored, gain = self.gains[final]
        change = Change(gain=gain, columns=(self.stream,))
        if head in self.ready.plan.tied:
            self._untied_from = self._stored(table)[0]
            self.result.config["tie_word_embeddings"] = False
            yield head, change, stored
            for name in self.ready.plan.ignored:  # a copy of the table that files of tied models may have
                if name != head and self.ready.plan.ignored[name].startswith("tied to"):
                    raise self._refuse(name, "it shares the embedding's weight under another name")
        else:
            yield from self._changed(head, change, stored)

    # --- r2 and r4 ---

    def _heads(self) -> Iterator[tuple[str, Change, str | None]]:
        config = self.model.config
        heads = int(getattr(config, "num_attention_heads", 0) or 0)
        groups = int(getattr(config, "num_key_value_heads", None) or heads)
        size = int(getattr(config, "head_dim", None) or (self.width // heads if heads else 0))
        turn = Turn(size, self.seed + 1)
        for number in range(len(self.blocks)):
            start = f"{self.prefix}.{number}.self_attn."
            value = next(
                (start + own for own in ("v_proj", "qkv_proj") if f"{start}{own}.weight" in self.entries), None
            )
            output = self.entries.get(f"{start}o_proj.weight")
            if value is None or output is None:
                raise self._refuse(
                    start.removesuffix("."), "it has no v_proj (or qkv_proj) and o_proj, whose heads are rotated"
                )
            rows = self.entries[f"{value}.weight"].slot.shape[0]
            first = rows - groups * size
            wanted = 0 if value.endswith(".v_proj") else heads * size + groups * size
            if first != wanted or output.slot.shape[1] != heads * size:
                raise self._refuse(
                    value,
                    f"it has {rows} rows and o_proj {output.slot.shape[1]} columns, which are not {heads} heads of {size} with "
                    f"{groups} of keys and values",
                )
            for key in self.ready.names.state:
                if key.startswith(start) and not _has_role(self._inside(key)[1]):
                    raise self._refuse(key, "what it does to the values is not known")
            for own in ("weight", "bias"):
                if f"{value}.{own}" in self.ready.names.state:
                    yield from self._changed(f"{value}.{own}", Change(rows=((turn, first),)))
            yield from self._changed(f"{start}o_proj.weight", Change(columns=(turn,)))

    def _inputs(self) -> Iterator[tuple[str, Change, str | None]]:
        found = [
            entry for entry in self.entries.values() if re.search(r"\.down_proj(\.weight)?$", entry.slot.parameter)
        ]
        for entry in found:
            if entry.slot.kind == "experts":
                raise self._refuse(entry.slot.module, "inputs of single experts are not rotated at run time")
        sizes = {power_of_two_in(entry.slot.shape[1]) for entry in found}
        if not found or len(sizes) > 1 or min(sizes) < 16:
            raise self._refuse(
                "down_proj",
                f"r4 needs one power of two, at least 16, that divides its inputs; found {sorted(sizes) or 'no layer'}",
            )
        self.result.input_size = sizes.pop()
        turn = Turn(self.result.input_size, None)
        for entry in found:
            self.result.inputs.append(entry.slot.module)
            yield from self._changed(entry.slot.parameter, Change(columns=(turn,)))

    # --- stored names ---

    def _stored(self, key: str) -> list[str]:
        entry = self.entries.get(key)
        if entry is not None:
            return [info.name for part in entry.parts for info in part.stored.values()]
        return [info.name for info in self.ready.plan.plain.get(key, ())]

    def _changed(self, key: str, change: Change, norm: str | None = None) -> Iterator[tuple[str, Change, str | None]]:
        """The change for every stored tensor that a weight of the model is made of."""
        entry = self.entries.get(key)
        conversions = [
            self.ready.plan.conversions.get(key),
            *(part.conversion for part in (entry.parts if entry else ())),
        ]
        for conversion in conversions:
            kinds = {type(one).__name__ for one in getattr(conversion, "operations", ())}
            if kinds - JOINING:
                raise self._refuse(key, f"it is made of stored tensors by {', '.join(sorted(kinds - JOINING))}")
        turned = entry is not None and entry.slot.transposed and all(part.conversion is None for part in entry.parts)
        names = self._stored(key)
        if not names:
            raise self._refuse(key, "it is not stored")
        for name in names:
            yield name, replace(change, transposed=turned), norm


def _has_role(name: str) -> bool:
    """Whether it is known what a tensor of a block does to the residual stream, or that it does not see it."""
    return any(roles.fullmatch(name) for roles in (READERS, WRITERS, INSIDE))
