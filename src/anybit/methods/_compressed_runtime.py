"""What compressed-tensors quantizes beside weights and their inputs: queries, keys and values, outputs of layers.

Stored: q_scale, k_scale and v_scale [1] or [heads, 1, 1] of an attention module (files before 0.7 left the last two at
k_proj.output_scale and v_proj.output_scale), output_scale and output_zero_point of a layer. They become buffers of the modules.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from anybit._lazy import torch
from anybit.errors import MissingTensor, NotRepresentable, ShapeMismatch
from anybit.methods._compressed_inputs import quantized
from anybit.methods._compressed_layouts import positive
from anybit.methods._compressed_schemes import Arguments, Matcher
from anybit.methods._kv_cache import RoundedCache, attach_queries, has_cache, straight
from anybit.methods._rotations import Rotations, Turn
from anybit.quantizers.attachments import Attachment, attach_after, attach_before

if TYPE_CHECKING:
    from torch import Tensor

PROJECTIONS = ("k_proj", "v_proj", "qkv_proj", "kv_b_proj")
PARAMETERS = re.compile(r"(.+)\.((?:q|k|v|output)_(?:scale|zero_point|global_scale))")
CACHE_SCALE = re.compile(r"\.(?:[kv]_scale|[kv]_proj\.output_scale)$")
FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclass
class RoundedStates:
    """Queries, keys or values as their codes stand for them. `turn`: a rotation only the codes see (SpinQuant's R3)."""

    args: Arguments
    prefix: str
    turn: Turn | None = None

    def __call__(self, attention: Any, states: Tensor) -> Tensor:
        if self.turn is not None:
            states = self.turn.turned(states)
        scale = self._stored(attention, "scale") if self.args.dynamic == "no" else None
        # the peer takes one scale for a head where the scheme says token
        axes = (-2, -1)
        found = quantized(
            states,
            self.args,
            scale,
            self._stored(attention, "zero_point"),
            self._stored(attention, "global_scale"),
            axes,
        )
        # queries and keys are turned alike, so that turning both back leaves their products the same
        return found if self.turn is None else self.turn.turned(found, back=True)

    def _stored(self, attention: Any, what: str) -> Tensor | None:
        own: Tensor | None = attention._buffers.get(f"{self.prefix}_{what}")
        if own is None:
            projection = attention._modules.get(f"{self.prefix}_proj")
            own = projection._buffers.get(f"output_{what}") if projection is not None else None
        return own


@dataclass
class RoundedOutput(Attachment):
    """The output of a layer as its codes stand for it."""

    args: Arguments

    def __call__(self, module: Any, arguments: Any, output: Tensor) -> Tensor:
        found = {name: module._buffers.get(f"output_{name}") for name in ("scale", "zero_point", "global_scale")}
        scale = found["scale"] if self.args.dynamic == "no" else None
        return straight(output, quantized(output, self.args, scale, found["zero_point"], found["global_scale"]))


class Runtime:
    """Hooks and buffers of one model. `keys`: of the buffers; see `HfQuantizer.attach`.

    `making`: the checkpoint is dense, so that static parameters are still to be measured, and nothing rounds by them.
    """

    def __init__(
        self,
        matcher: Matcher,
        cache: Arguments | None,
        transform_config: Mapping[str, Any] | None,
        making: bool = False,
    ):
        self.matcher, self.cache, self.making = matcher, cache, making
        self.rotations = Rotations(transform_config)
        self._own: set[str] = set()

    @property
    def keys(self) -> set[str]:
        return self._own | self.rotations.keys

    def attach(self, model: Any, checkpoint: Any, path_of: Callable[[str], str | None]) -> None:
        """Everything, in the order it acts."""
        self._hold_stored(model, checkpoint, path_of)
        outputs = any(scheme.outputs is not None for scheme in self.matcher.schemes.values())
        attention = self.cache is not None or any(scheme.weights is None for scheme in self.matcher.schemes.values())
        modules = list(model.named_modules()) if outputs or attention else []
        for name, module in modules:
            classes = tuple(cls.__name__ for cls in type(module).__mro__)
            scheme = None if self.matcher.ignored(name, classes) else self.matcher.scheme(name, classes)
            if scheme is not None and scheme.outputs is not None and hasattr(module, "weight"):
                if self.making and scheme.outputs.dynamic != "yes":
                    continue
                _require(module, name, "output", scheme.outputs)
                attach_after(module, RoundedOutput(scheme.outputs))
        self.rotations.attach(model, checkpoint, path_of)
        for name, module in modules:
            if has_cache(module) and any(own in module._modules for own in PROJECTIONS):
                self._round_cache(name, module)

    def _round_cache(self, name: str, module: Any) -> None:
        classes = tuple(cls.__name__ for cls in type(module).__mro__)
        scheme = None if self.matcher.ignored(name, classes) else self.matcher.scheme(name, classes)
        turns = self.rotations.turns.get(name, {})
        args = self.cache
        named = scheme is not None and scheme.weights is None and scheme.inputs is not None
        if scheme is not None and named:
            args = scheme.inputs  # a group that names attention quantizes its queries too
        if args is None or (self.making and args.dynamic != "yes"):
            return
        if named:
            _require(module, name, "q", args)
            attach_queries(module, RoundedStates(args, "q", turns.get("q_attn")))
        if ("k_cache" in turns) != ("q_attn" in turns):
            raise NotRepresentable(
                f"{name}: transform_config rotates {'keys but not queries' if 'k_cache' in turns else 'queries but not keys'}, "
                "which changes their products"
            )
        for prefix in ("k", "v"):
            _require(module, name, prefix, args)
        attach_before(
            module,
            RoundedCache(RoundedStates(args, "k", turns.get("k_cache")), RoundedStates(args, "v")),
            with_kwargs=True,
        )

    def _hold_stored(self, model: Any, checkpoint: Any, path_of: Callable[[str], str | None]) -> None:
        """A buffer for every stored parameter of keys, values and outputs."""
        for key, info in checkpoint.tensors.items():
            match = PARAMETERS.fullmatch(key)
            path = path_of(match.group(1)) if match is not None else None
            if match is None or path is None:
                continue
            own, module = match.group(2), model.get_submodule(path)
            if own.startswith(("q_", "k_", "v_")) and not has_cache(module):
                continue
            if info.dtype not in (*FLOATS, "int8", "float8_e4m3fn"):
                raise ShapeMismatch(
                    f"tensor {key!r} in {info.file} is {info.dtype} {info.shape}; it must be a scale or zero point"
                )
            if own.endswith("scale"):
                positive(key, checkpoint.read(key))
            module.register_buffer(own, torch.empty(info.shape, dtype=getattr(torch, info.dtype), device="meta"))
            self._own.add(f"{path}.{own}")


def _require(module: Any, name: str, prefix: str, args: Arguments) -> None:
    """The static parameters that a scheme needs are stored."""
    wanted = {"no": "scale", "local": "global_scale", "yes": None}[args.dynamic]
    if wanted is None:
        return
    found = (
        RoundedStates(args, prefix)._stored(module, wanted)
        if prefix != "output"
        else module._buffers.get(f"output_{wanted}")
    )
    if found is None:
        raise MissingTensor(
            f"tensor '{name}.{prefix}_{wanted}' is not stored; the configuration quantizes {_WHAT[prefix]} with it ({args})"
        )
    heads = (found.shape[0], 1, 1) if args.strategy == "attn_head" and found.dim() == 3 else None
    if args.strategy in ("tensor", "attn_head") and found.numel() != 1 and tuple(found.shape) != heads:
        raise ShapeMismatch(
            f"tensor '{name}.{prefix}_{wanted}' has shape {tuple(found.shape)}; strategy {args.strategy!r} needs "
            f"{'[heads, 1, 1]' if args.strategy == 'attn_head' else '[1]'}"
        )


_WHAT = {"q": "queries", "k": "keys", "v": "values", "output": "outputs"}
