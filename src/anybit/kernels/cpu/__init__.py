"""Native CPU kernels: grids of 1- to 8-bit codes and codebooks, from their packed bytes (csrc/, called through ctypes).

Accuracy of `cpu`: sums in float32 whatever the input's dtype, and weights too, with two exceptions for a bfloat16 input on CPUs
that multiply bfloat16: numbers of tables that it cannot hold (NF4) are rounded to it, and from native.MANY rows of input on all
weights are, as they would be in a dense layer of that dtype. The dense weight never exists. For few rows of input, codes of up to
7 bits meet inputs as whole numbers, off by at most 2**-23 of the largest of 32 neighbours (csrc/grid_limbs.h); so do llama.cpp's
lattices of integers where CPUs multiply bytes, of 24 bits for a float32 input, else of 16 (csrc/book_lattices.h).

`cpu_fast` has to be asked for (`anybit.kernels.set_accuracy("fast")` before loading, or ANYBIT_CPU_ACCURACY=fast): with fewer
than native.MANY rows of input it rounds them to 8 bits, 32 columns sharing a scale, as llama.cpp does. It prepares weights as
`cpu` does; `explain` and plans name it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from anybit.errors import InvalidOption
from anybit.kernels._codebooks import is_codebook
from anybit.kernels._grids import E4M3, E5M2, TABLE, Refused, Workspace, grid_program, rounds_inputs
from anybit.kernels._outliers import rounded_program, sparse_program
from anybit.kernels._programs import Program, ProgramKernel, any_leaf, form_of, readable
from anybit.kernels.cpu import native, outliers
from anybit.kernels.cpu.books import FLOATS_AND_POINTS, VECTORS, codebook_program
from anybit.kernels.cpu.encoding import ENCODERS as ENCODERS
from anybit.weight import Weight, nodes
from anybit.weight.nodes import Node

ACCURACY_VARIABLE = "ANYBIT_CPU_ACCURACY"
_wanted: list[str] = []  # what `set_accuracy` was told last

_TILE = 1 << 20  # weights of a tile that a gradient is multiplied with


def set_accuracy(accuracy: str) -> None:
    """What weights loaded from now on are multiplied with on the CPU: "exact" (the default) or "fast", which rounds inputs."""
    _checked(accuracy, "set_accuracy")
    _wanted[:] = [accuracy]


def accuracy() -> str:
    """What `set_accuracy` or the environment variable ANYBIT_CPU_ACCURACY asked for."""
    return _wanted[0] if _wanted else _checked(os.environ.get(ACCURACY_VARIABLE) or "exact", ACCURACY_VARIABLE)


def _checked(accuracy: str, where: str) -> str:
    if accuracy not in ("exact", "fast"):
        raise InvalidOption(f"{where}: an accuracy of {accuracy!r}; it is 'exact' or 'fast'")
    return accuracy


class CpuGrid(ProgramKernel):
    """Grids of integer codes, of 16-entry tables and of 8-bit floats, straight from the packed bytes."""

    name = "cpu"
    rank = 50
    description = (
        "native code for grids of 1- to 8-bit codes (integers, tables, FP8) and codebooks, with any activation rule"
    )

    nested = True
    fast = False

    def unavailable(self) -> str | None:
        return native.why_not()

    def concerns(self, device: torch.device) -> bool:
        return device.type in ("cpu", "meta")

    def refuses(self, weight: Weight, device: torch.device) -> str | None:
        if accuracy() == "fast" and FAST.refuses(weight, device) is None:
            return "the fast kernel was asked for"
        return self.cannot(weight, device)

    def cannot(self, weight: Weight, device: torch.device) -> str | None:
        """Why the tree is none of ours."""
        if device.type not in ("cpu", "meta"):
            return f"runs on the CPU, not on {device.type}"
        try:
            program = self.scheme_program(weight)
        except Refused as reason:
            return str(reason)
        if self.fast and not any_leaf(program, rounds_inputs):
            return "no part of it has codes that are multiplied in bytes"
        return None

    def leaf_program(self, tree: Node, space: Workspace) -> dict[str, Any]:
        match tree:
            case nodes.Sparse():
                return sparse_program(tree, space)
            case nodes.Sum(parts=(nodes.Grid() as grid, nodes.Sparse() as sparse)) if tree.compute == grid.compute:
                program = grid_program(grid, space)
                decoded = Leaf(asdict(program["grid"]))

                def pieces() -> Iterator[tuple[int, Tensor]]:
                    return decoded.tiles(decoded.pointers(space.tensors, 0), torch.float32)

                return {"sum": [program, rounded_program(sparse, pieces, tree.compute, space)]}
        return codebook_program(tree, space) if is_codebook(tree) else grid_program(tree, space)

    def leaf(self, kind: str, content: Any) -> Program:
        if kind == "sparse":
            return outliers.SparseLeaf(content)
        return Leaf(content["grid"], content) if kind == "codebook" else Leaf(content, None, self.fast)

    def bound(self, spec: str, tensors: list[Tensor], bias: Tensor | None) -> Callable[[Tensor], Tensor] | None:
        form = form_of(self, spec)
        if form.rule is not None or not isinstance(form.program, Leaf):
            return None
        return form.program.bound(tensors, bias)

    def take_rows(self, index: Tensor, spec: str, tensors: list[Tensor]) -> Tensor:
        program = form_of(self, spec).program
        if isinstance(program, Leaf):
            return program.take_rows(index, tensors)
        return super().take_rows(index, spec, tensors)

    def experts(self, x: Tensor, ends: Tensor, spec: str, tensors: list[Tensor]) -> Tensor:
        form = form_of(self, spec)
        if form.rule is not None:
            return super().experts(x, ends, spec, tensors)
        form.program.check(x)
        dtype = x.dtype if x.dtype in native.KINDS else torch.float32
        y = torch.empty(x.shape[0], form.program.rows, dtype=dtype)
        form.program.each_expert(readable(x), ends, tensors, y)
        return y.to(x.dtype)


class CpuFast(CpuGrid):
    """The same with inputs rounded to 8 bits, where few rows of them meet codes that can be multiplied in bytes."""

    name = "cpu_fast"
    rank = 40
    description = (
        "as cpu, with inputs rounded to 8 bits in blocks of 32; only if anybit.kernels.set_accuracy('fast') asks for it"
    )
    fast = True

    def concerns(self, device: torch.device) -> bool:
        return super().concerns(device) and accuracy() == "fast"

    def refuses(self, weight: Weight, device: torch.device) -> str | None:
        if accuracy() != "fast":
            return "rounds inputs to 8 bits; anybit.kernels.set_accuracy('fast') asks for it"
        if weight.activation is not None:
            return f"the weight has an input rule of its own ({weight.activation.rule})"
        return self.cannot(weight, device)


FAST = CpuFast()


class Leaf(Program):
    """One grid or codebook: a call of the library."""

    def __init__(self, grid: dict[str, Any], book: dict[str, Any] | None = None, fast: bool = False):
        self.fast = fast
        self.rows, self.codes_columns = grid["rows"], grid["columns"]
        vectors = (1, 1, 0, 0, 0, 0, 0)
        if book is not None:
            grid = {**grid, "levels": VECTORS}
            names = ("books", "entries", "table_kind", "sign_bits", "sign_bytes")
            vectors = (*book["vector"], *(book[name] for name in names))
        self.shape = native.Shape(
            *(grid[name] for name in ("rows", "columns", "row_bytes", "bits", "levels", "group", "compute")),
            *vectors,
            *(_parameter(grid[name]) for name in ("scale", "zero", "offset")),
        )
        slots = [grid["codes"], grid["table"]]
        slots += [grid[name] and grid[name]["slot"] for name in ("scale", "zero", "offset")]
        slots += [grid["permutation"], book and book["signs"]]
        for name in ("scale", "zero", "offset"):
            nested = grid[name] and grid[name]["nested"]
            slots += [nested and nested["table"], nested and nested["scale"], nested and nested["offset"]]
        self.slots = [None if slot is None else (slot["position"], slot["stride"]) for slot in slots]
        self.order = grid["permutation"] and grid["permutation"]["position"]
        self.columns = grid["inputs"]
        one_by_one = grid["compute"] != 0 or (grid["levels"] == TABLE and grid["bits"] > 4)
        if book is not None:
            pairs, points = book["vector"] == [1, 2], book["table_kind"] == FLOATS_AND_POINTS
            self.many = native.MANY_PAIRS if pairs else native.MANY_POINTS if points else native.MANY_VECTORS
        else:
            small_floats = grid["levels"] in (E4M3, E5M2)
            self.many = native.MANY_SMALL_FLOATS if small_floats else native.MANY
            if one_by_one:
                self.many = native.MANY_ROUNDED

    def pointers(self, tensors: list[Tensor], expert: int) -> native.Tensors:
        found = [None if slot is None else tensors[slot[0]].data_ptr() + expert * slot[1] for slot in self.slots]
        nested = (native.Nested * 3)(*(native.Nested(*found[at : at + 3]) for at in (7, 10, 13)))
        return native.Tensors(*found[:7], nested)

    def into(
        self, x: Tensor, tensors: list[Tensor], bias: Tensor | None, y: Tensor, add: bool = False, expert: int = 0
    ) -> None:
        if x.device.type != "cpu":
            raise RuntimeError(f"an input on {x.device} does not fit a weight on the CPU")
        native.linear(self.shape, self.pointers(tensors, expert), x, bias, y, add, self.many, self.fast)

    def bound(self, tensors: list[Tensor], bias: Tensor | None) -> Callable[[Tensor], Tensor] | None:
        """`linear` for any number of leading axes, with the structures of the library made once."""
        if any(tensor.device.type != "cpu" for tensor in tensors):
            return None
        if bias is not None and (
            bias.shape != (self.rows,) or bias.dtype not in native.KINDS or not bias.is_contiguous()
        ):
            return None  # it has to be looked at, or copied, for every product
        return native.Placed(self.shape, self.pointers(tensors, 0), self.columns, bias, self.many, self.fast)

    def each_expert(self, x: Tensor, ends: Tensor, tensors: list[Tensor], y: Tensor) -> None:
        ends = ends.to(torch.int64).contiguous()
        rows, experts = (
            [0, *ends.tolist()],
            min((tensors[p].shape[0] for p, s in filter(None, self.slots) if s), default=len(ends)),
        )
        if len(ends) > experts or rows != sorted(rows) or rows[-1] > x.shape[0]:
            raise RuntimeError(
                f"rows of {len(ends)} experts that end at {rows[1:]} for {experts} experts and {x.shape[0]} rows"
            )
        strides = [0 if slot is None else slot[1] for slot in self.slots]
        native.experts(self.shape, self.pointers(tensors, 0), strides, ends, x, y, self.many, self.fast)

    def tiles(self, pointers: native.Tensors, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """(first row, tile) over the whole weight, in the order of the codes; one buffer for all."""
        step = max(16, min(self.rows, _TILE // max(self.codes_columns, 1) // 16 * 16))
        buffer = torch.empty(min(step, self.rows), self.codes_columns, dtype=dtype)
        for first in range(0, self.rows, step):
            yield first, native.decode(self.shape, pointers, buffer[: min(step, self.rows - first)], first)

    def add_gradient(self, gradient: Tensor, tensors: list[Tensor], total: Tensor) -> None:
        own = total if self.order is None else torch.zeros(total.shape[0], self.codes_columns)
        dtype = torch.bfloat16 if gradient.dtype == torch.bfloat16 else torch.float32
        for first, tile in self.tiles(self.pointers(tensors, 0), dtype):
            own += torch.mm(gradient[:, first : first + len(tile)].to(dtype), tile)
        if self.order is not None:
            total += self.in_order_of_inputs(own, tensors)

    def in_order_of_inputs(self, rows: Tensor, tensors: list[Tensor]) -> Tensor:
        order = tensors[self.order].long()
        used = order >= 0
        found = rows.new_empty(rows.shape[0], self.columns)
        found[:, order[used]] = rows[:, used]
        return found

    def take_rows(self, index: Tensor, tensors: list[Tensor]) -> Tensor:
        index = index.to(torch.int64).contiguous()
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < self.rows:
            raise IndexError(f"rows {int(index.min())} .. {int(index.max())} of a weight with {self.rows}")
        out = torch.empty(len(index), self.codes_columns)
        native.decode(self.shape, self.pointers(tensors, 0), out, index=index)
        return out if self.order is None else self.in_order_of_inputs(out, tensors)


def _parameter(content: dict[str, Any] | None) -> native.Parameter:
    if content is None:
        return native.Parameter(0, 1, 0, 1, 0, 0)
    own = [content[name] for name in ("kind", "down", "row_stride", "width", "inverted", "negated")]
    if nested := content["nested"]:
        own += [
            nested[name] for name in ("bits", "levels", "group", "count", "scale_kind", "scale_negated", "offset_kind")
        ]
    return native.Parameter(*own)


KERNELS = [CpuGrid(), FAST]
