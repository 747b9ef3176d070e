"""`python -m anybit.cli` is `anybit`."""

from anybit.cli import main

main()
