"""Which of compressed-tensors' layouts a module has: the stored tensors' names and dtypes tell the form, its scheme the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from anybit.errors import ConfigError, MissingTensor, NotRepresentable, ShapeMismatch
from anybit.methods._compressed_layouts import (
    CompressedLayout,
    FloatLayout,
    IntegerLayout,
    PackedLayout,
    Spec,
    words_of,
)
from anybit.methods._compressed_schemes import Arguments, Matcher, Scheme, classes_of
from anybit.methods._compressed_sparse import BitmaskLayout, DenseLayout, FakeQuantizedLayout, Marlin24Layout
from anybit.methods._scaled_floats import joined_with
from anybit.weight.layout import Layout, ModuleInfo, join_name

FLOATS = ("float16", "bfloat16", "float32", "float64")
POWERS = ("uint8", "float8_e8m0fnu")
# from this version on, codes of 3, 5, 6 and 7 bits are one stream; before, they did not cross words
STREAMS_FROM = (0, 18)


class Stored:
    """Reads and makes the layouts of one configuration. `decide(what, module)` is told what was not plain from it."""

    def __init__(self, config: Any, matcher: Matcher, decide: Callable[[str, str], None] = lambda what, module: None):
        self.config, self.matcher, self.decide = config, matcher, decide
        self._known: dict[Any, Layout | None] = {}

    # --- reading ---

    def layout(self, module: ModuleInfo, stored: Mapping[str, Any], peek: Callable[[str], Any]) -> Layout | None:
        """The layout of stored tensors; None for a dense weight whose input is not quantized either."""
        scheme = self._scheme(module, stored)
        if scheme is not None and scheme.weights is not None and scheme.weights.widths:
            scheme = self._with_bits(module, stored, scheme, scheme.weights)
        if "weight_g_idx" in stored:
            return self._layout(module, stored, scheme, peek)
        forms = tuple((name, info.dtype, info.shape) for name, info in stored.items())
        key = (scheme, module.kind, module.shape, module.dtype, forms)
        if key not in self._known:
            self._known[key] = self._layout(module, stored, scheme, peek)
        return self._known[key]

    def _scheme(self, module: ModuleInfo, stored: Mapping[str, Any]) -> Scheme | None:
        """By the name in the checkpoint, by that in the model, by class; `ignore` counts for dense weights only."""
        relative, info = next(iter(stored.items()))
        own = info.name.removesuffix(f".{relative}") if relative and not relative.startswith("_") else info.name
        classes = classes_of(module.kind, module.class_name)
        dense = relative in ("weight", "") and info.dtype in FLOATS and len(stored) == 1
        names = (own,) if own == module.name else (own, module.name)
        if any(self.matcher.ignored(name, classes) for name in names):
            if dense:
                return None
            self.decide("'ignore' names it, but it is stored packed, and is read as its target says", module.name)
        found = self.matcher.scheme(own, classes, names[-1])
        if found is not None:
            if dense and found.weights is not None:
                self.decide("a target names it, but it is stored dense, and stays dense", module.name)
            return found
        every = {(scheme.weights, scheme.inputs) for scheme in self.matcher.schemes.values()}
        if dense or len(every) != 1:
            return None
        self.decide("no target names it, but it is stored packed, and is read as all groups say", module.name)
        return next(iter(self.matcher.schemes.values()))

    def _with_bits(self, module: ModuleInfo, stored: Mapping[str, Any], scheme: Scheme, args: Arguments) -> Scheme:
        """The scheme with the one number of bits, of those the configuration mentions, that the stored codes can have."""
        names = ("weight_packed", "weight", "compressed")
        codes = next((stored[name] for name in names if name in stored), None)
        if codes is None or (len(stored) == 1 and codes.dtype in FLOATS):
            return scheme  # dense, or damaged: said where codes are read
        found = [bits for bits in args.widths if _could_have(codes, bits, module.shape, "meta" in stored)]
        if len(found) != 1:
            raise ConfigError(
                f"{module.name}: num_bits of config_groups[{scheme.name!r}] is a map with {', '.join(map(str, args.widths))}; "
                f"tensor {codes.name!r} in {codes.file}, {codes.dtype} {tuple(codes.shape)} for a weight {module.shape}, "
                f"{'could have ' + ' or '.join(map(str, found)) if found else 'has none of these'}. Give each number of bits a "
                "group of its own, whose targets name its modules"
            )
        self.decide(
            f"num_bits of config_groups[{scheme.name!r}] is a map; the stored codes have {found[0]} bits", module.name
        )
        return replace(scheme, weights=replace(args, bits=found[0], widths=()))

    def _layout(
        self, module: ModuleInfo, stored: Mapping[str, Any], scheme: Scheme | None, peek: Callable[[str], Any]
    ) -> Layout | None:
        inputs = scheme.inputs if scheme is not None and module.kind != "embedding" else None
        weight = stored.get("weight")
        dense = set(stored) <= {"weight", ""} and next(iter(stored.values())).dtype in FLOATS
        if dense and (weight is None or inputs is None or scheme is None or scheme.weights is not None):
            return None
        if module.kind not in ("linear", "embedding"):
            raise NotRepresentable(
                f"{module.name} is a packed {module.kind}; compressed-tensors stores linear layers and embeddings, one by one"
            )
        if "compressed" in stored or "bitmask" in stored:
            return self._bitmask(module, stored, scheme, inputs)
        if scheme is None:
            raise ConfigError(
                f"{module.name} stores {', '.join(sorted(stored))}, but no target of the configuration's config_groups names it, "
                f"so bits and groups are unknown. Targets: {', '.join(self.matcher.targets) or 'none'}"
            )
        if "meta" in stored or "scale_packed" in stored:
            return self._marlin(module, stored, _weights(module, scheme, stored), inputs)
        if weight is not None and weight.dtype in FLOATS:
            return self._floats_on_disk(module, stored, scheme, inputs)
        return self._codes(module, stored, _weights(module, scheme, stored), inputs, peek)

    def _codes(
        self,
        module: ModuleInfo,
        stored: Mapping[str, Any],
        args: Arguments,
        inputs: Arguments | None,
        peek: Callable[[str], Any],
    ) -> Layout:
        packed, weight = stored.get("weight_packed"), stored.get("weight")
        own = packed if packed is not None else weight
        if own is None:
            raise MissingTensor(
                f"tensor {join_name(module.name, 'weight')!r} is not stored, nor is 'weight_packed'; of {module.name} there are "
                f"{', '.join(sorted(stored))}"
            )
        forms = {
            "int32": ("int", PackedLayout), "uint8": ("float", FloatLayout), "float8_e4m3fn": ("float", FloatLayout),
            "int8": ("int", IntegerLayout), "int16": ("int", IntegerLayout),
        }  # fmt: skip
        kind, layout = forms.get(own.dtype, ("", CompressedLayout))
        fits = kind == args.type and (packed is not None) == (own.dtype in ("int32", "uint8"))
        if own.dtype in ("uint8", "float8_e4m3fn"):
            fits = fits and (args.bits == 8) == (own.dtype == "float8_e4m3fn") and args.levels is not None
        if not fits:
            raise ShapeMismatch(
                f"tensor {own.name!r} in {own.file} is {own.dtype} {tuple(own.shape)}, which does not store the {args} that the "
                "configuration gives it"
            )
        scales = self._scales(module, stored, args)
        if layout is PackedLayout:
            scales["dense_words"] = self._dense_words(module, stored, args)
            if scales["zero"] == "int32":
                scales["zero"] = "words"
        if "weight_g_idx" in stored:
            scales["index"] = _index(module, stored, args, peek)
        elif args.indexed:
            raise MissingTensor(
                f"tensor {join_name(module.name, 'weight_g_idx')!r} is not stored; actorder 'group' reorders columns, and it "
                "tells the group of each"
            )
        return layout(module.shape, module.dtype, **scales, **self._inputs(module, stored, inputs))

    def _scales(self, module: ModuleInfo, stored: Mapping[str, Any], args: Arguments) -> dict[str, Any]:
        """Fields of a layout about what is stored beside codes. What is not stored but needed gets its usual form."""
        scale, common, zero = (stored.get(f"weight_{name}") for name in ("scale", "global_scale", "zero_point"))
        usual = "uint8" if args.powers else args.scale_dtype or module.dtype
        allowed = (*FLOATS, "float8_e4m3fn", *(POWERS if args.type == "float" and args.group_size else ()))
        dtype = scale.dtype if scale is not None and scale.dtype in allowed else usual
        if (common is not None or args.strategy == "tensor_group") and dtype != "float8_e4m3fn":
            what = f"is {dtype}" if scale is not None else "is not stored"
            raise ShapeMismatch(
                f"tensor {join_name(module.name, 'weight_scale')!r} {what}, but under a global scale it must be float8_e4m3fn"
            )
        whole = args.strategy == "tensor"
        return {
            "args": args,
            "scale_dtype": dtype,
            "scale_rank": min(len(scale.shape), 2) if scale is not None else 1 if whole else 2,
            "zero": zero.dtype if zero is not None else None if args.symmetric else "int8",
            "common": None if common is None and args.strategy != "tensor_group" else _one_number(common),
        }

    def _inputs(self, module: ModuleInfo, stored: Mapping[str, Any], inputs: Arguments | None) -> dict[str, Any]:
        """Fields of a layout about the input."""
        if inputs is None:
            return {}
        columns = module.shape[-1]
        if inputs.group_size and columns % inputs.group_size:
            raise NotRepresentable(
                f"{module.name}: its {columns} inputs are quantized in groups of {inputs.group_size}, which do not divide them"
            )
        if inputs.type == "float" and (not inputs.symmetric or inputs.levels is None):
            raise NotRepresentable(
                f"{module.name}: its inputs are {inputs}; floats are symmetric and have 4, 6 or 8 bits"
            )
        wanted = {"no": "input_scale", "local": "input_global_scale", "yes": None}[inputs.dynamic]
        specs: list[Spec] = []
        for name in ("input_scale", "input_zero_point", "input_global_scale"):
            if name in stored:
                specs.append((name, stored[name].dtype, tuple(stored[name].shape)))
            elif name == wanted:
                specs.append((name, module.dtype if name == "input_scale" else "float32", (1,)))
        groups = columns // inputs.group_size if inputs.group_size and inputs.dynamic == "no" else 1
        for name, _, shape in specs:
            if shape not in ((), (1,), (groups,)) or (
                shape == (groups,) and groups > 1 and name == "input_global_scale"
            ):
                raise ShapeMismatch(
                    f"tensor {join_name(module.name, name)!r} has shape {shape}; {inputs} needs ({groups},)"
                )
        return {"inputs": inputs, "input_specs": tuple(specs)}

    def _dense_words(self, module: ModuleInfo, stored: Mapping[str, Any], args: Arguments) -> bool:
        """Whether codes are one stream over their words. Word counts tell; where they agree, the version does."""
        if 32 % args.bits == 0:
            return True
        for name, axis, count in (("weight_packed", 1, module.shape[1]), ("weight_zero_point", 0, module.shape[0])):
            if name in stored and stored[name].dtype == "int32" and len(stored[name].shape) == 2:
                counts = [words_of(count, args.bits, dense) for dense in (True, False)]
                found = stored[name].shape[axis]
                if counts[0] != counts[1] and found in counts:
                    return bool(found == counts[0])
        dense = version_of(self.config.version) >= STREAMS_FROM
        self.decide(
            f"codes of {args.bits} bits are read as {'one stream' if dense else 'words with gaps'}: word counts fit both, and "
            f"version is {self.config.version!r}",
            module.name,
        )
        return dense

    # --- the rarer forms ---

    def _bitmask(
        self, module: ModuleInfo, stored: Mapping[str, Any], scheme: Scheme | None, inputs: Arguments | None
    ) -> Layout:
        values = stored.get("compressed")
        if values is None or values.dtype not in (*FLOATS, "int8", "float8_e4m3fn"):
            raise MissingTensor(
                f"tensor {join_name(module.name, 'compressed')!r} is "
                f"{'not stored' if values is None else values.dtype}; a bitmask needs its values, floats or codes"
            )
        fields: dict[str, Any] = {"element": values.dtype, "count": None if len(values.shape) == 2 else values.shape[0]}
        if values.dtype in FLOATS:
            return BitmaskLayout(module.shape, module.dtype, **fields, **self._inputs(module, stored, inputs))
        if scheme is None:
            raise ConfigError(f"{module.name} stores {values.dtype} codes, but no target of config_groups names it")
        args = _weights(module, scheme, stored)
        if (args.type == "int") != (values.dtype == "int8") or args.bits > 8:
            raise ShapeMismatch(
                f"tensor {values.name!r} in {values.file} is {values.dtype}, the configuration says {args}"
            )
        return BitmaskLayout(
            module.shape,
            module.dtype,
            **fields,
            **self._scales(module, stored, args),
            **self._inputs(module, stored, inputs),
        )

    def _marlin(
        self, module: ModuleInfo, stored: Mapping[str, Any], args: Arguments, inputs: Arguments | None
    ) -> Layout:
        rows, columns = module.shape
        if args.bits not in (4, 8) or args.type != "int" or not args.symmetric or args.block not in ((1, 128), (1, 0)):
            raise NotRepresentable(
                f"{module.name}: marlin-24 holds symmetric integers of 4 or 8 bits in groups of 128 or rows, not {args}"
            )
        if rows % 64 or columns % 32 or (args.group_size and columns % 128):
            raise NotRepresentable(
                f"{module.name}: marlin-24 holds multiples of 64 rows and 128 columns, not {module.shape}"
            )
        return Marlin24Layout(module.shape, module.dtype, args, **self._inputs(module, stored, inputs))

    def _floats_on_disk(
        self, module: ModuleInfo, stored: Mapping[str, Any], scheme: Scheme, inputs: Arguments | None
    ) -> Layout:
        weight, args = stored["weight"], scheme.weights
        if args is None:
            if inputs is None:
                raise ShapeMismatch(
                    f"{module.name} stores {', '.join(sorted(stored))}, but its scheme {scheme.name!r} quantizes nothing"
                )
            return DenseLayout(module.shape, module.dtype, weight.dtype, **self._inputs(module, stored, inputs))
        status = self.config.quantization_status
        if status == "compressed":
            raise ShapeMismatch(
                f"tensor {weight.name!r} in {weight.file} is {weight.dtype} with scales beside it, but quantization_status is "
                f"'compressed', so it should be codes ({args}). Set quantization_status to 'frozen' if the weight was only "
                "calibrated"
            )
        kind = IntegerLayout if args.type == "int" else FloatLayout
        inner = kind(
            module.shape, module.dtype, **self._scales(module, stored, args), **self._inputs(module, stored, inputs)
        )
        return FakeQuantizedLayout(module.shape, module.dtype, inner, weight.dtype)

    # --- creating ---

    def layout_to_make(self, module: ModuleInfo) -> tuple[Layout | None, str]:
        """The layout a dense module gets, or None and why it stays dense."""
        scheme = self.matcher.scheme(module.name, classes_of(module.kind, module.class_name))
        if scheme is None:
            return None, "no target of the configuration names it"
        args = scheme.weights
        if args is None:
            return None, f"its scheme {scheme.name!r} quantizes no weights"
        if module.kind not in ("linear", "embedding"):
            return None, f"compressed-tensors stores linear layers and embeddings, one by one; this is a {module.kind}"
        columns = module.shape[-1]
        if args.strategy in ("group", "tensor_group") and columns % args.group_size:
            return None, f"groups of {args.group_size} do not divide its {columns} inputs"
        if args.type == "float" and args.levels is None:
            return None, f"there are no floats of {args.bits} bits"
        inputs = scheme.inputs if module.kind != "embedding" else None
        if inputs is not None and inputs.group_size and columns % inputs.group_size:
            return None, f"groups of {inputs.group_size} inputs do not divide its {columns}"
        return self._made(module, scheme, args, inputs), ""

    def _made(self, module: ModuleInfo, scheme: Scheme, args: Arguments, inputs: Arguments | None) -> Layout:
        fields: dict[str, Any] = {"args": args, "scale_rank": 1 if args.strategy == "tensor" else 2}
        fields.update(self._inputs(module, {}, inputs))
        if inputs is not None and inputs.dynamic == "no":
            count = module.shape[-1] // inputs.group_size if inputs.group_size else 1
            specs: list[Spec] = [("input_scale", module.dtype, (count,))]
            specs += [] if inputs.symmetric else [("input_zero_point", "int8", (count,))]
            fields["input_specs"] = tuple(specs)
        fields["scale_dtype"] = "uint8" if args.powers else args.scale_dtype or module.dtype
        if args.strategy == "tensor_group":
            fields.update(common=(1,), scale_dtype="float8_e4m3fn")
        packed = args.type == "int" and scheme.stored_as == "pack-quantized" and args.bits <= 8
        if not args.symmetric:
            fields["zero"] = "words" if packed and args.strategy in ("group", "channel") else "int8"
        if args.type == "float":
            joined = joined_with(module.name) if "common" in fields else ()
            return FloatLayout(module.shape, module.dtype, **fields, joined=joined)
        if args.indexed:
            fields["index"] = "runs"  # until data say in what order columns are met
        return (PackedLayout if packed else IntegerLayout)(module.shape, module.dtype, **fields)


def version_of(text: str | None) -> tuple[int, int]:
    """(major, minor) of the compressed-tensors that wrote a file; (0, 0) when it does not say."""
    parts = (text or "").split(".")
    return (int(parts[0]), int(parts[1])) if len(parts) > 1 and parts[0].isdigit() and parts[1].isdigit() else (0, 0)


def _could_have(codes: Any, bits: int, shape: tuple[int, ...], marlin: bool) -> bool:
    """Whether stored codes can have that many bits, by their dtype and by how many words a row has."""
    rows, columns = shape[-2:]
    last = codes.shape[-1] if codes.shape else 0
    if codes.dtype == "int32" and marlin:
        return bool(2 * last == rows * bits)
    if codes.dtype == "int32":
        return last in (words_of(columns, bits, True), words_of(columns, bits, False))
    if codes.dtype == "uint8":
        return bool(8 * last == columns * bits)
    if codes.dtype == "float8_e4m3fn":
        return bits == 8
    return bits <= {"int8": 8, "int16": 16}.get(codes.dtype, 16)


def _one_number(info: Any) -> tuple[int, ...]:
    """The shape of one number: as it is stored if it is one, else the usual, for the check to find fault with."""
    return tuple(info.shape) if info is not None and tuple(info.shape) in ((), (1,)) else (1,)


def _weights(module: ModuleInfo, scheme: Scheme, stored: Mapping[str, Any]) -> Arguments:
    if scheme.weights is None:
        raise ShapeMismatch(
            f"{module.name} stores {', '.join(sorted(stored))}, but its scheme {scheme.name!r} quantizes no weights"
        )
    return scheme.weights


def _index(module: ModuleInfo, stored: Mapping[str, Any], args: Arguments, peek: Callable[[str], Any]) -> str:
    """What weight_g_idx is: the groups of columns, runs of the group size, or not used (-1)."""
    info = stored["weight_g_idx"]
    if info.dtype != "int32" or tuple(info.shape) != (module.shape[1],) or not args.group_size:
        raise ShapeMismatch(
            f"tensor {info.name!r} in {info.file} is {info.dtype} {tuple(info.shape)}; the group of each column needs int32 "
            f"{(module.shape[1],)} and a group_size ({args})"
        )
    index = peek("weight_g_idx")
    if bool((index == -1).all()):
        return "unused"
    runs = index.new_tensor(range(module.shape[1])) // args.group_size
    return "runs" if bool((index == runs).all()) else "columns"
