"""`python -m anybit` is `anybit`."""

from anybit.cli import main

if __name__ == "__main__":
    main()
