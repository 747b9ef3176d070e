"""Products put together from products: what a kernel that reads grids makes of the trees around them. No kernel by itself.

    {"rows" | "columns" | "stack": [...]}   parts above or beside each other; one program per expert
    {"sum": [...]}                          products added
    {"rotated": ...}                        the input or the output turned, instead of the weight
    {"scaled": ...}                         the input or the output scaled and shifted, instead of the weight
    {"permuted": ...}                       the input in another order
    {"cropped": ...}                        a padded weight: the input filled up, the output cut

Anything else is a leaf, which is the kernel's own. Programs are plain data, part of a kernel's spec.
"""

from __future__ import annotations

import functools
import json
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from anybit.kernels._grids import Refused, Workspace, restored
from anybit.kernels.base import Kernel
from anybit.weight import Weight, float8_products, integer_products, nodes
from anybit.weight.activation import RULES, Activation
from anybit.weight.nodes import Node, hadamard

# products of codes by codes, for inputs that rules made codes of; None: not of this tree
_UNITS = {torch.int8: integer_products.scaled_product, torch.float8_e4m3fn: float8_products.scaled_product}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # what leaves read and write

# --- trees -> programs ---------------------------------------------------------------------------------------------------------

LeafProgram = Callable[[Node, Workspace], "dict[str, Any]"]


def program_of(tree: Node, space: Workspace, leaf: LeafProgram) -> dict[str, Any]:
    """The program of a tree; Refused if there is none."""

    def of(part: Node) -> dict[str, Any]:
        return program_of(part, space, leaf)

    match tree:
        case nodes.Stack(parts=parts):
            return {"stack": [of(part) for part in parts]}
        case nodes.Rows(parts=parts):
            return {"rows": [of(part) for part in parts]}
        case nodes.Columns(parts=parts):
            return {"columns": [of(part) for part in parts]}
        case nodes.Sum(parts=parts, compute="float32"):
            return {"sum": [of(part) for part in parts]}
        case nodes.Rotate(child=child, size=size, side=side, matrix=matrix):
            if len(tree.shape) == 3:
                raise Refused("a stack of rotated experts; a matrix of that kind is accepted")
            slot = None if matrix is None else space.own_slot(matrix, False)
            return {"rotated": {"child": of(child), "size": size, "side": side, "matrix": slot}}
        case nodes.Scaled(child=child, scale=scale, offset=offset, compute="float32"):
            factors = None if scale is None else _along(scale, "scale", space)
            shifts = None if offset is None else _along(offset, "offset", space)
            return {"scaled": {"child": of(child), "factors": factors, "shifts": shifts}}
        case nodes.Permute(child=child, index=index) if not isinstance(child, nodes.Grid) and len(tree.shape) == 2:
            if not space.meta and not bool(((index >= 0) & (index < child.shape[-1])).all()):
                raise ValueError(f"an order of columns that names columns outside 0 .. {child.shape[-1] - 1}")
            return {"permuted": {"child": of(child), "order": space.own_slot(index, False)}}
        case nodes.Crop(
            child=nodes.Rotate() | nodes.Codebook() | nodes.Scaled() | nodes.Sum() as child, rows=rows, columns=columns
        ):
            return {"cropped": {"child": of(child), "rows": rows, "columns": columns}}
    return leaf(tree, space)


def _along(part: Node, name: str, space: Workspace) -> dict[str, Any]:
    """Numbers of a `Scaled`, one an input or one an output."""
    if len(part.shape) == 3 or 1 not in part.shape:
        raise Refused(f"a second {name} of {tuple(part.shape)} values; one a row or one a column is read")
    numbers = torch.empty(part.shape, device="meta") if space.meta else part.dense()
    along = "input" if part.shape[0] == 1 and part.shape[1] > 1 else "output"
    return {"along": along, "slot": space.add(numbers.reshape(-1))}


def any_leaf(program: dict[str, Any], wanted: Callable[[str, Any], bool]) -> bool:
    """Whether `wanted(kind, content)` holds for a leaf of the program."""
    ((kind, content),) = program.items()
    if isinstance(content, list):
        return any(any_leaf(part, wanted) for part in content)
    if isinstance(content, dict) and "child" in content:
        return any_leaf(content["child"], wanted)
    return wanted(kind, content)


# --- kernels of programs -------------------------------------------------------------------------------------------------------


class ProgramKernel(Kernel):
    """A kernel that runs programs: it brings the leaves."""

    nested: ClassVar[bool] = False  # whether leaves read scales that are codes themselves; see Workspace

    @abstractmethod
    def leaf_program(self, tree: Node, space: Workspace) -> dict[str, Any]:
        """The program of what is no composition; Refused if there is none."""

    @abstractmethod
    def leaf(self, kind: str, content: Any) -> Program:
        """That program as it was written into a spec."""

    def scheme_program(self, weight: Weight) -> dict[str, Any]:
        """The program of a weight as far as it needs no numbers. Raises Refused."""
        if weight.activation is not None and weight.activation.rule not in RULES:
            raise Refused(f"activation rule {weight.activation.rule!r} is not registered")
        scheme = weight.map(lambda tensor: tensor if tensor.device.type == "meta" else tensor.to("meta"))
        return program_of(scheme.tree, Workspace(scheme, nested=self.nested), self.leaf_program)

    def prepare(self, weight: Weight) -> tuple[str, list[Tensor]]:
        space = Workspace(weight, nested=self.nested)
        program = program_of(weight.tree, space, self.leaf_program)
        spec = {"structure": weight.structure(), "own": space.own, "moved": space.moved, "program": program}
        if not space.meta and weight.activation is not None and weight.activation.rows:
            spec["alike"] = _alike(weight.activation)
        return json.dumps(spec, default=vars, separators=(",", ":")), space.tensors

    def restore(self, spec: str, tensors: list[Tensor]) -> Weight:
        form = form_of(self, spec)
        return restored(form.structure, tensors[: form.own], form.moved, tensors)

    def seen_by_rules(self, spec: str, tensors: list[Tensor]) -> Weight:
        """The weight as activation rules see it; codes that no rule reads may be left out, on the meta device."""
        return self.restore(spec, tensors)

    def linear(self, x: Tensor, spec: str, tensors: list[Tensor], bias: Tensor | None) -> Tensor:
        form = form_of(self, spec)
        if form.rule is not None:
            weight, rule = self.seen_by_rules(spec, tensors), form.rule
            if form.alike and weight.activation is not None:
                rule = weight.activation.base
                weight = replace(weight, activation=weight.activation.parts[0])

            def product(rows: Tensor) -> Tensor:
                units = _UNITS.get(rows.dtype)
                whole = units(weight.tree, rows) if units is not None else None
                return form.program.linear(rows, tensors, None, torch.float32) if whole is None else whole

            return RULES[rule](x, weight, bias, product)
        return form.program.linear(x, tensors, bias, x.dtype)

    def input_gradient(self, gradient: Tensor, spec: str, tensors: list[Tensor]) -> Tensor:
        program = form_of(self, spec).program
        total = torch.zeros(gradient.shape[0], program.columns, dtype=torch.float32, device=gradient.device)
        program.add_gradient(gradient, tensors, total)
        return total.to(gradient.dtype)


@dataclass(frozen=True)
class Form:
    """A spec, read."""

    structure: str
    own: int
    moved: dict[int, list[tuple[int, int]]]
    rule: str | None
    program: Program
    alike: bool  # parts of the rows have scales of their own for inputs, all the same


@functools.lru_cache(maxsize=4096)
def form_of(kernel: ProgramKernel, spec: str) -> Form:
    """What `prepare` wrote."""
    parts = json.loads(spec)
    activation = json.loads(parts["structure"]).get("activation")
    moved = {int(slot): moves for slot, moves in parts["moved"].items()}
    rule = activation and activation["rule"]
    program = build(parts["program"], kernel.leaf)
    return Form(parts["structure"], parts["own"], moved, rule, program, parts.get("alike", False))


def _alike(activation: Activation) -> bool:
    """Settled once: a product that compared them would wait for the device."""
    first, *others = (part.tensors for part in activation.parts)
    return all(torch.equal(one, other) for part in others for one, other in zip(first, part, strict=True))


# --- programs that run -------------------------------------------------------------------------------------------------------


def build(program: dict[str, Any], leaf: Callable[[str, Any], Program]) -> Program:
    """A program as it was written into a spec; `leaf(kind, content)` makes the kernel's own."""
    ((kind, content),) = program.items()
    if kind in _OF_PARTS:
        return _OF_PARTS[kind]([build(part, leaf) for part in content])
    if kind in _OF_CHILD:
        return _OF_CHILD[kind](build(content["child"], leaf), content)
    return leaf(kind, content)


class Program:
    """A matrix, or a stack of them, as steps over the prepared tensors."""

    rows: int
    columns: int

    def linear(self, x: Tensor, tensors: list[Tensor], bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """x [n, columns] -> [n, rows] in `dtype`."""
        self.check(x)
        y = torch.empty(x.shape[0], self.rows, dtype=dtype if dtype in DTYPES else torch.float32, device=x.device)
        if bias is not None:
            if bias.shape != (self.rows,):
                raise RuntimeError(f"a bias of shape {tuple(bias.shape)} for {self.rows} outputs")
            bias = readable(bias.detach()).contiguous()
        self.into(readable(x), tensors, bias, y)
        return y if y.dtype == dtype else y.to(dtype)

    def check(self, x: Tensor) -> None:
        """Kernels believe what they are told, so sizes are compared here, as torch does it in a product."""
        if x.shape[1] != self.columns:
            raise RuntimeError(f"an input of shape {tuple(x.shape)} does not fit a weight of {self.columns} columns")

    def into(
        self, x: Tensor, tensors: list[Tensor], bias: Tensor | None, y: Tensor, add: bool = False, expert: int = 0
    ) -> None:
        """Write x @ W.T + bias into y, whose rows may lie apart, or add it to a float32 y."""
        raise NotImplementedError(type(self).__name__)

    def each_expert(self, x: Tensor, ends: Tensor, tensors: list[Tensor], y: Tensor) -> None:
        """Products of a stack: expert e owns rows ends[e-1] .. ends[e] of x and y."""
        start = 0
        for expert, stop in enumerate(ends.tolist()):
            if stop > start:
                self.into(x[start:stop], tensors, None, y[start:stop], expert=expert)
            start = stop

    def add_gradient(self, gradient: Tensor, tensors: list[Tensor], total: Tensor) -> None:
        """total [n, columns] += gradient [n, rows] @ W."""
        raise NotImplementedError(type(self).__name__)


def readable(x: Tensor) -> Tensor:
    """As leaves take it."""
    return x if x.dtype in DTYPES else x.to(torch.float32)


def _put(found: Tensor, bias: Tensor | None, y: Tensor, add: bool) -> None:
    found = found if bias is None else found + bias.to(torch.float32)
    if add:
        y += found
    else:
        y.copy_(found)


class RowParts(Program):
    """Parts one above the other: each writes its own outputs."""

    def __init__(self, parts: list[Program]):
        self.parts = parts
        self.rows, self.columns = sum(part.rows for part in parts), parts[0].columns

    def into(
        self, x: Tensor, tensors: list[Tensor], bias: Tensor | None, y: Tensor, add: bool = False, expert: int = 0
    ) -> None:
        start = 0
        for part in self.parts:
            stop = start + part.rows
            part.into(x, tensors, None if bias is None else bias[start:stop], y[:, start:stop], add, expert)
            start = stop

    def add_gradient(self, gradient: Tensor, tensors: list[Tensor], total: Tensor) -> None:
        start = 0
        for part in self.parts:
            part.add_gradient(gradient[:, start : start + part.rows], tensors, total)
            start += part.rows


class ColumnParts(Program):
    """Parts side by side: their products are added in float32."""

    def __init__(self, parts: list[Program]):
        self.parts = parts
        self.rows, self.columns = parts[0].rows, sum(part.columns for part in parts)

    def into(
        self, x: Tensor, tensors: list[Tensor], bias: Tensor | None, y: Tensor, add: bool = False, expert: int = 0
    ) -> None:
        total = y if add else torch.zeros(y.shape, dtype=torch.float32, device=y.device)
        start = 0
        for part in self.parts:
            own = bias if start == 0 else None
            part.into(x[:, start : start + part.columns], tensors, own, total, True, expert)
            start += part.columns
        if not add:
            y.copy_(total)

    def add_gradient(self, gradient: Tensor, tensors: list[Tensor], total: Tensor) -> None:
        start = 0
        for part in self.parts:
            part.add_gradient(gradient, tensors, total[:, start : start + part.columns])
            start += part.columns


class SumParts(Program):
    """Parts on top of each other: their products are added in float32."""

    def __init__(self, parts: list[Program]):
        self.parts = parts
        self.rows, self.columns = parts[0].rows, parts[0].columns

    def into(
        self, x: Tensor, tensors: list[Tensor], bias: Tensor | None, y: Tensor, add: bool = False, expert: int = 0
    ) -> None:
        total = y if add else torch.zeros(y.shape, dtype=torch.float32, device=y.device)
        for number, part in enumerate(self.parts):
            part.into(x, tensors, bias if number == 0 else None, total, True, expert)
        if not add:
            y.copy_(total)

    def add_gradient(self, gradient: Tensor, tensors: list[Tensor], total: Tensor) -> None:
        for part in self.parts:
            part.add_gradient(gradient, tensors, total)


class ExpertParts(Program):
    """One program per expert."""

    def __init__(self, parts: list[Program]):
        self.parts = parts
        self.rows, self.columns = parts[0].rows, parts[0].columns

    def into(
        self, x: Tensor, tensors: list[Tensor], bias: Tensor | None, y: Tensor, add: bool = False, expert: int = 0
    ) -> None:
        self.parts[expert].into(x, tensors, bias, y, add)


class Rotated(Program):
    """W = child @ M in every run of columns, or M @ child in every run of rows: x or y is turned in its place, in float32."""

    def __init__(self, child: Program, content: dict[str, Any]):
        self.child, self.size, self.side, self.matrix = child, content["size"], content["side"], content["matrix"]
        self.rows, self.columns = child.rows, child.columns

    def _turned(self, x: Tensor, tensors: list[Tensor], back: bool) -> Tensor:
        """Every run of `size` numbers of a row times M transposed, or times M on the way back."""
        matrix = _hadamard(self.size, x.device) if self.matrix is None else tensors[self.matrix["position"]].float()
        return (x.to(torch.float32).reshape(-1, self.size) @ (matrix if back else matrix.T)).view(x.shape)

    def into(
        self, x: Tensor, tensors: list[Tensor], bias: Tensor | None, y: Tensor, add: bool = False, expert: int = 0
    ) -> None:
        if self.side == "input":
            self.child.into(self._turned(x, tensors, False).to(x.dtype), tensors, bias, y, add, expert)
        else:
            _put(self._turned(self.child.linear(x, tensors, None, torch.float32), tensors, False), bias, y, add)

    def add_gradient(self, gradient: Tensor, tensors: list[Tensor], total: Tensor) -> None:
        if self.side == "input":
            own = torch.zeros_like(total)
            self.child.add_gradient(gradient, tensors, own)
            total += self._turned(own, tensors, True)
        else:
            self.child.add_gradient(self._turned(gradient, tensors, True), tensors, total)


_hadamard = functools.lru_cache(maxsize=32)(hadamard)


class ScaledProduct(Program):
    """A factor for every input or for every output of the child, and a number that is added to all its weights there."""

    def __init__(self, child: Program, content: dict[str, Any]):
        self.child, self.factors, self.shifts = child, content["factors"], content["shifts"]
        self.rows, self.columns = child.rows, child.columns

    def _numbers(self, part: dict[str, Any] | None, along: str, tensors: list[Tensor]) -> Tensor | None:
        return tensors[part["slot"]["position"]] if part is not None and part["along"] == along else None

    def into(
        self, x: Tensor, tensors: list[Tensor], bias: Tensor | None, y: Tensor, add: bool = False, expert: int = 0
    ) -> None:
        if (factors := self._numbers(self.factors, "input", tensors)) is not None:
            if self.shifts is None:
                return self.child.into((x.to(torch.float32) * factors).to(x.dtype), tensors, bias, y, add, expert)
            found = self.child.linear((x.to(torch.float32) * factors).to(x.dtype), tensors, None, torch.float32)
        else:
            found = self.child.linear(x, tensors, None, torch.float32)
        if (factors := self._numbers(self.factors, "output", tensors)) is not None:
            found = found * factors
        if (shifts := self._numbers(self.shifts, "input", tensors)) is not None:
            found = found + (x.to(torch.float32) @ shifts)[:, None]
        if (shifts := self._numbers(self.shifts, "output", tensors)) is not None:
            found = found + x.to(torch.float32).sum(1, keepdim=True) * shifts
        _put(found, bias, y, add)
        return None

    def add_gradient(self, gradient: Tensor, tensors: list[Tensor], total: Tensor) -> None:
        full = gradient.to(torch.float32)
        if (shifts := self._numbers(self.shifts, "input", tensors)) is not None:
            total += full.sum(1, keepdim=True) * shifts
        if (shifts := self._numbers(self.shifts, "output", tensors)) is not None:
            total += (full @ shifts.expand(self.rows))[:, None]
        if (factors := self._numbers(self.factors, "output", tensors)) is not None:
            self.child.add_gradient(full * factors, tensors, total)
        elif (factors := self._numbers(self.factors, "input", tensors)) is not None:
            own = torch.zeros_like(total)
            self.child.add_gradient(gradient, tensors, own)
            total += own * factors
        else:
            self.child.add_gradient(gradient, tensors, total)


class Permuted(Program):
    """Column j of the child meets input order[j]."""

    def __init__(self, child: Program, content: dict[str, Any]):
        self.child, self.position = child, content["order"]["position"]
        self.rows, self.columns = child.rows, child.columns

    def into(
        self, x: Tensor, tensors: list[Tensor], bias: Tensor | None, y: Tensor, add: bool = False, expert: int = 0
    ) -> None:
        self.child.into(x.index_select(1, tensors[self.position]), tensors, bias, y, add, expert)

    def add_gradient(self, gradient: Tensor, tensors: list[Tensor], total: Tensor) -> None:
        own = torch.zeros_like(total)
        self.child.add_gradient(gradient, tensors, own)
        total.index_add_(1, tensors[self.position], own)


class Cropped(Program):
    """The first rows and columns of a padded child."""

    def __init__(self, child: Program, content: dict[str, Any]):
        self.child, self.rows, self.columns = child, content["rows"], content["columns"]

    def into(
        self, x: Tensor, tensors: list[Tensor], bias: Tensor | None, y: Tensor, add: bool = False, expert: int = 0
    ) -> None:
        full = torch.nn.functional.pad(x, (0, self.child.columns - self.columns))
        if self.child.rows == self.rows:
            self.child.into(full, tensors, bias, y, add, expert)
        else:
            _put(self.child.linear(full, tensors, None, torch.float32)[:, : self.rows], bias, y, add)

    def add_gradient(self, gradient: Tensor, tensors: list[Tensor], total: Tensor) -> None:
        own = torch.zeros(total.shape[0], self.child.columns, dtype=torch.float32, device=total.device)
        self.child.add_gradient(torch.nn.functional.pad(gradient, (0, self.child.rows - self.rows)), tensors, own)
        total += own[:, : self.columns]


_OF_PARTS: dict[str, Callable[[list[Program]], Program]] = {
    "rows": RowParts, "columns": ColumnParts, "stack": ExpertParts, "sum": SumParts,
}  # fmt: skip
_OF_CHILD: dict[str, Callable[[Program, dict[str, Any]], Program]] = {
    "rotated": Rotated, "scaled": ScaledProduct, "permuted": Permuted, "cropped": Cropped,
}  # fmt: skip
