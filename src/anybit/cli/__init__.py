"""The command line: `anybit COMMAND ...`. --help and errors must be fast, so torch is imported inside commands only."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and leave with one of the documented exit codes."""
    from anybit.cli.app import run

    sys.exit(run(sys.argv[1:]))
