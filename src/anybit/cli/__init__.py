"""The command line: `anybit COMMAND ...`. --help and errors must be fast, so torch is imported inside commands only."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line and leave with one of the documented exit codes."""
    # Idle threads sleep instead of spinning. On a machine that is busy with something else, small models are eight times
    # faster so (measured with two threads on two cores under load); it must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from anybit.cli.app import run

    sys.exit(run(sys.argv[1:]))
