"""Measure what `anybit convert` makes of every method's weights in every other method, and write docs/conversions.md.

    python docs/conversions.py

For each method, weights of files that its own package wrote (tests/golden: the first linear layer and the first experts of each)
are rewritten for every named scheme of every method, encoded, decoded again as a reader of the result would, and compared with
the source's values. A pair of methods gets the best of its outcomes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from anybit.cli.schemes import schemes
from anybit.engine.convert import (
    DENSE,
    EXACT,
    MOST_RESCALED,
    REQUANTIZED,
    RESCALED,
    Conversion,
    unit_job,
)
from anybit.engine.convert_units import sources_of
from anybit.engine.load import Prepared, prepare
from anybit.errors import AnybitError
from anybit.quantizers.auto import AutoHfQuantizer

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
PAGE = ROOT / "docs" / "conversions.md"
GROUPS = (32, 64, 128)  # for schemes that have groups, beside their own
ORDER = (EXACT, RESCALED, REQUANTIZED)
LETTERS = {EXACT: "exact", RESCALED: "rescaled", REQUANTIZED: "anew"}
Outcomes = dict[tuple[str, str], "list[Found]"]


@dataclass(frozen=True)
class Found:
    """One unit's fate. `kind` is "" where there is none, and `reason` says why."""

    source: str
    scheme: str
    kind: str
    error: float = 0.0
    reason: str = ""
    inputs: str = ""
    allowed: bool = False

    @property
    def rank(self) -> tuple[int, bool, float]:
        return (ORDER.index(self.kind) if self.kind in ORDER else len(ORDER), self.allowed, self.error)

    @property
    def cell(self) -> str:
        """What the table says."""
        if not self.kind:
            return "-"
        mark = "*" if self.allowed and self.kind != REQUANTIZED else ""
        return LETTERS[self.kind] + mark + ("" if self.kind == EXACT else f" {self.error:.1e}")


def sources(only: str | None = None) -> Iterator[tuple[str, Path]]:
    """(method folder, checkpoint) of the goldens that are checked."""
    for folder in sorted(GOLDEN.iterdir()):
        if folder.is_dir() and only in (None, folder.name):
            yield from ((folder.name, file.parent) for file in sorted(folder.glob("*/config.json")))
            if folder.name == "gguf":
                yield from ((folder.name, file) for file in sorted(folder.glob("*/*.gguf")))


def targets() -> Iterator[tuple[str, str, Any]]:
    """(method, scheme, configuration) of everything that can be written."""
    for name, (cls, options) in schemes().items():
        choices = [options]
        if "group_size" in options:
            choices += [{**options, "group_size": size} for size in GROUPS if size != options["group_size"]]
        for own in choices:
            try:
                label = name if own is options else f"{name}, groups of {own['group_size']}"
                yield str(cls.method), label, cls(**own)
            except AnybitError:
                continue  # a size that the method does not have


def measure(source: Path) -> Iterator[tuple[str, Found]]:
    """(target method, best outcome) for the weights of one checkpoint. Nothing for one that is not quantized."""
    ready: Prepared = prepare(source, device_map="cpu", allow_pickle=True)
    entries = {entry.slot.kind: entry for entry in reversed(ready.plan.entries) if entry.action == "packed"}
    label = "/".join(source.relative_to(GOLDEN).parts[:2])
    by_method: dict[str, list[tuple[str, Any]]] = {}
    for method, scheme, config in targets():
        by_method.setdefault(method, []).append((scheme, config))
    for kind in ("linear", "experts"):
        if kind in entries:
            for method, choices in by_method.items():
                yield method, _best(ready, entries[kind], label if kind == "linear" else f"{label} (experts)", choices)


def _best(ready: Prepared, entry: Any, label: str, choices: list[tuple[str, Any]]) -> Found:
    """The best outcome of all schemes with codes kept; if there is none, also where inputs may be quantized in another way."""
    kept = [_outcome(ready, entry, label, scheme, config, False) for scheme, config in choices]
    best = min(kept, key=lambda item: item.rank)
    if best.kind:
        return best
    again = [
        _outcome(ready, entry, label, scheme, config, True)
        for (scheme, config), item in zip(choices, kept, strict=True)
        if "quantizes its inputs by" in item.reason
    ]
    return min((item for item in again if item.kind in (EXACT, RESCALED)), key=lambda item: item.rank, default=best)


def anew(source: Path, method: str, best: Found) -> Found:
    """Codes chosen anew by the method's first scheme that can, for a pair that has no better outcome."""
    ready: Prepared = prepare(source, device_map="cpu", allow_pickle=True)
    entry = next(entry for entry in ready.plan.entries if entry.action == "packed" and entry.slot.kind != "embedding")
    for own, scheme, config in targets():
        if own == method:
            refusal = _outcome(ready, entry, best.source, scheme, config, False)
            found = _outcome(ready, entry, best.source, scheme, config, True)
            if found.kind:
                return replace(found, reason=refusal.reason)
    return best


def _outcome(ready: Prepared, entry: Any, label: str, scheme: str, config: Any, anew: bool) -> Found:
    report = Conversion("", str(config.method))
    try:
        target = AutoHfQuantizer.from_config(config, pre_quantized=False)
        target.begin(ready.model, list(ready.names.slots.values()))
        source = sources_of(ready, entry, target)[0]
        source = replace(source, units=source.units[:1])
        unit_job(ready, entry, source, report, anew, torch.device("cpu")).make()
    except (AnybitError, RuntimeError) as error:  # the latter is a mistake of a layout; the page then shows it
        reason = str(error).partition(" kept: ")[2].partition(". Allow requant")[0] or str(error)
        return Found(label, scheme, "", reason=reason)
    (module,) = report.modules
    if module.kind == DENSE:
        return Found(label, scheme, "", reason=f"the target leaves this weight dense: {module.reason}")
    return Found(label, scheme, module.kind, module.error, module.reason, module.inputs, anew)


def page(found: Outcomes, dense: dict[str, float]) -> str:
    """The Markdown of all outcomes."""
    rows = list(dict.fromkeys(source for source, _ in found))
    columns = sorted({target for _, target in found})
    best = {pair: min(own, key=lambda item: item.rank) for pair, own in found.items()}
    lines = [
        "# Conversions",
        "",
        "Written by `python docs/conversions.py` (`make conversions`) from measured runs: a weight that each method's own",
        "package wrote, in every named scheme of every other method (groups of 32, 64, 128 too), read back and compared.",
        "A cell is the best outcome of a pair over several files of the source, or the first scheme that chooses codes anew:",
        "",
        "- **exact**: the same values, bit for bit",
        f"- **rescaled**: the same codes; scales and offsets rounded to the target's dtype; the weight's relative error, below "
        f"{MOST_RESCALED:.1e}",
        "- **\\***: the weight is kept so, but the target quantizes the inputs in another way, or not at all: it must be allowed",
        "- **anew**: codes chosen again (`--allow-requantize`); the relative error of the weight",
        "- **-**: refused; the reasons are below",
        "",
        "| from \\ to | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for source in rows:
        cells = [
            best[source, target].cell.replace("*", "\\*") if (source, target) in best else "-" for target in columns
        ]
        lines.append(f"| {source} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "## Everything to dense",
        "",
        "Values computed in float32; the error is that of rounding to the model's dtype.",
        "",
    ]
    lines += ["| from | error |", "|---|---|"]
    lines += [f"| {source} | {error:.1e} |" for source, error in dense.items()]
    lines += ["", "## Exact pairs", "", "| from | to | inputs |", "|---|---|---|"]
    for pair, item in best.items():
        if item.kind == EXACT:
            lines.append(f"| {item.source} | {pair[1]}: {item.scheme} | {item.inputs} |")
    lines += ["", "## Why codes cannot be kept", "", "For the best outcome of each pair that is not exact.", ""]
    lines += ["| from | to | why |", "|---|---|---|"]
    for pair, item in best.items():
        if item.kind != EXACT:
            reason = " ".join(item.reason.split()).replace("|", "\\|")
            lines.append(f"| {item.source} | {pair[1]}: {item.scheme} | {reason} |")
    return "\n".join(lines) + "\n"


def measured(methods: Iterable[str | None]) -> tuple[Outcomes, dict[str, float]]:
    """Outcomes by (source's method, target's), and the error of everything made dense, for files of these methods (None: all)."""
    found: Outcomes = {}
    dense: dict[str, float] = {}
    first: dict[str, Path] = {}
    for only in methods:
        for method, source in sources(only):
            try:
                for target, item in measure(source):
                    found.setdefault((method, target), []).append(item)
                    first.setdefault(method, source)
            except AnybitError as error:
                sys.stderr.write(f"{source}: {error}\n")
                continue
            error = dense_error(source)
            if error is not None:
                dense[method] = max(error, dense.get(method, 0.0))
            sys.stderr.write(f"{source.relative_to(GOLDEN)}\n")
    for (method, target), own in found.items():
        best = min(own, key=lambda item: item.rank)
        if not best.kind:
            own.append(anew(first[method], target, best))
    return found, dense


def main() -> None:
    torch.set_num_threads(1)
    PAGE.write_text(page(*measured([None])), encoding="utf-8")


def dense_error(source: Path) -> float | None:
    """The error of one weight in the model's own dtype."""
    from anybit.engine.materialize import make_weight

    ready = prepare(source, device_map="cpu", allow_pickle=True)
    units = [entry for entry in ready.plan.entries if entry.action == "packed" and entry.slot.kind != "embedding"]
    if not units:
        return None
    exact = make_weight(ready.model, units[0], units[0].parts[0], ready.checkpoint).to_dense(torch.float32)
    return float((exact.to(ready.plan.dtype).float() - exact).norm() / exact.norm().clamp(min=1e-30))


if __name__ == "__main__":
    main()
