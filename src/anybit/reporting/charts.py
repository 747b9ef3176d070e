"""Charts as SVG text that follows the page's colours, light or dark. Drawn by matplotlib (`anybit[report]`)."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

from anybit.engine.sensitivity import Cost
from anybit.errors import MissingDependency
from anybit.reporting.facts import Candidate, Histogram

# drawn in colours nobody uses, which then become the page's own variables
_COLOURS = {"#010203": "var(--ink)", "#040506": "var(--first)", "#070809": "var(--second)", "#0a0b0c": "var(--faint)"}
INK, FIRST, SECOND, FAINT = _COLOURS
_STROKES = ("solid", "dashed", "dotted", "dashdot")


def scatter(candidates: Sequence[Candidate], own: str) -> str:
    """Bits per weight against perplexity."""

    def draw(axes: Any) -> None:
        for candidate in candidates:
            colour = FIRST if candidate.name == own else SECOND
            axes.scatter([candidate.bits_per_weight], [candidate.perplexity], color=colour, s=36)
            axes.annotate(
                candidate.name,
                (candidate.bits_per_weight, candidate.perplexity),
                (6, 4),
                textcoords="offset points",
                color=INK,
            )
        axes.set_xlabel("bits per weight")
        axes.set_ylabel("perplexity")
        axes.margins(0.15)

    return _svg(draw, "Size against quality", (7, 3.6))


def sorted_errors(modules: Sequence[dict[str, Any]]) -> str:
    """Errors of all modules, the largest first: how much a few of them stand out."""

    def draw(axes: Any) -> None:
        for key, label, colour in (("output_error", "output", FIRST), ("weight_error", "weight", SECOND)):
            values = sorted((module[key] for module in modules if module[key]), reverse=True)
            if values:
                axes.plot(range(1, len(values) + 1), values, color=colour, label=label, linewidth=1.6)
        axes.set_xlabel("modules, the worst first")
        axes.set_ylabel("relative error")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, labelcolor=INK)

    return _svg(draw, "Errors of the modules, sorted", (7, 3))


def sensitivity(costs: Sequence[Cost], key: str) -> str:
    """What each module costs in each scheme, the dearest first: one line for a scheme, costs on a logarithmic axis."""
    schemes = list(dict.fromkeys(cost.scheme for cost in costs))

    def draw(axes: Any) -> None:
        for number, scheme in enumerate(schemes):
            values = sorted((getattr(cost, key) or 0.0 for cost in costs if cost.scheme == scheme), reverse=True)
            places = range(1, len(values) + 1)
            axes.plot(
                places, values, color=(FIRST, SECOND)[number % 2], linestyle=_STROKES[number // 2 % len(_STROKES)],
                linewidth=1.6, label=scheme,
            )  # fmt: skip
        axes.set_xlabel("modules, the dearest first")
        axes.set_ylabel("KL, nats per token" if key == "kl" else key.replace("_", " "))
        if any(getattr(cost, key) for cost in costs):
            axes.set_yscale("log")
        axes.legend(frameon=False, labelcolor=INK, loc="center left", bbox_to_anchor=(1.0, 0.5))

    return _svg(draw, "Sensitivity of the modules", (7, 3))


def histogram(found: Histogram) -> str:
    """Counts, on a logarithmic axis so that outliers show."""

    def draw(axes: Any) -> None:
        bins = len(found.first)
        edges = [-found.limit + 2 * found.limit * number / bins for number in range(bins + 1)]
        axes.stairs(found.first, edges, color=FIRST, label="before" if found.second else None)
        if found.second:
            axes.stairs(found.second, edges, color=SECOND, label="packed")
            axes.legend(frameon=False, labelcolor=INK)
        axes.set_yscale("symlog")
        axes.set_ylim(bottom=0)

    return _svg(draw, f"{found.kind} of {found.module}", (4.4, 2.4))


def _svg(draw: Callable[[Any], None], title: str, size: tuple[float, float]) -> str:
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependency("the charts of a report", "matplotlib", "report") from None
    look = {
        "svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif", "font.size": 9,
        "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": FAINT, "xtick.color": INK, "ytick.color": INK,
        "axes.spines.top": False, "axes.spines.right": False,
    }  # fmt: skip
    with rc_context(look):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    for drawn, shown in _COLOURS.items():
        text = text.replace(drawn, shown)
    # its size is the page's business; its name is for those who do not see it
    head = f'<svg role="img" aria-label="{_escaped(title)}"'
    return re.sub(
        r'<svg ([^>]*?)(?: width="[^"]*")( [^>]*?)?>',
        rf"{head} \1\2>",
        re.sub(r' height="[^"]*pt"', "", text, count=1),
        count=1,
    )


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
