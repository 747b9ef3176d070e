"""Measure what `anybit convert` makes of every method's weights in every other method, and write docs/conversions.md.

    python docs/conversions.py

For each method, weights of files that its own package wrote (tests/golden) are rewritten for every named scheme of every method,
encoded, decoded again as a reader of the result would, and compared with the source's values. A pair of methods gets the best of
its outcomes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from anybit.cli.schemes import schemes
from anybit.engine.convert import DENSE, EXACT, REQUANTIZED, RESCALED, Conversion, convert_unit
from anybit.engine.load import Prepared, prepare
from anybit.errors import AnybitError
from anybit.quantizers.auto import AutoHfQuantizer

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
PAGE = ROOT / "docs" / "conversions.md"
MOST_VARIANTS = 1  # of one method; evenly spread over their names
GROUPS = (32, 64, 128)  # for schemes that have groups, beside their own
ORDER = (EXACT, RESCALED, REQUANTIZED)
LETTERS = {EXACT: "exact", RESCALED: "rescaled", REQUANTIZED: "anew"}


@dataclass(frozen=True)
class Found:
    """One unit's fate. `kind` is "" where there is none, and `reason` says why."""

    source: str
    scheme: str
    kind: str
    error: float = 0.0
    reason: str = ""

    @property
    def rank(self) -> tuple[int, float]:
        return (ORDER.index(self.kind) if self.kind in ORDER else len(ORDER), self.error)


def sources(only: str | None = None) -> Iterator[tuple[str, Path]]:
    """(method folder, checkpoint) of the goldens that are checked."""
    for folder in sorted(GOLDEN.iterdir()):
        variants = sorted(path.parent for path in folder.glob("*/config.json")) if folder.is_dir() else []
        if only is not None and folder.name != only:
            continue
        step = max(1, -(-len(variants) // MOST_VARIANTS))
        for variant in variants[::step]:
            yield folder.name, variant


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
    """(target method, what became of one unit) for every target. Nothing for a checkpoint that is not quantized."""
    ready: Prepared = prepare(source, device_map="cpu")
    units = [entry for entry in ready.plan.entries if entry.action == "packed" and entry.slot.kind == "linear"]
    if ready.quantizer is None or not units:
        return
    entry, label = units[0], f"{source.parent.name}/{source.name}"
    by_method: dict[str, list[tuple[str, Any]]] = {}
    for method, scheme, config in targets():
        by_method.setdefault(method, []).append((scheme, config))
    for method, choices in by_method.items():
        kept = [_outcome(ready, entry, label, scheme, config, False) for scheme, config in choices]
        best = min(kept, key=lambda item: item.rank)
        if not best.kind:  # nothing keeps the codes: choose them anew, by the method's first scheme that can
            for scheme, config in choices:
                again = _outcome(ready, entry, label, scheme, config, True)
                if again.kind:
                    reason = next(item.reason for item in kept if item.scheme == scheme)
                    best = replace(
                        again, reason=reason.partition(" kept: ")[2].partition(". Allow requant")[0] or reason
                    )
                    break
        yield method, best


def _outcome(ready: Prepared, entry: Any, label: str, scheme: str, config: Any, anew: bool) -> Found:
    report = Conversion("", str(config.method))
    try:
        target = AutoHfQuantizer.from_config(config, pre_quantized=False)
        target.begin(ready.model, list(ready.names.slots.values()))
        convert_unit(ready, entry, entry.parts[0], target, report, allow_requantize=anew)
    except (AnybitError, RuntimeError) as error:  # the latter is a mistake of a layout; the page then shows it
        return Found(label, scheme, "", reason=str(error))
    (module,) = report.modules
    if module.kind == DENSE:
        return Found(label, scheme, "", reason="the target leaves this weight dense")
    return Found(label, scheme, module.kind, module.error, module.reason)


def page(found: dict[tuple[str, str], list[Found]], dense: dict[str, float]) -> str:
    """The Markdown of all outcomes."""
    rows = list(dict.fromkeys(source for source, _ in found))
    columns = sorted({target for _, target in found})
    best = {pair: min(own, key=lambda item: item.rank) for pair, own in found.items()}
    lines = [
        "# Conversions",
        "",
        "Written by `python docs/conversions.py` (`make conversions`) from measured runs: a weight that each method's own",
        "package wrote, in every named scheme of every other method (groups of 32, 64, 128 too), read back and compared.",
        "One file of each method; a cell is the best outcome of a pair, or the first scheme that can choose codes anew:",
        "",
        "- **exact**: the same values, bit for bit",
        "- **rescaled**: the same codes, scales or offsets rounded by the target's dtype; the relative error of the weight",
        "- **anew**: codes chosen again (`--allow-requantize`); the relative error of the weight",
        "- **-**: refused; the reasons are below",
        "",
        "| from \\ to | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for source in rows:
        cells = []
        for target in columns:
            item = best.get((source, target))
            if item is None or not item.kind:
                cells.append("-")
            else:
                cells.append(LETTERS[item.kind] + ("" if item.kind == EXACT else f" {item.error:.1e}"))
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
    lines += ["", "## Exact pairs", "", "| from | to |", "|---|---|"]
    for pair, item in best.items():
        if item.kind == EXACT:
            lines.append(f"| {item.source} | {pair[1]}: {item.scheme} |")
    lines += ["", "## Why codes cannot be kept", "", "For the best outcome of each pair that is not exact.", ""]
    lines += ["| from | to | why |", "|---|---|---|"]
    for pair, item in best.items():
        if item.kind != EXACT:
            reason = " ".join(item.reason.split()).replace("|", "\\|")
            lines.append(f"| {item.source} | {pair[1]}: {item.scheme} | {reason} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    torch.set_num_threads(1)
    found: dict[tuple[str, str], list[Found]] = {}
    dense: dict[str, float] = {}
    for method, source in sources():
        try:
            for target, item in measure(source):
                found.setdefault((method, target), []).append(item)
        except AnybitError as error:
            sys.stderr.write(f"{source}: {error}\n")
            continue
        error = dense_error(source)
        if error is not None:
            dense[method] = max(error, dense.get(method, 0.0))
        sys.stderr.write(f"{source.relative_to(GOLDEN)}\n")
    PAGE.write_text(page(found, dense), encoding="utf-8")


def dense_error(source: Path) -> float | None:
    """The error of one weight in the model's own dtype."""
    from anybit.engine.materialize import make_weight

    ready = prepare(source, device_map="cpu")
    units = [entry for entry in ready.plan.entries if entry.action == "packed" and entry.slot.kind == "linear"]
    if not units:
        return None
    exact = make_weight(ready.model, units[0], units[0].parts[0], ready.checkpoint).to_dense(torch.float32)
    return float((exact.to(ready.plan.dtype).float() - exact).norm() / exact.norm().clamp(min=1e-30))


if __name__ == "__main__":
    main()
