"""Rotations of what flows into and out of layers, as compressed-tensors' `transform_config` has them.

Fused rotations (weight_input, weight_output) are in the stored weight already. The others happen at run time: an input becomes
x @ M / sqrt(n), an output y @ M / sqrt(n), in runs of n. M is stored once, under the first module that uses it, as
`<module>.<group>_<location>.weight`; all others of the group with the same n share it. "hadamard" is Sylvester's matrix, which
needs no storing and no multiplying out; "random-matrix" has no factor, and its inverse is stored as a matrix of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from anybit._lazy import torch
from anybit.errors import CorruptFile, InvalidOption, MissingTensor, NotRepresentable, ShapeMismatch
from anybit.methods._compressed_schemes import Targets
from anybit.quantizers.attachments import Attachment, attach_after, attach_before
from anybit.weight.nodes import hadamard

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("hadamard", "random-hadamard", "random-matrix")
FUSED = ("weight_input", "weight_output")
ONLINE = ("input", "output", "q_attn", "k_cache")


@dataclass
class Turn(Attachment):
    """A rotation by blocks of `size`. `owner`: the module that holds the matrix; None for Sylvester's, worked out in parts."""

    size: int
    owner: Any = None
    inverse: bool = False
    scaled: bool = True
    precision: str = "float32"

    def __call__(self, module: Any, arguments: tuple[Any, ...], *output: Any) -> Any:
        if output:
            return self.turned(output[0])
        return (self.turned(arguments[0]), *arguments[1:])

    def turned(self, x: Tensor, back: bool = False) -> Tensor:
        """x [..., k * size], every run multiplied by the matrix; `back`: by its transpose."""
        dtype = getattr(torch, self.precision) if self.owner is None else self.owner.weight.dtype
        runs = x.to(dtype).unflatten(-1, (-1, self.size))
        if self.owner is None:
            return _sylvester(runs).flatten(-2).to(x.dtype)
        matrix = self.owner.weight.to(x.device)
        if "perm" in self.owner._buffers:
            order = self.owner.perm.to(x.device)
            matrix = matrix[order][:, order]
        matrix = matrix.T if (self.inverse and self.scaled) != back else matrix
        y = runs @ matrix
        return (y / self.size**0.5 if self.scaled else y).flatten(-2).to(x.dtype)


def _sylvester(x: Tensor) -> Tensor:
    """x [..., n] times the normalised Sylvester matrix, which is the Kronecker product of two small ones."""
    bits = x.shape[-1].bit_length() - 1
    left, right = 1 << (bits // 2), 1 << (bits - bits // 2)
    own = x.unflatten(-1, (left, right))
    y = hadamard(left, x.device).to(x.dtype) @ own @ hadamard(right, x.device).to(x.dtype)
    return y.flatten(-2)


@dataclass(frozen=True)
class Use:
    """One entry of `apply`: where a group of the configuration acts."""

    group: str
    kind: str
    location: str
    inverse: bool
    head_dim: int | None
    randomize: bool
    precision: str
    targets: Targets
    ignore: Targets

    def matches(self, name: str, classes: tuple[str, ...]) -> bool:
        return self.targets.find(name, classes) is not None and self.ignore.find(name, classes) is None

    @property
    def name(self) -> str:
        """Of the module that holds the matrix, below the module that it acts on."""
        return f"{self.group}_{self.location}"

    @property
    def shared(self) -> tuple[str, bool]:
        """What two uses have in common that share a matrix of one size."""
        return self.group, self.kind == "random-matrix" and self.inverse


def uses(transform_config: Mapping[str, Any] | None) -> list[Use]:
    """The uses of a configuration that act at run time, in its order. InvalidOption for what is not known."""
    found = []
    for group, scheme in ((transform_config or {}).get("config_groups") or {}).items():
        kind = scheme.get("type")
        for entry in scheme.get("apply") or []:
            location = entry.get("location")
            if kind not in KINDS or location not in FUSED + ONLINE:
                raise InvalidOption(
                    f"transform_config group {group!r} applies {kind!r} at {location!r}; known are {', '.join(KINDS)} at "
                    f"{', '.join(FUSED + ONLINE)}"
                )
            if location in ONLINE:
                found.append(
                    Use(
                        group,
                        kind,
                        location,
                        bool(entry.get("inverse")),
                        scheme.get("head_dim"),
                        bool(scheme.get("randomize")),
                        str(scheme.get("precision") or "float32").removeprefix("torch."),
                        Targets(_listed(entry.get("targets"))),
                        Targets(_listed(entry.get("ignore"))),
                    )
                )
    return found


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


class Rotations:
    """The rotations of one model. `keys`: of the buffers it was given; `turns`: of keys and queries, by attention module."""

    def __init__(self, transform_config: Mapping[str, Any] | None):
        self.uses = uses(transform_config)
        self.keys: set[str] = set()
        self.folds: dict[str, Callable[[Tensor], Tensor]] = {}
        self.turns: dict[str, dict[str, Turn]] = {}
        self._owners: dict[tuple[tuple[str, bool], int], Any] = {}

    def acts_on(self, name: str, classes: tuple[str, ...]) -> bool:
        """Whether something is rotated at run time at a module."""
        return any(use.matches(name, classes) for use in self.uses)

    def attach(self, model: Any, checkpoint: Any, path_of: Callable[[str], str | None]) -> None:
        """Hook every module that is rotated, and give the stored matrices a place."""
        if not self.uses:
            return
        self._hold_stored(model, checkpoint, path_of)
        before: dict[str, list[Turn]] = {}
        after: dict[str, list[Turn]] = {}
        holders = {key.rpartition(".")[0] for key in self.keys}
        modules = [(name, own, _classes(own)) for name, own in model.named_modules() if name not in holders]
        for use in self.uses:
            for name, module, classes in modules:
                if not use.matches(name, classes):
                    continue
                turn = self._turn(use, name, module)
                if use.location == "input":
                    attach_before(module, turn, first=True)  # the peer's later hooks run first
                    before.setdefault(name, []).insert(0, turn)
                elif use.location == "output":
                    attach_after(module, turn)
                    after.setdefault(name, []).append(turn)
                else:
                    self.turns.setdefault(name, {})[use.location] = turn
        for name in {*before, *after}:
            self._fold(name, model.get_submodule(name), before.get(name, []), after.get(name, []))

    def _hold_stored(self, model: Any, checkpoint: Any, path_of: Callable[[str], str | None]) -> None:
        """A module for every stored matrix, below the module it acts on."""
        names = {use.name: use for use in self.uses}
        pattern = re.compile(rf"(.+)\.({'|'.join(map(re.escape, names))})\.(weight|perm)")
        for key in checkpoint.tensors:
            match = pattern.fullmatch(key)
            if match is None:
                continue
            stored_owner, name, own = match.groups()
            path = path_of(stored_owner)
            if path is None:
                raise NotRepresentable(
                    f"{key} rotates what flows through {stored_owner}, which is no module of {type(model).__name__}; "
                    "rotations of single experts are not supported"
                )
            module = model.get_submodule(path)
            holder = module._modules.get(name)
            if holder is None:
                holder = torch.nn.Module()
                holder._is_hf_initialized = True  # type: ignore[assignment]
                module.add_module(name, holder)
            info = checkpoint.tensors[key]
            tensor = torch.empty(info.shape, dtype=getattr(torch, info.dtype), device="meta")
            holder.register_buffer(own, tensor)
            self.keys.add(f"{path}.{name}.{own}")
            if own == "weight":
                self._check(key, info, checkpoint)
                use = names[name]
                sylvester = use.kind == "hadamard" and not use.randomize
                if sylvester:
                    self._check_sylvester(key, checkpoint.read(key))
                self._owners.setdefault((use.shared, info.shape[0]), None if sylvester else holder)

    @staticmethod
    def _check(key: str, info: Any, checkpoint: Any) -> None:
        if len(info.shape) != 2 or info.shape[0] != info.shape[1] or not info.dtype.startswith(("float", "bfloat")):
            raise ShapeMismatch(
                f"tensor {key!r} in {info.file} is {info.dtype} {info.shape}; a rotation is a square of floats"
            )
        if not bool(torch.isfinite(checkpoint.read(key)).all()):
            raise CorruptFile(f"tensor {key!r} in {info.file} holds NaN or infinity; a damaged file, get it again")

    @staticmethod
    def _check_sylvester(key: str, matrix: Tensor) -> None:
        size = matrix.shape[0]
        known = hadamard(size) * size**0.5 if size & (size - 1) == 0 else None
        if known is None or not torch.equal(known.round().to(matrix.dtype), matrix):
            raise CorruptFile(
                f"tensor {key!r} is not the Sylvester-Hadamard matrix of {size} that the type 'hadamard' names; the file is "
                "damaged, or its transform_config means 'random-hadamard'"
            )

    def _turn(self, use: Use, name: str, module: Any) -> Turn:
        size = use.head_dim or _width(module, use.location)
        scaled = use.kind != "random-matrix"
        if use.kind == "hadamard" and not use.randomize:
            if size & (size - 1):
                raise NotRepresentable(
                    f"{name}: there is no Sylvester-Hadamard matrix of {size}, which is no power of two"
                )
            return Turn(size, None, use.inverse, scaled, use.precision)
        owner = module._modules.get(use.name) or self._owners.get((use.shared, size))
        if owner is None:
            raise MissingTensor(
                f"tensor '{name}.{use.name}.weight' is not stored, nor is a matrix of {size} under another module of group "
                f"{use.group!r}; a {use.kind} rotation cannot be worked out again"
            )
        return Turn(size, owner, use.inverse, scaled, use.precision)

    def _fold(self, path: str, module: Any, before: list[Turn], after: list[Turn]) -> None:
        """How the weight, and the bias, of a module do the rotations themselves."""

        def weight(dense: Tensor) -> Tensor:
            for turn in reversed(before):
                dense = turn.turned(dense, back=True)
            for turn in after:
                dense = turn.turned(dense.T).T
            return dense.contiguous()

        def bias(dense: Tensor) -> Tensor:
            for turn in after:
                dense = turn.turned(dense)
            return dense

        self.folds[f"{path}.weight"] = weight
        if after and getattr(module, "bias", None) is not None:
            self.folds[f"{path}.bias"] = bias


def _classes(module: Any) -> tuple[str, ...]:
    return tuple(cls.__name__ for cls in type(module).__mro__ if cls is not object)


def _width(module: Any, location: str) -> int:
    """Size of a rotation that the configuration gives none."""
    names = {"input": "in_features", "output": "out_features"}
    size = getattr(module, names.get(location, ""), None) or getattr(module, "embedding_dim", None)
    if not isinstance(size, int):
        raise InvalidOption(f"a rotation of a {type(module).__name__} needs a head_dim in transform_config")
    return size
