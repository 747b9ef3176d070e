"""A few hundred damaged GGUF files, the same ones every time; `fuzz_gguf.py` goes on from there."""

from __future__ import annotations

import itertools
from pathlib import Path

import fuzz_gguf


def test_damaged_files_open_or_are_refused(tmp_path: Path) -> None:
    wrong = [what for _, what in itertools.islice(fuzz_gguf.fuzz(20, tmp_path), 250) if what]
    assert not wrong, wrong[0]


def test_the_fuzzer_notices(tmp_path: Path) -> None:
    def broken(file: Path) -> None:
        raise IndexError(file.name)

    original, fuzz_gguf.run = fuzz_gguf.run, broken
    try:
        assert fuzz_gguf.main(["--seconds", "0.1", "--keep", str(tmp_path / "kept")]) == 1
    finally:
        fuzz_gguf.run = original
    assert list((tmp_path / "kept").glob("*.gguf"))
