"""Commands that look and change nothing: methods, inspect, plan, doctor. `methods` and `inspect --tensors` need no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from anybit.cli.options import ConfigFile, Debug, Device, Dtype, Json, Method, Quiet, Scheme, Setting, Source
from anybit.cli.report import Output, number, pairs, percent, shape, size, table
from anybit.cli.schemes import chosen, schemes
from anybit.engine.outlining import alike

All = Annotated[bool, typer.Option("--all", "-a", help="Every module by itself instead of groups of equal ones.")]


def methods(
    markdown: Annotated[bool, typer.Option("--markdown", help="The table as it stands in the README.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """List the quantization methods and the named schemes."""
    from anybit.quantizers.summary import CAPABILITIES, markdown_table
    from anybit.quantizers.summary import methods as known

    if markdown:
        print(markdown_table(), end="")
        return
    found = known()
    named = schemes()
    data = {
        "methods": [info.to_dict() for info in found],
        "schemes": {name: {"config": cls.__name__, "options": options} for name, (cls, options) in named.items()},
    }
    rows = [
        (
            info.name,
            *(info.says(capability) for capability in CAPABILITIES),
            str(info.checkpoints or "-"),
        )
        for info in found
    ]
    by_config: dict[str, list[str]] = {}
    for name, (cls, _) in named.items():
        by_config.setdefault(cls.__name__, []).append(name)
    Output(as_json, quiet).result(
        data,
        table(["method", *CAPABILITIES, "seen on"], rows),
        "",
        *(f"{name}: {meaning}." for name, meaning in CAPABILITIES.items()),
        "Measured by the conformance suite on as many of the vendor's checkpoints.",
        "",
        table(
            ["schemes of", "names for --scheme"], [(config, ", ".join(names)) for config, names in by_config.items()]
        ),
    )


def inspect(
    path: Source,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="Stored tensors instead of layouts; fast, needs no model class.")
    ] = False,
    every: All = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what a checkpoint holds, from its headers.

    Method, layouts, stored tensors, bytes, and problems; exit code 4 when there are any.
    """
    from anybit.engine.inspection import inspect as look

    found = look(path, layouts=not tensors)
    modules = found.modules if tensors or found.problems else _with_statistics(found.modules)
    groups = [(module.name, [module]) for module in modules] if every else alike(
        modules, name=lambda module: module.name,
        same=lambda module: (module.layout, number(module.bits_per_weight, 2), *module.tensors.items()),
    )  # fmt: skip
    rows: list[tuple[str, ...]] = []
    for name, members in groups:
        first, total = members[0], size(sum(module.bytes for module in members))
        if tensors or found.problems:
            for line, (own, stored) in enumerate(first.tensors.items()):
                rows.append((name if line == 0 else "", total if line == 0 else "", f"{own} {_short(stored)}"))
        else:
            rows.append((name, _layout(first.layout) or "-", number(first.bits_per_weight, 2), total))
    columns = (
        ["module", ">bytes", "stored tensors"] if tensors or found.problems else ["module", "layout", ">bits", ">bytes"]
    )
    Output(as_json, quiet).result(
        found.to_dict(),
        pairs(
            [
                ("path", found.path),
                ("model", found.architecture),
                ("method", found.method or "none (dense)"),
                ("options", _options(found.config)),
                ("files", ", ".join(f"{Path(file).name} {size(count)}" for file, count in found.files.items())),
                ("tensors", size(found.bytes_on_disk)),
                ("weights", f"{found.weights:,} at {number(found.bits_per_weight, 2)} bits" if found.weights else None),
                ("quantized", percent(found.coverage) if found.coverage is not None else None),
                ("ignored", "; ".join(f"{name} ({why})" for name, why in found.ignored.items())),
            ]
        ),
        "",
        table(columns, rows),
        *(
            ["", *(f"problem: {problem}" for problem in found.problems)]
            if found.problems
            else ["", "no problems found"]
        ),
    )
    if found.problems:
        from anybit.cli.errors import CHECKPOINT

        raise typer.Exit(CHECKPOINT)


def plan(
    path: Source,
    scheme: Scheme = None,
    method: Method = None,
    set_: Setting = None,
    config: ConfigFile = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    every: All = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what loading would do, and why.

    Layout, kernel, device and memory of every weight, before a byte of data is read."""
    wanted = chosen(scheme, method, set_, config)
    from anybit.engine.load import plan as make

    made = make(path, wanted, dtype=dtype, device_map=device)
    groups = [(entry.slot.module, [entry]) for entry in made.entries] if every else made.outline()
    reasons: dict[str, int] = {}
    rows = []
    for name, members in groups:
        first = members[0]
        note = f"[{reasons.setdefault(first.reason, len(reasons) + 1)}]" if first.reason else ""
        memory = size(sum(entry.bytes_memory for entry in members))
        layout = _layout(first.layout) + (" (new)" if first.action == "quantize" else "")
        rows.append(
            (
                name,
                layout,
                shape(first.slot.shape),
                number(first.bits_per_weight, 2),
                memory,
                f"{first.kernel} {note}".strip(),
            )
        )
    Output(as_json, quiet).result(
        made.to_dict(),
        table(["module", "layout", ">shape", ">bits", ">memory", "kernel"], rows),
        *(f"[{mark}] {reason}" for reason, mark in reasons.items()),
        "",
        pairs(
            [
                ("method", made.method or "none (dense)"),
                ("device", ", ".join(dict.fromkeys(entry.device for entry in made.entries))),
                ("on disk", size(made.bytes_on_disk)),
                ("in memory", size(made.bytes_in_memory)),
                ("peak of loading", f"{size(made.peak_bytes)}, beside Python and torch themselves"),
                ("quantized", percent(made.coverage)),
                ("ignored", "; ".join(f"{name} ({why})" for name, why in made.ignored.items())),
                ("notes", "; ".join(made.notes)),
            ]
        ),
    )


def doctor(as_json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """Show versions, devices, kernels, and what is missing."""
    from anybit.cli.machine import facts

    found = facts()
    lines: list[Any] = []
    for title in ("versions", "machine", "torch"):
        lines += [title, pairs([(f"  {name}", value) for name, value in found[title].items()])]
    lines += ["devices", pairs([(f"  {item['device']}", item["what"]) for item in found["devices"]])]
    kernels = [
        (f"  {item['name']}", item["unavailable"] or f"ready: {item['description']}") for item in found["kernels"]
    ]
    lines += ["kernels, the preferred ones first", pairs(kernels)]
    encoders = [(f"  {device}", what) for device, what in found["encoders"].items()]
    lines += ["what quantizes and packs", pairs(encoders)]
    missing = [(f"  {item['package']}", f"missing; {item['install']}") for item in found["missing"]]
    lines += ["optional packages", pairs(missing or [("  all", "installed")])]
    Output(as_json, quiet).result(found, *lines)


def _with_statistics(modules: Iterable[Any]) -> list[Any]:
    """Modules of the model; tensors stored below one (`weight.absmax`) counted with it."""
    found: dict[str, Any] = {}
    for module in sorted(modules, key=lambda module: not module.layout):
        owner = module.name
        while owner and owner not in found:
            owner = owner.rpartition(".")[0]
        if owner and found[owner].layout:
            found[owner] = replace(found[owner], bytes=found[owner].bytes + module.bytes)
        else:
            found[module.name] = module
    return list(found.values())


def _layout(name: str) -> str:
    """ "GptqLayout" -> "Gptq": the heading says the rest."""
    return name.removesuffix("Layout") or name


def _short(stored: str) -> str:
    """ "float16 [8, 32]" -> "float16 8x32"."""
    dtype, _, numbers = stored.partition(" ")
    return f"{dtype} {shape(re.findall(r'[0-9]+', numbers)) or 'scalar'}"


def _options(config: Any) -> str:
    hidden = {"quant_method", "extra_fields"}
    shown = {
        name: value
        for name, value in (config or {}).items()
        if value is not None and name not in hidden and name[:1] != "_"
    }
    text = ", ".join(
        f"{name}={value}"
        for name, value in shown.items()
        if not isinstance(value, (dict, list)) or len(str(value)) < 60
    )
    return text


COMMANDS = (methods, inspect, plan, doctor)
