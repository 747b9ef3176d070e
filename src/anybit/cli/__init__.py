"""The command line: `anybit COMMAND ...`. --help and errors must be fast, so torch is imported inside commands only."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line and leave with one of the documented exit codes."""
    # OpenMP threads (GNU, as in torch's wheels) wait for work in a busy loop, 300,000 rounds long by default. Where other
    # programs want the same cores that made a small model ten times slower; with 10,000 rounds it was two times slower, and
    # as fast as ever on an idle machine (two threads on two cores, 4,080 tokens of examples/tiny-llama). Before torch loads.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    from anybit.cli.app import run

    sys.exit(run(sys.argv[1:]))
