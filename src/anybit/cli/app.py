"""The commands put together, and the one place where exceptions become exit codes."""

from __future__ import annotations

import contextlib
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from anybit.cli import advising, demo, importance, looking, making, reporting, rotating, running
from anybit.cli.errors import EXIT_CODES, INTERRUPTED, OK, UNEXPECTED, UsageMistake, as_dict, exit_code, show
from anybit.cli.report import print_json
from anybit.errors import did_you_mean

EPILOG = "\b\nExit codes:\n" + "\n".join(f"{code:>5}  {meaning}" for code, meaning in EXIT_CODES.items())


class Commands(TyperGroup):
    """The group of commands; an unknown one names the closest."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        found = super().get_command(ctx, cmd_name)
        if found is None and not ctx.resilient_parsing:
            names = self.list_commands(ctx)
            raise UsageMistake(
                f"no command {cmd_name!r}{did_you_mean(cmd_name, names) or '.'} Commands: {', '.join(names)}"
            )
        return found


# Plain help: boxes and colours would end up in pipes and pagers.
app = typer.Typer(
    name="anybit",
    cls=Commands,
    help="Load, run, create, compare and inspect quantized checkpoints of the Hugging Face ecosystem, on any device.",
    epilog=EPILOG,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from anybit import __version__

        typer.echo(f"anybit {__version__}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


for commands in (
    looking.COMMANDS,
    advising.COMMANDS,
    making.COMMANDS,
    importance.COMMANDS,
    rotating.COMMANDS,
    running.COMMANDS,
    reporting.COMMANDS,
    demo.COMMANDS,
):
    for command in commands:
        app.command(command.__name__.rstrip("_"), epilog="Exit codes: anybit --help")(command)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; errors are printed, never raised."""
    try:
        with _short_warnings():
            code = typer.main.get_command(app).main(list(arguments), prog_name="anybit", standalone_mode=False)
        if code == INTERRUPTED:  # newer typers return it instead of raising
            raise KeyboardInterrupt
        return code if isinstance(code, int) else OK
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else UNEXPECTED
    except BaseException as error:
        if "--debug" in arguments:
            traceback.print_exc()
        if "--json" in arguments:
            print_json(as_dict(error))
        command = next((word for word in arguments if not word.startswith("-")), None)
        known = {info.name for info in app.registered_commands}
        show(error, f"anybit {command}" if command in known else "anybit")
        return exit_code(error)


@contextlib.contextmanager
def _short_warnings() -> Iterator[None]:
    """Warnings as one line on stderr, without the source line that raised them."""

    def line(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        print(f"warning: {message}", file=sys.stderr)

    before, warnings.showwarning = warnings.showwarning, line
    try:
        yield
    finally:
        warnings.showwarning = before
