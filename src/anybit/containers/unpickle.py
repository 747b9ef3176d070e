"""A pickle of tensors as a description of tensors: a walk over its opcodes in which nothing is ever called.

Python's pickle runs what a file names. This reader knows the few names that torch.save writes for a state dict and answers
each with an inert record; any other name is an UnsafeFile error. Who opens the file may name packages whose objects are
taken down as well, class name and fields (`Described`); they are not imported, nor is anything of them called. Memory is
bounded by the number of opcodes, sizes inside the pickle are claims that `pickles.py` checks against the file.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any, NoReturn

from anybit.containers.info import BY_TORCH_NAME, shorten
from anybit.errors import AnybitError, CorruptFile, UnsafeFile

MAX_OPCODES = 5_000_000  # about 100 000 tensors in one file
CURE = "If you trust where it comes from, convert it to safetensors with the program that wrote it"


@dataclass(frozen=True)
class Storage:
    """A run of numbers in the file, as the pickle describes it."""

    key: str
    dtype: str
    count: int


@dataclass(frozen=True)
class Pickled:
    """A tensor over a storage; `offset` and `stride` count elements of `dtype`."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Name:
    """A global the pickle mentions and may use. `make` is our own record-maker, never what the name means to Python."""

    path: str
    make: Callable[..., Any] | None = None
    dtype: str = ""  # of a storage class


@dataclass(frozen=True)
class Described:
    """An object of a package that was asked for: the name of its class, what it was made with, and its fields."""

    path: str
    arguments: tuple[Any, ...]
    fields: dict[str, Any]


def _wrapper_subclass(function: Any, kind: Any, arguments: Any, state: Any) -> Described:
    """A tensor that is made of other tensors, which are its fields."""
    if not isinstance(kind, Name) or getattr(function, "path", None) != _WRAPPER or not isinstance(state, dict):
        raise ValueError(f"a tensor rebuilt by {getattr(function, 'path', function)!r}, not one that wraps others")
    return Described(kind.path, tuple(arguments), dict(state))


def _tensor(storage: Storage, offset: int, shape: Any, stride: Any, *rest: Any) -> Pickled:
    # rest of _rebuild_tensor_v3: requires_grad, hooks, dtype, ...; of _rebuild_tensor_v2: requires_grad, hooks, metadata
    dtype = rest[2] if len(rest) > 2 and isinstance(rest[2], str) else storage.dtype
    return Pickled(storage, dtype, offset, tuple(shape), tuple(stride))


_STORAGES = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64", "Int": "int32",
    "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool", "ComplexFloat": "complex64", "Untyped": "uint8",
}  # fmt: skip
_NAMES: dict[str, Any] = {
    **{
        f"{module}.{kind}Storage": Name(f"torch.{kind}Storage", dtype=dtype)
        for kind, dtype in _STORAGES.items()
        for module in ("torch", "torch.storage")
    },
    # a dtype is a plain value: its name
    **{f"torch.{dtype}": dtype for dtype in BY_TORCH_NAME},
    "collections.OrderedDict": Name("collections.OrderedDict", lambda items=(): dict(items)),
    "torch.Size": Name("torch.Size", lambda items=(): tuple(items)),
    "torch.device": Name("torch.device", lambda kind="cpu", index=None: kind if index is None else f"{kind}:{index}"),
    "torch._utils._rebuild_tensor": Name("torch._utils._rebuild_tensor", _tensor),
    "torch._utils._rebuild_tensor_v2": Name("torch._utils._rebuild_tensor_v2", _tensor),
    "torch._utils._rebuild_tensor_v3": Name("torch._utils._rebuild_tensor_v3", _tensor),
    "torch._utils._rebuild_parameter": Name("torch._utils._rebuild_parameter", lambda data, *rest: data),
}

_WRAPPER = "torch._utils._rebuild_wrapper_subclass"
# how torch.save writes tensors that wrap others; known only where such are asked for
_SUBCLASS_NAMES: dict[str, Any] = {
    _WRAPPER: Name(_WRAPPER),
    "torch._tensor._rebuild_from_type_v2": Name("torch._tensor._rebuild_from_type_v2", _wrapper_subclass),
    "torch.serialization._get_layout": Name("torch.serialization._get_layout", lambda name: name),
}

_MARK = object()
_EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": set,
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
}  # fmt: skip
_CONSTANTS = frozenset((
    "BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "UNICODE", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
))  # fmt: skip
_PUTS = frozenset(("PUT", "BINPUT", "LONG_BINPUT"))
_GETS = frozenset(("GET", "BINGET", "LONG_BINGET"))
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True)
class Unpickled:
    """The object a pickle describes, the storages it mentions, and how many opcodes that took."""

    value: Any
    storages: dict[str, Storage]
    opcodes: int


def unpickle(stream: IO[bytes], where: str, packages: tuple[str, ...] = ()) -> Unpickled:
    """What one pickle describes. Stops behind the pickle in `stream`. `packages`: whose objects become `Described`."""
    machine = _Machine(where, packages)
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            machine.step(opcode.name, argument)
        return Unpickled(machine.result, machine.storages, machine.count)
    except AnybitError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError, MemoryError) as error:
        raise CorruptFile(
            f"{where} is not a pickle that torch.save wrote ({shorten(str(error))}). Download it again"
        ) from error


class _Machine:
    """The pickle virtual machine, without the part that imports and calls."""

    def __init__(self, where: str, packages: tuple[str, ...] = ()):
        self.where, self.count = where, 0
        self.packages = packages
        self.result: Any = None
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}

    def unsafe(self, what: str) -> NoReturn:
        raise UnsafeFile(f"{self.where} {what}; only plain tensors are read from a pickle. {CURE}")

    def step(self, code: str, argument: Any) -> None:
        self.count += 1
        if self.count > MAX_OPCODES:
            raise CorruptFile(f"{self.where} has more than {MAX_OPCODES} pickle opcodes; no state dict needs that many")
        if code in _CONSTANTS:
            self.stack.append(argument)
        elif code in _PUTS:
            self.memo[argument] = self.stack[-1]
        elif code in _GETS:
            self.stack.append(self.memo[argument])
        elif code in _EMPTY:
            self.stack.append(_EMPTY[code]())
        elif code in _TUPLES:
            self.stack[-_TUPLES[code] :] = [tuple(self.stack[-_TUPLES[code] :])]
        else:
            handler = getattr(self, f"_{code.lower()}", None)
            if handler is None:
                self.unsafe(f"uses the pickle opcode {code}")
            handler(argument)

    # --- the rest of the opcodes, one method each ----------------------------------------------------------------------

    def _proto(self, version: int) -> None:
        if version > 5:
            raise CorruptFile(f"{self.where} is a pickle of protocol {version}, known are 0 to 5")

    def _frame(self, size: int) -> None:
        pass

    def _stop(self, _: None) -> None:
        self.result = self.stack.pop()

    def _mark(self, _: None) -> None:
        self.stack.append(_MARK)

    def _pop(self, _: None) -> None:
        self.stack.pop()

    def _since_mark(self) -> list[Any]:
        position = len(self.stack) - 1
        while self.stack[position] is not _MARK:
            position -= 1
            if position < 0:
                raise ValueError("no mark on the stack")
        items = self.stack[position + 1 :]
        del self.stack[position:]
        return items

    def _pop_mark(self, _: None) -> None:
        self._since_mark()

    def _memoize(self, _: None) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _tuple(self, _: None) -> None:
        self.stack.append(tuple(self._since_mark()))

    def _list(self, _: None) -> None:
        self.stack.append(self._since_mark())

    def _dict(self, _: None) -> None:
        items = self._since_mark()
        self.stack.append(dict(zip(items[::2], items[1::2], strict=True)))

    def _append(self, _: None) -> None:
        value = self.stack.pop()
        self._top(list).append(value)

    def _appends(self, _: None) -> None:
        items = self._since_mark()
        self._top(list).extend(items)

    def _setitem(self, _: None) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._top(dict)[key] = value

    def _setitems(self, _: None) -> None:
        items = self._since_mark()
        self._top(dict).update(zip(items[::2], items[1::2], strict=True))

    def _additems(self, _: None) -> None:
        items = self._since_mark()
        self._top(set).update(items)

    def _top(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise TypeError(f"{kind.__name__} expected, {type(self.stack[-1]).__name__} found")
        return self.stack[-1]

    def _global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._push_name(f"{module}.{name}")

    def _stack_global(self, _: None) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self._push_name(f"{module}.{name}")

    def _push_name(self, path: str) -> None:
        if path in _NAMES:
            self.stack.append(_NAMES[path])
        elif self.packages and path in _SUBCLASS_NAMES:
            self.stack.append(_SUBCLASS_NAMES[path])
        elif path.partition(".")[0] in self.packages:
            self.stack.append(Name(path, lambda *arguments: Described(path, arguments, {})))
        else:
            self.unsafe(f"names the Python object {shorten(path)}")

    def _reduce(self, _: None) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Name) or function.make is None:
            self.unsafe(f"calls {shorten(getattr(function, 'path', function))}")
        self.stack.append(function.make(*arguments))

    _newobj = _reduce

    def _build(self, _: None) -> None:
        attributes = self.stack.pop()  # such as the _metadata of a state dict
        if isinstance(self.stack[-1], Described):
            self.stack[-1].fields.update(attributes)
        else:
            self._top(dict)

    def _binpersid(self, _: None) -> None:
        # ("storage", class, key, device it was on, count, view of another storage)
        kind, name, key, _device, count, *view = self.stack.pop()
        if kind != "storage" or not isinstance(name, Name) or not name.dtype or any(view):
            raise ValueError(f"{kind!r} is no storage of tensors")
        if type(count) is not int or count < 0 or not isinstance(key, str):
            raise ValueError(f"storage {key!r} of {count!r} elements")
        storage = Storage(key, name.dtype, count)
        if self.storages.setdefault(key, storage) != storage:
            raise ValueError(f"storage {key!r} is described twice, differently")
        self.stack.append(storage)
