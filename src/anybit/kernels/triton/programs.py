"""What the Triton kernels run: the leaves of programs (../_programs.py), launched as functions of grid.py.

A grid's program is that of the CPU kernels (../_grids.py), its codes in planes where planes.py reads them; a codebook is a grid
whose codes name vectors.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from anybit.kernels._codebooks import codebook_of, is_codebook
from anybit.kernels._grids import E4M3, SIGNED, UNSIGNED, Slot, Workspace, grid_program
from anybit.kernels._outliers import rounded_program, sparse_program
from anybit.kernels._programs import DTYPES, Program
from anybit.kernels.triton import planes_form, sparse
from anybit.kernels.triton.launching import current
from anybit.kernels.triton.tuning import Tile, many, tile_for
from anybit.weight import nodes
from anybit.weight.nodes import Node
from anybit.weight.weight import row_chunks

E2M1 = 8  # a kind of levels beside those of grids, as in planes.py
PIECE = 1 << 24  # weights of such a piece: 32 MB in two bytes each, within the second-level cache of a large card
_NO_PARAMETER: dict[str, Any] = {
    "kind": 0,
    "down": 1,
    "row_stride": 0,
    "width": 1,
    "inverted": False,
    "negated": False,
    "nested": None,
}
_NOT_NESTED: dict[str, Any] = {
    "bits": 8, "levels": 0, "group": 0, "scale_kind": 0, "scale_negated": False, "offset_kind": 0, "scale": None, "offset": None,
    "table": None,
}  # fmt: skip
_PARAMETERS = (("S", "scale"), ("Z", "zero"), ("O", "offset"))


# --- trees -> programs ---------------------------------------------------------------------------------------------------------


def leaf_program(tree: Node, space: Workspace) -> dict[str, Any]:
    """The program of a grid or a codebook; Refused if there is none. A codebook has its signs' table beside it."""
    match tree:
        case nodes.Sparse():
            return sparse_program(tree, space)
        case nodes.Sum(parts=(nodes.Grid() as grid, nodes.Sparse() as own)) if tree.compute == grid.compute:
            shape = grid.shape

            def pieces() -> Iterator[tuple[int, Tensor]]:
                for start, stop in row_chunks(*shape):
                    yield start, grid.region(slice(start, stop), slice(0, shape[1]))

            outliers = rounded_program(own, pieces, tree.compute, space)  # before the grid's codes are moved
            return {"sum": [leaf_program(grid, space), outliers]}
    if not is_codebook(tree):
        found = grid_program(tree, space)
        form = planes_form.moved(tree, found["grid"], space)
        return found if form is None else {"planes": {"grid": found["grid"], "form": form}}
    book, sign_table = codebook_of(tree, space, _tables), None
    signs = tree.signs if isinstance(tree, nodes.Codebook) else tree.codes.signs  # type: ignore[attr-defined]
    if isinstance(signs, nodes.Codebook):
        sign_table = space.add(signs.books().reshape(-1, 8))
    return {"codebook": {**vars(book), "sign_table": sign_table}}


def _tables(tree: nodes.Codebook, space: Workspace) -> Slot:
    books = tree.books()
    return space.add(books) if isinstance(tree.tables, str) else space.own_slot(books, books.dim() == 5)


# --- programs that run -------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def planes_of(spec: str) -> list[dict[str, Any]]:
    """What a spec says of codes that lie in planes."""
    found: list[dict[str, Any]] = []

    def visit(part: Any) -> None:
        if isinstance(part, list):
            for one in part:
                visit(one)
        elif isinstance(part, dict):
            for key, value in part.items():
                if key == "planes" and isinstance(value, dict):
                    found.append(value["form"])
                else:
                    visit(value)

    visit(json.loads(spec)["program"])
    return found


def leaf(kind: str, content: Any) -> Program:
    """A leaf as it was written into a spec."""
    if kind == "sparse":
        return sparse.SparseLeaf(content)
    if kind == "planes":
        return PlanesLeaf(content["grid"], content["form"])
    return Leaf(content["grid"], content) if kind == "codebook" else Leaf(content)


class Leaf(Program):
    """One grid or codebook: launches of the functions in grid.py."""

    form = "grid"

    def __init__(self, grid: dict[str, Any], book: dict[str, Any] | None = None):
        self.rows, self.columns, self.codes_columns = grid["rows"], grid["inputs"], grid["columns"]
        self.bits, self.group = grid["bits"], grid["group"]
        self.runs_of(book)
        slots = {name: grid[name] for name in ("codes", "table", "permutation")}
        own: dict[str, Any] = {}
        for letter, name in _PARAMETERS:
            content = grid[name] or _NO_PARAMETER
            nested = content["nested"] or _NOT_NESTED
            slots |= {name: content.get("slot"), f"{name}_inner": nested["scale"], f"{name}_shift": nested["offset"],
                      f"{name}_table": nested["table"]}  # fmt: skip
            own |= {f"{letter}_KIND": content["kind"], f"{letter}_DOWN": min(content["down"], max(self.rows, 1)),
                    f"{letter}_STRIDE": content["row_stride"], f"{letter}_WIDTH": content["width"],
                    f"{letter}_NEGATED": bool(content["negated"]), f"{letter}_BITS": nested["bits"],
                    f"{letter}_LEVELS": nested["levels"], f"{letter}_GROUP": nested["group"] if nested["group"] < 1 << 31 else 0,
                    f"{letter}_INNER": nested["scale_kind"], f"{letter}_INNER_NEGATED": bool(nested["scale_negated"]),
                    f"{letter}_SHIFT": nested["offset_kind"]}  # fmt: skip
        if self.form != "planes":
            slots |= {name: book and book[name] for name in ("signs", "sign_table")}
        self.slots = {name: slot and (slot["position"], slot["stride"]) for name, slot in slots.items()}
        self.constants = {**own, **self.shape_constants(grid, book),
                          "S_INVERTED": bool((grid["scale"] or _NO_PARAMETER)["inverted"])}  # fmt: skip

    def runs_of(self, book: dict[str, Any] | None) -> None:
        """Codes that a tile keeps together."""
        if book is not None:
            self.form, self.per = "codebook", book["vector"][1]
        else:
            self.per = 8 // self.bits if 8 % self.bits == 0 else 8

    def shape_constants(self, grid: dict[str, Any], book: dict[str, Any] | None) -> dict[str, Any]:
        """What the functions know of the codes."""
        book = book or {"vector": (1, 1), "books": 0, "entries": 0, "sign_bits": 0, "sign_bytes": 0}
        high, wide = book["vector"]
        return {"ROW_BYTES": grid["row_bytes"], "BITS": self.bits, "LEVELS": grid["levels"], "GROUP": self.group,
                "COMPUTE": grid["compute"], "COLUMNS": self.codes_columns, "VECTOR": wide, "HIGH": high, "BOOKS": book["books"],
                "ENTRIES": book["entries"], "SIGN_BITS": book["sign_bits"], "SIGN_BYTES": book["sign_bytes"]}  # fmt: skip

    def tensors(self, tensors: list[Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
        """What the functions read, and numbers from one expert to the next; the codes stand in for what is absent."""
        found: dict[str, Tensor] = {}
        strides: dict[str, int] = {}
        for name, slot in self.slots.items():
            tensor = tensors[self.stand_in if slot is None else slot[0]]
            is_byte = tensor.dtype.itemsize == 1 and tensor.dtype != torch.int8
            found[name] = tensor.view(torch.uint8) if is_byte or name == "codes" else tensor
            strides[name] = slot[1] // tensor.element_size() if slot else 0
        return found, strides

    @property
    def stand_in(self) -> int:
        """Position of a tensor that is always there."""
        slot = self.slots["codes"]
        assert slot is not None
        return slot[0]

    def into(
        self, x: Tensor, tensors: list[Tensor], bias: Tensor | None, y: Tensor, add: bool = False, expert: int = 0
    ) -> None:
        if add:
            own = torch.empty(y.shape, dtype=torch.float32, device=y.device)
            self.into(x, tensors, bias, own)
            y += own
            return None
        if x.shape[0] >= many(self.form, x.device):
            return self._in_pieces(x, tensors, bias, y)
        tile = self._tile(x.shape[0], x)
        self._launch(x, tensors, bias, y, tile, -(-x.shape[0] // tile.inputs))
        return None

    def _tile(self, count: int, x: Tensor) -> Tile:
        return tile_for(count, self.rows, -(-self.codes_columns // self.per), self.bits, self.form, x.dtype, x.device)

    def strides(self, strides: dict[str, int]) -> dict[str, int]:
        """Arguments for stacks."""
        found = {f"{letter}_EXPERT": strides[name] for letter, name in _PARAMETERS}
        for letter, name in _PARAMETERS:
            found |= {
                f"{letter}_{part.upper()}_EXPERT": strides[f"{name}_{part}"] for part in ("inner", "shift", "table")
            }
        return {**found, "TABLE_EXPERT": strides["table"]}

    def arguments(
        self, x: Tensor, tensors: list[Tensor], bias: Tensor | None, y: Tensor, tile: Tile, splits: int,
        routed: tuple[Tensor, Tensor, Tensor] | None,
    ) -> dict[str, Any]:  # fmt: skip
        """Every argument of the product by its name; y has a leading axis of parts if there are several."""
        own, strides = self.tensors(tensors)
        expert, first, stop = routed if routed is not None else (x, x, x)
        return {
            "x": x, "y": y, "bias": x if bias is None else bias, **own,
            "tile_expert": expert, "tile_first": first, "tile_stop": stop, "count": x.shape[0],
            "ROWS": self.rows, "INPUTS": self.columns, **self.constants, **self.strides(strides),
            "X_ROW": x.stride(0), "X_COLUMN": x.stride(1), "Y_PART": y.stride(0) if splits > 1 else 0, "Y_ROW": y.stride(-2),
            "PERMUTED": self.slots["permutation"] is not None, "GROUPED": routed is not None,
            "BIASED": bias is not None and splits == 1,
            "M": tile.inputs, "N": tile.rows, "SPLITS": splits, **self.tile_arguments(tile, strides, x.dtype),
        }  # fmt: skip

    def tile_arguments(self, tile: Tile, strides: dict[str, int], dtype: torch.dtype) -> dict[str, Any]:
        """What only these functions take."""
        return {
            "R": tile.runs, "CODES_EXPERT": strides["codes"], "SIGNS_EXPERT": strides["signs"],
            "ONE_GROUP": self.group % (tile.runs * self.per) == 0 or self.group >= self.codes_columns,
        }  # fmt: skip

    def product_function(self) -> Any:
        """The product."""
        from anybit.kernels.triton.grid import _product_kernel

        return _product_kernel

    def _launch(
        self, x: Tensor, tensors: list[Tensor], bias: Tensor | None, y: Tensor, tile: Tile, tiles: int,
        routed: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> None:  # fmt: skip
        splits = tile.splits if routed is None else 1
        where = y if splits == 1 else torch.empty(splits, *y.shape, dtype=torch.float32, device=y.device)
        with current(x.device):
            self.product_function()[(-(-self.rows // tile.rows), tiles, splits)](
                **self.arguments(x, tensors, bias, where, tile, splits, routed),
                num_warps=tile.warps,
                num_stages=tile.stages,
            )
            if splits > 1:  # added in a fixed order, so that a run repeats
                from anybit.kernels.triton.parts import _sum_kernel

                _sum_kernel[(-(-self.rows // 256), x.shape[0])](
                    where, y, y if bias is None else bias, where.stride(0), where.stride(1), y.stride(0),
                    ROWS=self.rows, SPLITS=splits, BIASED=bias is not None, N=256, num_warps=4,
                )  # fmt: skip

    def experts(self, x: Tensor, ends: Tensor, tensors: list[Tensor]) -> Tensor:
        """One launch over the tiles of all experts; which tile belongs to whom is worked out on the device."""
        self.check(x)
        experts, count = ends.numel(), x.shape[0]
        x = x if x.dtype in DTYPES else x.to(torch.float32)
        y = torch.empty(count, self.rows, dtype=x.dtype, device=x.device)
        tile = self._tile(max(1, count // experts), x)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        tile_ends = ((ends - starts + tile.inputs - 1) // tile.inputs).cumsum(0)
        tiles = count // tile.inputs + min(experts, count)
        number = torch.arange(tiles, device=ends.device)
        expert = torch.searchsorted(tile_ends, number, right=True).clamp(max=experts - 1)
        before = torch.cat([tile_ends.new_zeros(1), tile_ends[:-1]])[expert]
        first = starts[expert] + (number - before) * tile.inputs
        stop = torch.where(number < tile_ends[-1], ends[expert], first)  # tiles beyond the last are empty
        self._launch(x, tensors, None, y, tile, tiles, (expert, first, stop))
        return y

    # --- decoded pieces ---

    def decoded(self, tensors: list[Tensor], out: Tensor, first: int) -> None:
        """Fill out [count, columns of the codes] with the rows from `first` on, columns in the order of the codes."""
        from anybit.kernels.triton.grid import _decode_kernel

        own, _ = self.tensors(tensors)
        del own["permutation"]
        runs = -(-self.codes_columns // self.per)
        _decode_kernel[(-(-len(out) // 4), -(-runs // 128))](
            out=out, **own, count=len(out), first_row=first, **self.constants, N=4, R=128, num_warps=4
        )

    def pieces(self, tensors: list[Tensor], dtype: torch.dtype, device: torch.device) -> Iterator[tuple[int, Tensor]]:
        """(first row, piece) over the whole weight, columns in the order of the codes; one buffer for all."""
        step = min(self.rows, max(16, PIECE // max(self.codes_columns, 1) // 16 * 16))
        buffer = torch.empty(step, self.codes_columns, dtype=dtype, device=device)
        for first in range(0, self.rows, step):
            piece = buffer[: min(step, self.rows - first)]
            with current(device):
                self.decoded(tensors, piece, first)
            yield first, piece

    def _in_pieces(self, x: Tensor, tensors: list[Tensor], bias: Tensor | None, y: Tensor) -> None:
        own = self.in_order_of_codes(x, tensors)
        for first, piece in self.pieces(tensors, x.dtype, x.device):
            part = torch.mm(own, piece.T)
            if bias is not None:
                part += bias[first : first + len(piece)].to(part.dtype)
            y[:, first : first + len(piece)] = part

    def add_gradient(self, gradient: Tensor, tensors: list[Tensor], total: Tensor) -> None:
        dtype = gradient.dtype if gradient.dtype in DTYPES else torch.float32
        own = torch.zeros(total.shape[0], self.codes_columns, dtype=torch.float32, device=total.device)
        for first, piece in self.pieces(tensors, dtype, gradient.device):
            own += torch.mm(gradient[:, first : first + len(piece)].to(dtype), piece)
        slot = self.slots["permutation"]
        if slot is None:
            total += own[:, : self.columns]
        else:
            order = tensors[slot[0]].long()
            total.index_add_(1, order.clamp(min=0), torch.where(order >= 0, own, 0.0))

    def in_order_of_codes(self, x: Tensor, tensors: list[Tensor]) -> Tensor:
        """x [n, inputs] -> [n, columns of the codes]; columns without an input are zero."""
        slot = self.slots["permutation"]
        if slot is not None:
            order = tensors[slot[0]].long()
            return torch.where(order >= 0, x.index_select(1, order.clamp(min=0)), 0).to(x.dtype)
        return torch.nn.functional.pad(x, (0, self.codes_columns - self.columns))


class PlanesLeaf(Leaf):
    """A grid whose codes lie in planes: launches of the functions in planes.py."""

    form = "planes"

    def __init__(self, grid: dict[str, Any], form: dict[str, Any]):
        self.planes, self.height = form["planes"], form["rows"]
        kind = E2M1 if form["small_floats"] else grid["levels"]
        self.power = {E4M3: 256, E2M1: 1 << 14}.get(kind, 1)  # what float16 makes the numbers smaller by
        super().__init__({**grid, "levels": kind})
        del self.slots["codes"]

    def runs_of(self, book: dict[str, Any] | None) -> None:
        self.per = planes_form.block_columns(self.bits)

    def shape_constants(self, grid: dict[str, Any], book: dict[str, Any] | None) -> dict[str, Any]:
        first, second, third = (*planes_form.WIDTHS[self.bits], 0, 0)[:3]
        return {"HEIGHT": self.height, "BITS": self.bits, "FIRST": first, "SECOND": second, "THIRD": third,
                "LEVELS": grid["levels"], "GROUP": self.group, "COLUMNS": self.codes_columns}  # fmt: skip

    @property
    def stand_in(self) -> int:
        position: int = self.planes[0]
        return position

    def tensors(self, tensors: list[Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
        found, strides = super().tensors(tensors)
        own = [tensors[position] for position in (*self.planes, *self.planes[:1] * 2)[:3]]
        names = ("first", "second", "third")
        found |= {f"{name}_plane": plane for name, plane in zip(names, own, strict=True)}
        return found, strides | {name: plane.stride(0) for name, plane in zip(names, own, strict=True)}

    def tile_arguments(self, tile: Tile, strides: dict[str, int], dtype: torch.dtype) -> dict[str, Any]:
        mantissa = {torch.bfloat16: 7, torch.float16: 10}.get(
            dtype, 0
        )  # bits; 0 where halves of words do not hold the floats
        exact = self.constants["LEVELS"] in (UNSIGNED, SIGNED) and self.bits < 8 and self.bits <= mantissa
        factor = 1 << self.bits if exact else self.power
        return {
            "MANTISSA": mantissa,
            "EXACT": exact,
            "FACTOR": factor,
            **{f"{name.upper()}_EXPERT": strides[name] for name in ("first", "second", "third")},
        }

    def product_function(self) -> Any:
        from anybit.kernels.triton.planes import _planes_kernel

        return _planes_kernel

    def decoded(self, tensors: list[Tensor], out: Tensor, first: int, index: Tensor | None = None) -> None:
        from anybit.kernels.triton.planes import _planes_rows_kernel

        own, _ = self.tensors(tensors)
        del own["permutation"]
        _planes_rows_kernel[(-(-len(out) // 32), -(-self.codes_columns // self.per))](
            out=out, index=out if index is None else index, **own, count=len(out), first_row=first, **self.constants,
            INDEXED=index is not None, N=32, FACTOR=self.power, num_warps=4,
        )  # fmt: skip

    def take_rows(self, index: Tensor, tensors: list[Tensor]) -> Tensor:
        """Rows of the weight, float32 [len(index), in]."""
        found = torch.empty(len(index), self.codes_columns, dtype=torch.float32, device=index.device)
        if len(index):
            with current(index.device):
                self.decoded(tensors, found, 0, index)
        slot = self.slots["permutation"]
        if slot is None:
            return found[:, : self.columns]
        order = tensors[slot[0]].long()
        rows = torch.zeros(len(index), self.columns, dtype=torch.float32, device=index.device)
        return rows.index_add_(1, order.clamp(min=0), torch.where(order >= 0, found, 0.0))
