"""A progress bar on stderr: how far, how long still, and the largest memory so far."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from anybit._memory import peak_resident_bytes
from anybit.cli.report import Progress, size


def peak_memory() -> int | None:
    """Largest resident memory of this process so far, in bytes; None where the system does not say."""
    return peak_resident_bytes() or None


@contextlib.contextmanager
def bar(what: str) -> Iterator[Progress]:
    """A callback (label, done, total); a new total, or a step back, starts the bar again for the next phase."""
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TaskProgressColumn(),
        TextColumn("left"),
        TimeRemainingColumn(compact=True),
        TextColumn("peak {task.fields[peak]}"),
    )
    with Bar(*columns, console=Console(file=sys.stderr), transient=True) as drawn:
        task = drawn.add_task(what, total=None, peak=size(peak_memory()))
        last = (0, 0)

        def report(label: str, done: int, total: int) -> None:
            nonlocal last
            if total != last[1] or done < last[0]:
                drawn.reset(task, total=total)
            last = (done, total)
            shown = label if len(label) <= 32 else "..." + label[-29:]
            drawn.update(task, completed=done, description=f"{what}: {shown}", peak=size(peak_memory()))

        yield report
