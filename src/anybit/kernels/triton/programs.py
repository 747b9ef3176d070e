"""What the Triton kernels run: the leaves of programs (../_programs.py), launched as functions of grid.py.

A grid's program is that of the CPU kernels (../_grids.py); a codebook is a grid whose codes name vectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from anybit.kernels._codebooks import codebook_of
from anybit.kernels._grids import Slot, Workspace, grid_program
from anybit.kernels._programs import DTYPES, Program
from anybit.kernels.triton.tuning import Tile, tile_for
from anybit.weight import nodes
from anybit.weight.nodes import Node

MANY = 256  # rows of input from which decoding pieces for torch's matmul costs less than decoding in the product
PIECE = 1 << 24  # weights of such a piece: 32 MB in two bytes each, within the second-level cache of a large card
_NO_PARAMETER = {"kind": 0, "down": 1, "row_stride": 0, "width": 1, "inverted": False, "negated": False}


# --- trees -> programs ---------------------------------------------------------------------------------------------------------


def leaf_program(tree: Node, space: Workspace) -> dict[str, Any]:
    """The program of a grid or a codebook; Refused if there is none. A codebook has its signs' table beside it."""
    if not isinstance(tree, nodes.Codebook):
        return grid_program(tree, space)
    book, sign_table = codebook_of(tree, space, _tables), None
    if isinstance(tree.signs, nodes.Codebook):
        sign_table = space.add(tree.signs.books().reshape(-1, 8))
    return {"codebook": {**vars(book), "sign_table": sign_table}}


def _tables(tree: nodes.Codebook, space: Workspace) -> Slot:
    books = tree.books()
    return space.add(books) if isinstance(tree.tables, str) else space.own_slot(books, books.dim() == 5)


# --- programs that run -------------------------------------------------------------------------------------------------------


def leaf(kind: str, content: Any) -> Leaf:
    """A leaf as it was written into a spec."""
    return Leaf(content["grid"], content) if kind == "codebook" else Leaf(content)


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class Leaf(Program):
    """One grid or codebook: launches of the functions in grid.py."""

    def __init__(self, grid: dict[str, Any], book: dict[str, Any] | None = None):
        self.rows, self.columns, self.codes_columns = grid["rows"], grid["inputs"], grid["columns"]
        self.bits, self.group = grid["bits"], grid["group"]
        book = book or {"vector": (1, 1), "books": 0, "entries": 0, "sign_bits": 0, "sign_bytes": 0, "signs": None,
                        "sign_table": None}  # fmt: skip
        high, wide = book["vector"]
        slots = {name: grid[name] for name in ("codes", "table", "permutation")}
        slots |= {name: grid[name] and grid[name]["slot"] for name in ("scale", "zero", "offset")}
        slots |= {name: book[name] for name in ("signs", "sign_table")}
        self.slots = {name: slot and (slot["position"], slot["stride"]) for name, slot in slots.items()}
        own = {"ROW_BYTES": grid["row_bytes"], "BITS": self.bits, "LEVELS": grid["levels"], "GROUP": self.group,
               "COMPUTE": grid["compute"], "COLUMNS": self.codes_columns, "VECTOR": wide, "HIGH": high, "BOOKS": book["books"],
               "ENTRIES": book["entries"], "SIGN_BITS": book["sign_bits"], "SIGN_BYTES": book["sign_bytes"]}  # fmt: skip
        for letter, name in (("S", "scale"), ("Z", "zero"), ("O", "offset")):
            content = grid[name] or _NO_PARAMETER
            own |= {f"{letter}_KIND": content["kind"], f"{letter}_DOWN": min(content["down"], max(self.rows, 1)),
                    f"{letter}_STRIDE": content["row_stride"], f"{letter}_WIDTH": content["width"],
                    f"{letter}_NEGATED": bool(content["negated"])}  # fmt: skip
        self.constants = {**own, "S_INVERTED": bool((grid["scale"] or _NO_PARAMETER)["inverted"])}
        self.per = wide if book["books"] else (8 // self.bits if 8 % self.bits == 0 else 8)

    def tensors(self, tensors: list[Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
        """What the functions read, and numbers from one expert to the next; the codes stand in for what is absent."""
        found: dict[str, Tensor] = {}
        strides: dict[str, int] = {}
        for name, slot in self.slots.items():
            tensor = tensors[self.slots["codes"][0] if slot is None else slot[0]]
            is_byte = tensor.dtype.itemsize == 1 and tensor.dtype != torch.int8
            found[name] = tensor.view(torch.uint8) if is_byte or name == "codes" else tensor
            strides[name] = slot[1] // tensor.element_size() if slot else 0
        return found, strides

    def into(
        self, x: Tensor, tensors: list[Tensor], bias: Tensor | None, y: Tensor, add: bool = False, expert: int = 0
    ) -> None:
        if add:
            own = torch.empty(y.shape, dtype=torch.float32, device=y.device)
            self.into(x, tensors, bias, own)
            y += own
            return None
        if x.shape[0] >= MANY:
            return self._in_pieces(x, tensors, bias, y)
        tile = self._tile(x.shape[0], x.device)
        self._launch(x, tensors, bias, y, tile, -(-x.shape[0] // tile.inputs))
        return None

    def _tile(self, count: int, device: torch.device) -> Tile:
        return tile_for(
            count, self.rows, -(-self.codes_columns // self.per), self.bits, self.constants["BOOKS"] > 0, device
        )

    def arguments(
        self, x: Tensor, tensors: list[Tensor], bias: Tensor | None, y: Tensor, tile: Tile, splits: int,
        routed: tuple[Tensor, Tensor, Tensor] | None,
    ) -> dict[str, Any]:  # fmt: skip
        """Every argument of grid._product_kernel by its name; y has a leading axis of parts if there are several."""
        own, strides = self.tensors(tensors)
        expert, first, stop = routed if routed is not None else (x, x, x)
        return {
            "x": x, "y": y, "bias": x if bias is None else bias, **own,
            "tile_expert": expert, "tile_first": first, "tile_stop": stop, "count": x.shape[0],
            "ROWS": self.rows, "INPUTS": self.columns, **self.constants,
            "CODES_EXPERT": strides["codes"], "TABLE_EXPERT": strides["table"], "S_EXPERT": strides["scale"],
            "Z_EXPERT": strides["zero"], "O_EXPERT": strides["offset"], "SIGNS_EXPERT": strides["signs"],
            "X_ROW": x.stride(0), "X_COLUMN": x.stride(1), "Y_PART": y.stride(0) if splits > 1 else 0, "Y_ROW": y.stride(-2),
            "PERMUTED": self.slots["permutation"] is not None, "GROUPED": routed is not None,
            "BIASED": bias is not None and splits == 1,
            "ONE_GROUP": self.group % (tile.runs * self.per) == 0 or self.group >= self.codes_columns,
            "M": tile.inputs, "N": tile.rows, "R": tile.runs, "SPLITS": splits,
        }  # fmt: skip

    def _launch(
        self, x: Tensor, tensors: list[Tensor], bias: Tensor | None, y: Tensor, tile: Tile, tiles: int,
        routed: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> None:  # fmt: skip
        from anybit.kernels.triton.grid import _product_kernel

        splits = tile.splits if routed is None else 1
        where = y if splits == 1 else torch.empty(splits, *y.shape, dtype=torch.float32, device=y.device)
        with _current(x.device):
            _product_kernel[(-(-self.rows // tile.rows), tiles, splits)](
                **self.arguments(x, tensors, bias, where, tile, splits, routed),
                num_warps=tile.warps,
                num_stages=tile.stages,
            )
        if splits > 1:  # added in a fixed order, so that a run repeats
            total = where.sum(0)
            y.copy_(total if bias is None else total + bias.to(torch.float32))

    def experts(self, x: Tensor, ends: Tensor, tensors: list[Tensor]) -> Tensor:
        """One launch over the tiles of all experts; which tile belongs to whom is worked out on the device."""
        self.check(x)
        experts, count = ends.numel(), x.shape[0]
        x = x if x.dtype in DTYPES else x.to(torch.float32)
        y = torch.empty(count, self.rows, dtype=x.dtype, device=x.device)
        tile = self._tile(max(1, count // experts), x.device)
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

    def pieces(self, tensors: list[Tensor], dtype: torch.dtype, device: torch.device) -> Iterator[tuple[int, Tensor]]:
        """(first row, piece) over the whole weight, columns in the order of the codes; one buffer for all."""
        from anybit.kernels.triton.grid import _decode_kernel

        own, _ = self.tensors(tensors)
        del own["permutation"]
        step = min(self.rows, max(16, PIECE // max(self.codes_columns, 1) // 16 * 16))
        buffer = torch.empty(step, self.codes_columns, dtype=dtype, device=device)
        runs = -(-self.codes_columns // self.per)
        for first in range(0, self.rows, step):
            count = min(step, self.rows - first)
            with _current(device):
                _decode_kernel[(-(-count // 4), -(-runs // 128))](
                    out=buffer, **own, count=count, first_row=first, **self.constants, N=4, R=128, num_warps=4
                )
            yield first, buffer[:count]

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
