"""Results for people (plain tables that fit 80 columns) and for programs (one JSON document)."""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from anybit.engine import outlining

if TYPE_CHECKING:
    from rich.console import Console

Progress = Callable[[str, int, int], None]


class Output:
    """Where a command's results and remarks go. Results: stdout. Progress and remarks: stderr, unless `quiet`."""

    def __init__(self, as_json: bool = False, quiet: bool = False):
        self.as_json, self.quiet = as_json, quiet

    def result(self, data: Any, *lines: Any) -> None:
        """Print `data` as JSON, or the lines (text and tables) for people."""
        if self.as_json:
            print_json(data)
        else:
            self.show(*lines)

    def show(self, *lines: Any) -> None:
        """Print text and tables, unless JSON is wanted."""
        if self.as_json:
            return
        console = stdout()
        with console.capture() as captured:
            for line in lines:
                free = isinstance(line, str) and not console.is_terminal
                console.print(line, markup=False, highlight=False, soft_wrap=free)
        # a table fills its last column with blanks, which only disturb where the text is piped or compared
        text = captured.get()
        sys.stdout.write(text if console.is_terminal else re.sub(r"[ ]+$", "", text, flags=re.MULTILINE))

    def remark(self, text: str) -> None:
        """A line on stderr."""
        if not self.quiet:
            print(text, file=sys.stderr)

    @contextlib.contextmanager
    def progress(self, what: str) -> Iterator[Progress]:
        """A callback (label, done, total) that draws a bar with time left and peak memory, on a terminal only."""
        if self.quiet or not sys.stderr.isatty():
            yield lambda label, done, total: None
            return
        from anybit.cli.progress import bar

        with bar(what) as report:
            yield report


def stdout() -> Console:
    from rich.console import Console

    return Console(file=sys.stdout, highlight=False)


def print_json(data: Any) -> None:
    """One JSON document. Numbers that JSON cannot hold (inf, NaN) become null."""
    print(json.dumps(_finite(data), indent=2, allow_nan=False, default=str))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _finite(inside) for key, inside in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inside) for inside in value]
    return value


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Any:
    """A table without frames. A column whose heading begins with ">" is aligned right and never wrapped."""
    from rich.table import Table
    from rich.text import Text

    lines = [["" if cell is None else str(cell) for cell in row] for row in rows]
    cells = [[column.lstrip(">") for column in columns], *lines]
    natural = sum(max(map(len, column)) for column in zip(*cells)) + 2 * (len(columns) - 1)
    gap = 2 if natural <= stdout().width else 1
    made = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold")
    for place, column in enumerate(columns):
        right = column.startswith(">")
        # short cells stay whole; names, too, while they leave room for the rest of the line
        widest = max((len(line[place]) for line in lines), default=0)
        whole = right or widest <= (46 if place == 0 and natural <= stdout().width else 12)
        made.add_column(column.lstrip(">"), justify="right" if right else "left", no_wrap=whole, overflow="fold")
    for line in lines:
        made.add_row(*map(Text, line))
    return made


def pairs(rows: Iterable[tuple[str, Any]]) -> Any:
    """Two columns: a name, and what it is."""
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    made.add_column(no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in rows:
        if value is not None and value != "":
            made.add_row(Text(name), Text(str(value)))
    return made


def size(count: float | None) -> str:
    """Bytes in decimal units, three digits: "13.6 MB"; "-" for None."""
    return "-" if count is None else outlining.size(count)


def number(value: float | None, digits: int = 3) -> str:
    """A fixed number of decimals; "-" for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def percent(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def duration(seconds: float) -> str:
    """ "8.2 s", "3 min 20 s"."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def shape(values: Iterable[int]) -> str:
    return "x".join(map(str, values))
