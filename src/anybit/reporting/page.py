"""The report as one HTML page: no script, nothing fetched, light and dark, readable by keyboard and on a phone."""

from __future__ import annotations

import datetime
import html
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from anybit.engine.outlining import size
from anybit.reporting import charts
from anybit.reporting.facts import Facts, as_json, ranked

WORST = 12  # modules in the table of the worst

_STYLE = """
:root { color-scheme: light dark; --paper: #fdfdfc; --ink: #22262b; --faint: #c9cdd2;
        --first: #1f6f8b; --second: #c2571a; --heat: 194 87 26; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15181c; --ink: #e3e6ea; --faint: #454b53;
          --first: #6cc0dc; --second: #f0935a; --heat: 240 147 90; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 1rem 1.2rem 4rem; background: var(--paper); color: var(--ink);
       font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 1rem 0 0.2rem; overflow-wrap: anywhere; } h2 { font-size: 1.2rem; margin: 2.4rem 0 0.6rem; }
a { color: var(--first); } :focus-visible { outline: 3px solid var(--second); outline-offset: 2px; }
nav a { margin-right: 0.9rem; white-space: nowrap; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 0.7rem; margin: 1rem 0; padding: 0; }
.tiles div { border: 1px solid var(--faint); border-radius: 0.5rem; padding: 0.6rem 0.8rem; }
.tiles dt { font-size: 0.85rem; } .tiles dd { margin: 0; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 0.25rem 0.7rem 0.25rem 0; border-bottom: 1px solid var(--faint); white-space: nowrap; }
.heat td { text-align: center; padding: 0.3rem 0.5rem; border: 2px solid var(--paper); min-width: 3.4rem; }
.heat th { border: 0; font-weight: 500; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { font-size: 0.85rem; overflow-wrap: anywhere; } svg { width: 100%; height: auto; }
pre { border: 1px solid var(--faint); border-radius: 0.5rem; padding: 0.7rem; overflow-x: auto;
      font-size: 0.85rem; white-space: pre-wrap; }
.texts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); gap: 1rem; }
summary { cursor: pointer; }
@media print { details { display: block; } }
"""


def write_page(facts: Facts, path: Path) -> None:
    """Write the report to a file. Raises MissingDependency without matplotlib."""
    path.write_text(page(facts), encoding="utf-8")


def page(facts: Facts) -> str:
    """The whole document."""
    sections = [
        section
        for section in (
            _summary(facts), _quality(facts), _heat(facts), _worst(facts), _costs(facts), _candidates(facts),
            _distributions(facts), _texts(facts), _layouts(facts), _recipe(facts), _again(facts),
        )
        if section
    ]  # fmt: skip
    title = f"{Path(facts.path).resolve().name}: {facts.method}"
    links = " ".join(f'<a href="#{name}">{_text(label)}</a>' for name, label, _ in sections)
    body = "\n".join(
        f'<section id="{name}" aria-labelledby="{name}-h"><h2 id="{name}-h">{_text(label)}</h2>\n{content}\n</section>'
        for name, label, content in sections
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style></head>\n<body>\n<header><h1>{_text(title)}</h1>\n"
        f"<p>Measured by anybit {_text(facts.versions['anybit'])} on {datetime.date.today().isoformat()}.</p>\n"
        f'<nav aria-label="Sections">{links}</nav></header>\n<main>\n{body}\n</main>\n</body></html>\n'
    )


Section = tuple[str, str, str]


def _summary(facts: Facts) -> Section:
    plan, found = facts.plan, facts.evaluation
    tiles = [
        ("bits per packed weight", f"{facts.bits_per_weight:.2f}"),
        ("weights that are packed", f"{plan['coverage']:.1%}"),
        ("on disk", _change(plan["bytes_on_disk"], facts.dense_bytes)),
        ("in memory", _change(plan["bytes_in_memory"], facts.dense_memory)),
    ]
    if found is not None:
        tiles.append(("perplexity", f"{found.perplexity:.3f}"))
        if found.reference_perplexity is not None:
            tiles.append(("perplexity before", f"{found.reference_perplexity:.3f}"))
        if found.kl is not None and found.top1 is not None:
            tiles += [("KL, nats per token", f"{found.kl:.4f}"), ("same first choice", f"{found.top1:.1%}")]
    boxes = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in tiles)
    return "summary", "Summary", f'<dl class="tiles">{boxes}</dl>'


def _quality(facts: Facts) -> Section | None:
    found = facts.evaluation
    if found is None:
        return None
    rows = [
        (name, value)
        for name, value in found.to_dict().items()
        if name not in ("modules", "protocol") and value is not None
    ]
    shown = _table(["", ""], [(name.replace("_", " "), f"{value:.5g}") for name, value in rows])
    return "quality", "Quality", f"<p>{_text(found.protocol)}.</p>{shown}"


def _heat(facts: Facts) -> Section | None:
    """Rows: decoder blocks. Columns: the modules of a block. Cells: the error, in figures and as colour."""
    if not facts.modules:
        return None
    key = "output_error" if any(module["output_error"] for module in facts.modules) else "weight_error"
    cells: dict[str, dict[str, float]] = {}
    for module in facts.modules:
        found = re.search(r"\.(\d+)\.(.*)$", module["module"])
        block, name = (found[1], found[2]) if found else ("", module["module"])
        if module[key] is not None:
            cells.setdefault(block, {})[name] = module[key]
    columns = list(dict.fromkeys(name for block in cells.values() for name in block))
    largest = max((value for block in cells.values() for value in block.values()), default=0.0) or 1.0
    rows = []
    for block, own in sorted(cells.items(), key=lambda item: int(item[0] or -1)):
        shown = "".join(
            f'<td style="background: rgb(var(--heat) / {0.75 * own[name] / largest:.2f})">{own[name]:.3f}</td>'
            if name in own
            else "<td></td>"
            for name in columns
        )
        rows.append(f'<tr><th scope="row">{_text(f"block {block}" if block else "others")}</th>{shown}</tr>')
    head = "".join(f'<th scope="col">{_text(name.rpartition(".")[2])}</th>' for name in columns)
    what = "of outputs, on the reference's own inputs" if key == "output_error" else "of weights"
    table = f'<table class="heat"><thead><tr><td></td>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    table = f'<div class="wide" tabindex="0" role="region" aria-label="Errors by block">{table}</div>'
    return (
        "errors",
        "Errors by block",
        f"<p>Relative error {what}.</p>{table}<figure>{charts.sorted_errors(facts.modules)}</figure>",
    )


def _worst(facts: Facts) -> Section | None:
    if not facts.modules:
        return None
    rows = [
        (
            module["module"], "x".join(map(str, module["shape"])), f"{module['bits_per_weight']:.2f}",
            f"{module['weight_error']:.4f}", "-" if module["output_error"] is None else f"{module['output_error']:.4f}",
        )
        for module in ranked(facts.modules)[:WORST]
    ]  # fmt: skip
    return (
        "worst",
        "Worst modules",
        _table(["module", "shape", "bits per weight", "weight error", "output error"], rows),
    )


def _costs(facts: Facts) -> Section | None:
    """Measured before it was made: what each module costs in each candidate scheme."""
    if not facts.costs:
        return None
    key = "kl" if all(cost.kl is not None for cost in facts.costs) else "weight_error"
    schemes = list(dict.fromkeys(cost.scheme for cost in facts.costs))
    table: dict[str, dict[str, float]] = {}
    for cost in facts.costs:
        table.setdefault(cost.module, {})[cost.scheme] = getattr(cost, key)
    dearest = sorted(table.items(), key=lambda item: -max(item[1].values()))[:WORST]
    rows = [(name, *(f"{own[one]:.2e}" if one in own else "-" for one in schemes)) for name, own in dearest]
    what = "the model's words change by it, KL in nats per token" if key == "kl" else "relative error of its weight"
    return (
        "sensitivity",
        "Sensitivity",
        f"<p>One module at a time in each scheme, on calibration text: {what}.</p>"
        f"<figure>{charts.sensitivity(facts.costs, key)}</figure>{_table(['module', *schemes], rows)}",
    )


def _candidates(facts: Facts) -> Section | None:
    if not facts.candidates:
        return None
    rows = [
        (
            one.name,
            f"{one.bits_per_weight:.2f}",
            size(one.bytes_on_disk),
            f"{one.perplexity:.3f}",
            "-" if one.kl is None else f"{one.kl:.4f}",
        )
        for one in sorted(facts.candidates, key=lambda one: one.bits_per_weight)
    ]
    chart = charts.scatter(facts.candidates, facts.candidates[0].name)
    table = _table(["model", "bits per packed weight", "on disk", "perplexity", "KL"], rows)
    return "candidates", "Size against quality", f"<figure>{chart}</figure>{table}"


def _distributions(facts: Facts) -> Section | None:
    if not facts.histograms:
        return None
    shown = "".join(
        f"<figure>{charts.histogram(one)}<figcaption>{_text(one.kind)} of {_text(one.module)}</figcaption></figure>"
        for one in facts.histograms
    )
    return (
        "distributions",
        "Distributions",
        f'<p>Of the worst modules; counts on a logarithmic axis.</p><div class="charts">{shown}</div>',
    )


def _texts(facts: Facts) -> Section | None:
    if not facts.generations:
        return None
    parts = []
    for one in facts.generations:
        sides = [("packed", one["quantized"]), *([("before", one["reference"])] if facts.reference else [])]
        shown = "".join(f"<div><h4>{name}</h4><pre>{_text(text)}</pre></div>" for name, text in sides)
        parts.append(f'<h3>{_text(one["prompt"])}</h3><div class="texts">{shown}</div>')
    return "texts", "Generated text", "<p>The most likely token each time.</p>" + "".join(parts)


def _layouts(facts: Facts) -> Section:
    rows = [
        (
            module["module"], module["action"], module["layout"], f"{module['bits_per_weight']:.2f}", size(module["bytes"]),
            module["kernel"], module["reason"],
        )
        for module in facts.plan["modules"]
    ]  # fmt: skip
    table = _table(["module", "", "layout", "bits per weight", "in memory", "kernel", "why"], rows)
    notes = "".join(f"<li>{_text(note)}</li>" for note in facts.plan["notes"])
    return (
        "modules",
        "All modules",
        f"{f'<ul>{notes}</ul>' if notes else ''}<details><summary>{len(rows)} modules</summary>{table}</details>",
    )


def _recipe(facts: Facts) -> Section | None:
    if facts.recipe is None:
        return None
    about = [(name.replace("_", " "), _number(value)) for name, value in facts.recipe.get("about", {}).items()]
    shown = as_json({name: value for name, value in facts.recipe.items() if name != "about"})
    return (
        "recipe",
        "Recipe",
        f"<p>Also in the file anybit_recipe.json, for <code>anybit quantize --recipe</code>.</p>"
        f'{_table(["", ""], about) if about else ""}<pre tabindex="0">{_text(shown)}</pre>',
    )


def _number(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _again(facts: Facts) -> Section:
    versions = _table(["", ""], facts.versions.items())
    config = (
        f"<details><summary>Quantization configuration</summary><pre>{_text(as_json(facts.config))}</pre></details>"
    )
    return "again", "To do it again", f"<pre>{_text(facts.command)}</pre>{versions}{config}"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    titles = "".join(f'<th scope="col">{_text(name)}</th>' for name in head) if any(head) else ""
    body = "".join("<tr>" + "".join(f"<td>{_text(value)}</td>" for value in row) + "</tr>" for row in rows)
    top = f"<thead><tr>{titles}</tr></thead>" if titles else ""
    return f'<div class="wide" tabindex="0"><table>{top}<tbody>{body}</tbody></table></div>'


def _change(now: int, before: int | None) -> str:
    return size(now) if not before else f"{size(now)} ({now / before:.0%})"


def _text(value: Any) -> str:
    return html.escape(str(value))
