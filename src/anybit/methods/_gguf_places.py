"""Where the tensors of a checkpoint go in a GGUF file: names, types, and what is done to rows and numbers on the way."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from anybit._lazy import torch
from anybit.errors import ConfigError
from anybit.methods import _gguf_latent as latent
from anybit.methods._gguf_architecture import Architecture, Joined, Settings, Shape
from anybit.methods._gguf_mixes import NEVER
from anybit.quantizers.bundle import Placed
from anybit.weight.block_types import BY_NAME

if TYPE_CHECKING:
    from torch import Tensor

DENSE = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F32"}
# names of the number of experts in configurations
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
OTHERWISE = (
    "Keep the blocks in safetensors instead: load the model with this configuration and save it with save_pretrained"
)
Change = Callable[["Tensor"], "Tensor"]


def experts_of(settings: Settings) -> int:
    """How many there are. Some classes may have another number in each block."""
    found = next((settings[key] for key in EXPERTS if settings.get(key)), 0)
    return int(found[0] if isinstance(found, (list, tuple)) else found)


class Names:
    """Checkpoint module -> GGUF module, and the expert's number in a stack."""

    def __init__(self, architecture: Architecture):
        self._plain: dict[str, str] = {}
        self._piece: dict[str, tuple[int, int]] = {}
        self._stacked: set[str] = set()
        for own, target in architecture.names.items():
            if "{e}" in own:
                continue
            form = target.replace("=", "")
            if "{e}" in form:
                form = form if "{n}" in form else form.replace("{e}", "{n}")  # the first number is that of the part
                self._stacked.add(form)
            self._plain.setdefault(form, own)
        self._together = {owns[0]: owns for owns in architecture.joined}
        for owns, how in architecture.joined.items():
            self._plain[how.target.replace("=", "")] = f"blk.{{n}}.{owns[0]}"
        self._latent = architecture.latent
        for own, targets in architecture.pieces.items():
            for place, target in enumerate(targets):
                self._plain[target] = f"blk.{{n}}.{own}"
                self._piece[target] = place, len(targets)

    def find(self, module: str) -> tuple[str, int | None] | None:
        """`model.layers.3.mlp.experts.5.up_proj` -> ("blk.3.ffn_up_exps", 5)."""
        form, numbers = _form(module)
        own = self._plain.get(form)
        if own is None:
            return None
        expert = int(numbers[-1]) if form in self._stacked else None
        return (own.format(n=numbers[0]) if numbers else own), expert

    def everywhere(self, module: str) -> list[str]:
        """All GGUF modules that hold rows of this one."""
        where = self.find(module)
        if where is None:
            return []
        head, _, own = where[0].rpartition(".")
        return [f"{head}.{one}" for one in self._together.get(own, (own,))] if head else [where[0]]

    def dense(self, module: str) -> str | None:
        """Why a module has no blocks in a file, or None."""
        return latent.DENSE if self._latent and _form(module)[0] == self._latent else None

    def piece(self, module: str) -> tuple[int, int] | None:
        """Of a module that is a part of a GGUF matrix: which, of how many."""
        return self._piece.get(_form(module)[0])


def _form(module: str) -> tuple[str, list[str]]:
    """With {n} and {e} for the numbers."""
    numbers = re.findall(r"(?<=\.)\d+(?=\.|$)", module)
    for form in ("{n}", "{e}"):
        module = re.sub(r"(?<=\.)\d+(?=\.|$)", form, module, count=1)
    return module, numbers


class Places:
    """`tensors`: stored name -> (type, logical shape). `places`: a checkpoint's tensor -> where it goes.

    Made for `specs`, dtype and shape of the checkpoint's tensors. Raises ConfigError for one that has no place.
    """

    def __init__(
        self, settings: Settings, architecture: Architecture, specs: Mapping[str, tuple[str, Shape]], mix: str
    ):
        self.settings, self.architecture, self.mix = settings, architecture, mix
        self.names = Names(architecture)
        self.tensors: dict[str, tuple[str, Shape]] = {}
        self.places: dict[str, tuple[Placed, ...]] = {}
        self._forms = [_form(source)[0] for source in specs]
        self._experts: dict[str, set[int]] = {}
        parameters = {theirs: own for own, theirs in architecture.parameters.items()}
        for source, (dtype, shape) in specs.items():
            form, counted = _form(source)
            if form in parameters:
                self._parameter(source, shape, parameters[form], counted[0])
            else:
                self._module(source, dtype, shape)
        for target, numbers in self._experts.items():
            if numbers != set(range(self.tensors[target][1][0])):
                raise ConfigError(
                    f"{target!r} holds {self.tensors[target][1][0]} experts, but {len(numbers)} are in the checkpoint"
                )

    def _parameter(self, source: str, shape: Shape, own: str, number: str) -> None:
        """One that is kept under a name of its own."""
        target, change = own.format(n=number), self.architecture.changes.get(own)
        logical = change.shape_there(shape, self.settings) if change is not None else shape
        make = functools.partial(_other, change.there if change is not None else None, self.settings)
        self.tensors[target], self.places[source] = ("F32", logical), (Placed(target, None, make),)

    def _module(self, source: str, dtype: str, shape: Shape) -> None:
        module, own, block = _parted(source, dtype, self.names)
        where = self.names.find(module)
        if self.settings.get("tie_word_embeddings") and where == ("output", None):
            self.places[source] = ()  # llama.cpp takes the embedding
            return
        if where is None or not (block or own in ("weight", "bias")):
            raise ConfigError(
                f"tensor {source!r} has no name in a GGUF file of {self.architecture.model_type!r}. Vision towers, adapters and "
                f"other parts beside the language model are not written. {OTHERWISE}"
            )
        if self.names.dense(module) is not None:
            self._latent(source, dtype, shape, block, where[0])
            return
        head, _, name = where[0].rpartition(".")
        turned = name in self.architecture.transposed and own == "weight" and not block and len(shape) > 1
        if turned:
            shape = (*shape[:-2], shape[-1], shape[-2])
        owns, how = next(
            ((owns, how) for owns, how in self.architecture.joined.items() if owns[0] == name), ((name,), None)
        )
        axis = len(shape) - (2 if own == "weight" else 1)
        sizes = _sizes(how, self.settings, len(owns), shape[axis]) if how is not None else (0,)
        made: list[Placed] = []
        for number, one in enumerate(owns):
            target = f"{head}.{one}.{own}" if head else f"{one}.{own}"
            logical = shape if how is None else (*shape[:axis], sizes[number], *shape[axis + 1 :])
            if block:
                kind, logical = block, (*logical[:-1], logical[-1] // BY_NAME[block].bytes * BY_NAME[block].elements)
            else:
                kind = _dense_type(target, dtype, logical, self.mix)
            make = _make(self.settings, self.architecture, name, own, None if block else BY_NAME[kind].dtype)
            if turned or how is not None:
                start = sum(sizes[:number])
                cut = functools.partial(_rows_of, how, self.settings, axis, start, sizes[number]) if how else None
                make = functools.partial(_cut, turned, cut, make)
            if name in self.architecture.padded:
                make = functools.partial(_padded, int(self.settings["vocab_size"]), make)
                logical = (int(self.settings["vocab_size"]), *logical[1:])
            made.append(self._placed(module, target, where[1], kind, logical, make))
        self.places[source] = tuple(made)

    def _placed(self, module: str, target: str, expert: int | None, kind: str, logical: Shape, make: Change) -> Placed:
        """In a tensor of its own, or in one that it shares."""
        piece = self.names.piece(module)
        if piece is not None:
            logical = (logical[0] * piece[1], *logical[1:])
        if expert is not None:
            stacked = "_exps." in target
            count = experts_of(self.settings) if stacked else self._forms.count(_form(f"{module}.weight")[0])
            self._experts.setdefault(target, set()).add(expert)
            logical = (count, *logical)
        if self.tensors.setdefault(target, (kind, logical)) != (kind, logical):
            parts = "experts" if expert is not None else "parts"
            raise ConfigError(
                f"the {parts} of {target!r} would be {self.tensors[target]} and {(kind, logical)}; a GGUF file holds them in one "
                "tensor, so they must be alike"
            )
        return Placed(target, piece[0], make, piece[1]) if piece is not None else Placed(target, expert, make)

    def _latent(self, source: str, dtype: str, shape: Shape, block: str, place: str) -> None:
        if block:
            raise ConfigError(f"tensor {source!r} is made of blocks; {latent.DENSE}. {OTHERWISE}")
        kind = _dense_type("attn_kv_b.weight", dtype, shape, self.mix)
        made: list[Placed] = []
        for number, (part, wanted) in enumerate(zip(latent.PARTS, latent.part_shapes(self.settings), strict=True)):
            target = f"{place.rpartition('.')[0]}.{part}.weight"
            self.tensors[target] = kind, wanted
            make = functools.partial(latent.cut, self.settings, number, BY_NAME[kind].dtype)
            made.append(Placed(target, None, make))
        self.places[source] = tuple(made)


def _parted(source: str, dtype: str, names: Names) -> tuple[str, str, str]:
    """Module, "weight" or "bias", and the block type of a stored tensor, "" for a dense one."""
    if names.find(source) is not None:  # a parameter of its own
        return source, "weight", ""
    if source.endswith("_bias") and names.find(source.removesuffix("_bias")) is not None:
        return source.removesuffix("_bias"), "bias", ""
    module, _, own = source.rpartition(".")
    if own.upper() in BY_NAME and dtype == "uint8":
        return module, "weight", own.upper()
    return module, own, ""


def _dense_type(target: str, dtype: str, shape: tuple[int, ...], mix: str) -> str:
    """llama.cpp computes with vectors, norms and routers in float32; a matrix keeps its dtype, or gets the mix's."""
    if len(shape) < 2 or NEVER.search(target) or not target.endswith(".weight"):
        return "F32"
    return mix if mix in DENSE.values() else DENSE.get(dtype, "F32")


def _make(
    settings: Settings, architecture: Architecture, module: str, own: str, dtype: str | None
) -> Callable[[Tensor], Tensor]:
    """`dtype`: of a dense tensor in the file; None for blocks."""
    heads = 0
    if module in architecture.turned:
        heads = int(settings["num_attention_heads"])
        if module == "attn_k":
            heads = int(settings.get("num_key_value_heads") or heads)
    order = architecture.rows.get(module)
    rows = functools.partial(order, settings) if order is not None else None
    return functools.partial(_changed, heads, rows, module in architecture.shifted and own == "weight", dtype)


def _sizes(how: Joined, settings: Settings, count: int, rows: int) -> tuple[int, ...]:
    """Rows of each tensor of a file that a module is cut into."""
    return how.sizes(settings) if how.sizes is not None else (rows // count,) * count


def _rows_of(how: Joined, settings: Settings, axis: int, start: int, rows: int, tensor: Tensor) -> Tensor:
    if how.order is None:
        return tensor.narrow(axis, start, rows)
    return tensor.index_select(axis, how.order(settings, tensor.shape[axis])[start : start + rows])


def _cut(
    turned: bool, rows: Callable[[Tensor], Tensor] | None, then: Callable[[Tensor], Tensor], tensor: Tensor
) -> Tensor:
    """[.., in, out] -> [.., out, in]; then some of the rows."""
    if turned:
        tensor = tensor.transpose(-1, -2)
    return then((rows(tensor) if rows is not None else tensor).contiguous())


def _padded(rows: int, then: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """With rows of zeros at the end; zeros are also what a block of zero bytes stands for."""
    return torch.nn.functional.pad(then(tensor), (0, 0, 0, rows - tensor.shape[0]))


def _other(change: Callable[[Tensor, Settings], Tensor] | None, settings: Settings, tensor: Tensor) -> Tensor:
    tensor = tensor.to(torch.float32)
    return (change(tensor, settings) if change is not None else tensor).contiguous()


def _changed(heads: int, order: Callable[[], Tensor] | None, shift: bool, dtype: str | None, tensor: Tensor) -> Tensor:
    """Rows of a head in halves (r * half + i) -> in pairs (2i + r), or in another order; norms plus one."""
    if dtype is not None:
        tensor = (tensor.to(torch.float32) + 1 if shift else tensor).to(getattr(torch, dtype))
    if heads:
        halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
        tensor = halves.transpose(1, 2).reshape(tensor.shape)
    return tensor[order()] if order is not None else tensor
