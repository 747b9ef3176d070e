"""From an exception to an exit code and one readable block on stderr."""

from __future__ import annotations

import errno
import shutil
import sys
import textwrap
from typing import Any

from anybit import errors

OK, UNEXPECTED, USAGE, CONFIG, CHECKPOINT, MISSING, IMPOSSIBLE, OUTPUT, INTERRUPTED = 0, 1, 2, 3, 4, 5, 6, 7, 130

EXIT_CODES = {
    OK: "done",
    UNEXPECTED: "unexpected error (--debug shows where)",
    USAGE: "wrong usage of the command line",
    CONFIG: "a configuration or option that cannot be meant",
    CHECKPOINT: "a checkpoint that is damaged, incomplete or unsafe",
    MISSING: "no kernel, package or plugin for it here",
    IMPOSSIBLE: "not representable, or calibration needed",
    OUTPUT: "output exists, cannot be written, or disk full",
    INTERRUPTED: "interrupted",
}

_CODES: tuple[tuple[type[BaseException], int], ...] = (
    (errors.ConfigError, CONFIG),
    (errors.CheckpointError, CHECKPOINT),
    (errors.NoKernel, MISSING),
    (errors.MissingDependency, MISSING),
    (errors.PluginError, MISSING),
    (errors.NotRepresentable, IMPOSSIBLE),
    (errors.CalibrationNeeded, IMPOSSIBLE),
    (FileExistsError, OUTPUT),
    (KeyboardInterrupt, INTERRUPTED),
)

_WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG}


class UsageMistake(Exception):
    """The command line itself is wrong: a name that does not exist, options that contradict each other."""


def exit_code(error: BaseException) -> int:
    """The documented exit code of an exception."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    if isinstance(error, UsageMistake) or is_usage(error):
        return USAGE
    if type(error).__name__ == "Abort":  # how typer passes on Ctrl-C
        return INTERRUPTED
    if isinstance(error, OSError) and error.errno in _WRITING:
        return OUTPUT
    return UNEXPECTED


def is_usage(error: BaseException) -> bool:
    """Whether typer found the command line wrong. Told by its protocol: typer carries click inside, or beside, by version."""
    return getattr(error, "exit_code", None) == USAGE and hasattr(error, "format_message")


def describe(error: BaseException) -> tuple[str, str]:
    """(kind, message) of an exception, for people."""
    if is_usage(error):
        message: str = error.format_message()  # type: ignore[attr-defined]
        near = getattr(error, "possibilities", None)
        if near:
            given = getattr(error, "option_name", "")
            message = f"{error.message}{errors.did_you_mean(given, near) or f'; did you mean {near[0]!r}?'}"  # type: ignore[attr-defined]
        return "usage", message
    if isinstance(error, UsageMistake):
        return "usage", str(error)
    if isinstance(error, FileExistsError):
        message = str(error) if error.filename is None else f"{error.filename} exists already"
        return "output exists", message + ("" if "--force" in message else ". Use --force to replace it, or another -o")
    if isinstance(error, OSError) and error.errno in _WRITING and not isinstance(error, errors.AnybitError):
        cure = "Free some space or write elsewhere (-o)" if error.errno == errno.ENOSPC else "Write elsewhere (-o)"
        return (
            "cannot write",
            f"{error.filename or 'the output'}: {error.strerror}. {cure}; nothing half-written is left",
        )
    if isinstance(error, errors.AnybitError):
        return type(error).__name__, str(error)
    if exit_code(error) == INTERRUPTED:
        return "interrupted", "stopped; nothing half-written is left"
    kind = type(error).__name__
    if "OutOfMemory" in kind or isinstance(error, MemoryError):
        return "out of memory", f"{error or 'not enough memory'}. `anybit plan PATH` shows what a model needs"
    return (
        "unexpected",
        f"{kind}: {error}. Run again with --debug for the traceback; please report it if it is our fault",
    )


def show(error: BaseException, command: str = "anybit") -> None:
    """Print the block: kind, message, and where to look for help with a wrong command line."""
    kind, message = describe(error)
    width = min(shutil.get_terminal_size((80, 24)).columns, 120)
    lines: list[str] = []
    for number, line in enumerate(message.splitlines() or [""]):
        start = f"error ({kind}): " if number == 0 else ""
        wrapped = textwrap.wrap(
            start + line, width, initial_indent="" if number == 0 else "  ", subsequent_indent="  ",
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
        lines += wrapped or [""]
    if kind == "usage":
        lines.append(f"  `{command} --help` shows what there is.")
    print("\n".join(lines), file=sys.stderr)


def as_dict(error: BaseException) -> dict[str, Any]:
    """What --json prints instead of a result."""
    kind, message = describe(error)
    return {"error": {"kind": kind, "message": message, "exit_code": exit_code(error)}}
