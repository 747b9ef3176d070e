"""The shared library of the CPU kernels: finding it, choosing an instruction-set level, calling it.

A plain C ABI through ctypes; calls release the GIL. Threads are torch's own: on Linux the OpenMP runtime that torch has
loaded is handed to the library as a function pointer, so there is no second pool. ANYBIT_CPU_ISA=scalar|avx2|avx512|avx512vbmi|
neon forces a level.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from anybit.errors import InvalidOption, did_you_mean

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Rows of x from which decoding the weight once costs less than decoding it for every few rows; measured, one thread,
# 4096 columns: 8 to 13 for integers and small tables, 12 (bfloat16) to 30 (float32) for 8-bit floats, 5 where each weight is
# rounded by itself; codebooks 8 to 12, pairs 24, lattices 13 to 18.
MANY, MANY_ROUNDED, MANY_VECTORS, MANY_PAIRS, MANY_SMALL_FLOATS, MANY_POINTS = 12, 6, 9, 20, 20, 13
ABI = 10  # anybit_abi() of the sources beside this file
LEVEL_VARIABLE = "ANYBIT_CPU_ISA"


class Parameter(ctypes.Structure):
    """`anybit_parameter` of grid.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("kind", "down", "row_stride", "width", "inverted", "negated")),
        *(
            (name, ctypes.c_int64)
            for name in ("bits", "levels", "group", "count", "scale_kind", "scale_negated", "offset_kind")
        ),
    ]


class Nested(ctypes.Structure):
    """`anybit_nested` of grid.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("table", "scale", "offset")]


class Shape(ctypes.Structure):
    """`anybit_shape` of grid.h: constant for a prepared weight, so it is built once."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "columns", "row_bytes", "bits", "levels", "group", "compute")),
        *(
            (name, ctypes.c_int64)
            for name in ("high", "wide", "books", "entries", "table_kind", "sign_bits", "sign_bytes")
        ),
        *((name, Parameter) for name in ("scale", "zero", "offset")),
    ]


class Tensors(ctypes.Structure):
    """`anybit_tensors` of grid.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "table", "scale", "zero", "offset", "permutation", "signs")),
        ("nested", Nested * 3),
    ]


class Product(ctypes.Structure):
    """`anybit_product` of grid.h."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("x_kind", "n", "x_row", "x_column")),
        ("bias", ctypes.c_void_p),
        ("bias_kind", ctypes.c_int64),
        ("y", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("y_kind", "y_row", "accumulate", "fast")),
    ]


class Place(ctypes.Structure):
    """`anybit_bound` of driver.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("shape", "tensors", "bias")),
        *((name, ctypes.c_int64) for name in ("bias_kind", "fast", "many")),
    ]


def library_path() -> Path:
    """Where the build puts the library."""
    suffix = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
    return Path(__file__).with_name("libanybit_cpu" + suffix)


@functools.lru_cache(maxsize=1)
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    path = library_path()
    if not path.exists():
        return (
            "the native CPU kernels are not built; with a C++17 compiler (g++ or clang++) at hand, reinstall anybit: "
            "python -m pip install --force-reinstall --no-deps --no-binary anybit anybit (in a source tree: pip install -e .)"
        )
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"{path} cannot be loaded ({error}); reinstall anybit on this machine"
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    version = getattr(library, "anybit_abi", None)
    if version is None or version() != ABI:
        return f"{path} was built from other sources than this version's; reinstall anybit (in a source tree: pip install -e .)"
    library.anybit_levels.argtypes, library.anybit_levels.restype = [ctypes.POINTER(ctypes.c_char_p), integer], integer
    library.anybit_use_level.argtypes, library.anybit_use_level.restype = [ctypes.c_char_p], integer
    library.anybit_use_gomp.argtypes, library.anybit_use_gomp.restype = [pointer], None
    library.anybit_linear.argtypes, library.anybit_linear.restype = [*[pointer] * 3, integer, integer], integer
    library.anybit_linear_bound.argtypes = [*[pointer] * 2, *[integer] * 4, pointer, integer]
    library.anybit_linear_bound.restype = integer
    library.anybit_linear_experts.argtypes = [*[pointer] * 5, *[integer] * 3]
    library.anybit_linear_experts.restype = integer
    library.anybit_decode.argtypes = [pointer] * 3 + [integer] * 2 + [pointer] + [integer] * 3
    library.anybit_decode.restype = None
    library.anybit_encode.argtypes, library.anybit_encode.restype = [integer, pointer, *[integer] * 3], integer
    library.anybit_encoders.argtypes, library.anybit_encoders.restype = [], ctypes.c_char_p
    library.anybit_add_sparse.argtypes = [
        *[pointer] * 3,
        *[integer] * 2,
        pointer,
        *[integer] * 4,
        pointer,
        *[integer] * 2,
    ]
    library.anybit_add_sparse.restype = None
    library.anybit_use_gomp(_gomp_parallel())
    try:
        wanted = os.environ.get(LEVEL_VARIABLE)
        _use_level(library, wanted if wanted else _levels(library)[-1])
    except InvalidOption as error:
        return str(error)
    return library


def _gomp_parallel() -> int | None:
    """GOMP_parallel of the OpenMP runtime that torch itself runs on, whatever its file is called."""
    if not sys.platform.startswith("linux"):
        return None
    try:  # a look-up in libtorch_cpu also searches the libraries it was linked with
        torch_library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(torch_library.GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


def _levels(library: ctypes.CDLL) -> list[str]:
    names = (ctypes.c_char_p * 16)()
    count = library.anybit_levels(names, 16)
    return [name.decode() for name in names[:count] if name is not None]


def _use_level(library: ctypes.CDLL, name: str) -> None:
    known = _levels(library)
    if library.anybit_use_level(name.encode()) == 0:
        raise InvalidOption(
            f"{LEVEL_VARIABLE}={name!r}{did_you_mean(name, known)}: this machine and this build run {', '.join(known)}"
        )


def why_not() -> str | None:
    """Why the library cannot be used, or None."""
    found = _load()
    return found if isinstance(found, str) else None


def library() -> ctypes.CDLL:
    found = _load()
    if isinstance(found, str):
        raise InvalidOption(found)
    return found


def levels() -> list[str]:
    """Instruction-set levels that this machine and this build run, slowest first."""
    return _levels(library())


def use_level(name: str) -> None:
    """Run at this level from now on, in the whole process."""
    _use_level(library(), name)


def linear(
    shape: Shape,
    tensors: Tensors,
    x: Tensor,
    bias: Tensor | None,
    y: Tensor,
    accumulate: bool = False,
    many: int = MANY,
    fast: bool = False,
) -> None:
    """y [n, rows] = x [n, columns] @ W.T + bias; x of any strides, y with adjacent columns.

    From `many` rows of x on, blocks of the weight are decoded once, into bfloat16 for a bfloat16 x where the CPU multiplies it.
    `fast`: below that, x is rounded to 8 bits, in blocks of 32 columns, wherever codes are integers or a table of 16 numbers.
    """
    product = _product(x, bias, y, accumulate, fast)
    _succeed(
        library().anybit_linear(
            ctypes.byref(shape), ctypes.byref(tensors), ctypes.byref(product), many, torch.get_num_threads()
        ),
        x,
    )


class Placed:
    """`linear` with a weight where it lies. It reads where the pointers say, whatever became of the tensors."""

    def __init__(self, shape: Shape, tensors: Tensors, columns: int, bias: Tensor | None, many: int, fast: bool):
        self.rows, self.columns = shape.rows, columns
        own_bias, kind = (None, 0) if bias is None else (bias.data_ptr(), KINDS[bias.dtype])
        self._kept = (
            shape,
            tensors,
            Place(ctypes.addressof(shape), ctypes.addressof(tensors), own_bias, kind, fast, many),
        )
        self._place = ctypes.addressof(self._kept[2])
        self._function = library().anybit_linear_bound

    def __call__(self, x: Tensor) -> Tensor:
        kind = KINDS.get(x.dtype)
        if kind is None:
            wide: Tensor = self(x.to(torch.float32))
            return wide.to(x.dtype)
        shape, columns = x.shape, self.columns
        if shape[-1] != columns:
            raise RuntimeError(f"an input of shape {tuple(shape)} does not fit a weight of {columns} columns")
        if not x.is_cpu:
            raise RuntimeError(f"an input on {x.device} does not fit a weight on the CPU")
        y = torch.empty(*shape[:-1], self.rows, dtype=x.dtype)
        row, column = columns, 1
        if not x.is_contiguous():
            x = x.reshape(-1, columns)
            row, column = x.stride()
        n = x.numel() // columns
        if n and self._function(self._place, x.data_ptr(), kind, n, row, column, y.data_ptr(), torch.get_num_threads()):
            _succeed(1, x)
        return y


def experts(
    shape: Shape, tensors: Tensors, strides: list[int], ends: Tensor, x: Tensor, y: Tensor, many: int, fast: bool
) -> None:
    """`linear` for every expert of a stack that owns rows of x: expert e those from ends[e-1] to ends[e] (int64).

    `strides`: bytes from one expert to the next of every pointer in `tensors`, in its order.
    """
    product = _product(x, None, y, False, fast)
    steps = (ctypes.c_int64 * len(strides))(*strides)
    _succeed(
        library().anybit_linear_experts(
            ctypes.byref(shape), ctypes.byref(tensors), steps, ctypes.byref(product),
            ends.data_ptr(), ends.numel(), many, torch.get_num_threads(),
        ),
        x,
    )  # fmt: skip


def _product(x: Tensor, bias: Tensor | None, y: Tensor, accumulate: bool, fast: bool) -> Product:
    return Product(
        x.data_ptr(), KINDS[x.dtype], x.shape[0], x.stride(0), x.stride(1),
        None if bias is None else bias.data_ptr(), 0 if bias is None else KINDS[bias.dtype],
        y.data_ptr(), KINDS[y.dtype], y.stride(0), accumulate, fast,
    )  # fmt: skip


def _succeed(failed: int, x: Tensor) -> None:
    if failed:
        raise MemoryError(f"no memory for the inputs of a product, {tuple(x.shape)} in float32")


def decode(shape: Shape, tensors: Tensors, out: Tensor, first: int = 0, index: Tensor | None = None) -> Tensor:
    """Rows of the weight into out [count, columns], in the order of the codes: those of `index`, or from `first` on."""
    library().anybit_decode(
        ctypes.byref(shape), ctypes.byref(tensors), None if index is None else index.data_ptr(), first, out.shape[0],
        out.data_ptr(), KINDS[out.dtype], out.stride(0), torch.get_num_threads(),
    )  # fmt: skip
    return out


def add_sparse(offsets: Tensor, columns: Tensor, values: Tensor, x: Tensor, y: Tensor) -> None:
    """float32 y [n, rows] += x [n, width] @ S.T for a CSR matrix: int32 offsets [rows + 1] and columns, float32 values."""
    library().anybit_add_sparse(
        offsets.data_ptr(), columns.data_ptr(), values.data_ptr(), offsets.numel() - 1, x.shape[1], x.data_ptr(), KINDS[x.dtype],
        x.shape[0], x.stride(0), x.stride(1), y.data_ptr(), y.stride(0), torch.get_num_threads(),
    )  # fmt: skip
