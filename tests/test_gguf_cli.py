"""GGUF files from the command line: importance matrices, parts, the other order of bytes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from anybit.cli.app import run
from anybit.containers import Checkpoint

EXAMPLES = Path(__file__).parents[1] / "examples"
TEXT = EXAMPLES / "data" / "calibration.txt"


@pytest.fixture(scope="module")
def little(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example model's first layer alone, with its tokenizer."""
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "little"
    LlamaForCausalLM.from_pretrained(EXAMPLES / "tiny-llama", num_hidden_layers=1).save_pretrained(folder)
    for file in (EXAMPLES / "tiny-llama").glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def cli(capsys: Any, monkeypatch: Any) -> Any:
    monkeypatch.setenv("COLUMNS", "80")

    def call(*arguments: Any) -> tuple[int, str, str]:
        code = run([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_an_importance_matrix_is_made_and_used(cli: Any, little: Path, tmp_path: Path) -> None:
    file = tmp_path / "im.gguf"
    arguments = ["imatrix", little, "--calib", TEXT, "-o", file, "--samples", 2, "--sequence-length", 32]
    code, out, err = cli(*arguments, "-q")
    assert (code, err) == (0, "")
    assert re.search(r"^written.*im\.gguf", "".join(out.split()))  # a long path is folded
    with Checkpoint.open(file) as matrix:
        assert matrix.values["imatrix.chunk_count"] == 2
        assert matrix.tensors["blk.0.ffn_down.weight.in_sum2"].shape == (1, 768)
    code, _, err = cli(*arguments, "-q")
    assert code == 7, err
    assert "--force" in err
    code, out, _ = cli(*arguments, "--force", "--json")
    assert (code, json.loads(out)["output"]) == (0, str(file))
    code, _, err = cli("imatrix", little, "--calib", TEXT, "-o", tmp_path / "im.dat", "-q")
    assert (code, "named *.gguf" in " ".join(err.split())) == (3, True)
    code, _, err = cli("quantize", little, "-o", tmp_path / "bare", "--scheme", "gguf-q2_k_s", "-q")
    assert (code, "--calib" in err) == (6, True)
    chosen = ["--scheme", "gguf-q2_k_s", "--set", f"imatrix={file}", "-q"]
    code, _, err = cli("quantize", little, "-o", tmp_path / "out", *chosen)
    assert (code, err) == (0, "")


def test_parts_and_the_other_order_of_bytes(cli: Any, little: Path, tmp_path: Path) -> None:
    chosen = ["--scheme", "gguf-q8_0", "-q"]
    for name, more in (("one", []), ("parts", ["--max-shard-size", "600KB"]), ("big", ["--set", "big_endian=true"])):
        code, _, err = cli("quantize", little, "-o", tmp_path / name, *chosen, *more)
        assert (code, err) == (0, "")
    parts = sorted(file.name for file in (tmp_path / "parts").iterdir())
    assert len(parts) > 2
    assert parts[0].endswith(f"-Q8_0-00001-of-{len(parts):05}.gguf")
    assert next((tmp_path / "big").iterdir()).read_bytes()[4:8] == b"\0\0\0\3"
    texts = []
    split = tmp_path / "parts"
    for path in (tmp_path / "one", split, split / parts[0], split / parts[1], tmp_path / "big"):
        code, out, err = cli("run", path, "-p", "The old man", "--max-new-tokens", 4, "--greedy", "-q")
        assert code == 0, err
        texts.append(out)
    assert len(set(texts)) == 1
    code, _, err = cli("quantize", little, "-o", tmp_path / "odd", *chosen, "--set", "big_endian=yes")
    assert (code, "big_endian" in err) == (3, True)
