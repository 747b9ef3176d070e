"""`anybit demo` measures what it prints, leaves loadable checkpoints behind, and says what it needs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from anybit.cli import demo
from anybit.cli.app import run
from anybit.engine.evaluate import evaluate

EXAMPLES = Path(__file__).parents[1] / "examples"
MODEL = EXAMPLES / "tiny-llama"
TEXT = EXAMPLES / "data" / "evaluation.txt"


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """The demo on a short text: (folder, stdout, stderr)."""
    import contextlib
    import io

    folder = tmp_path_factory.mktemp("demo")
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert run(["demo", "--tokens", "510", "--output", str(folder)]) == 0
    return folder, out.getvalue(), err.getvalue()


def rows_of(text):
    """The table's lines, by method."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("method "))
    return {line.split()[0]: line.split() for line in lines[start + 1 : start + 6]}


def test_one_table_with_every_method(shown):
    _, out, _ = shown
    rows = rows_of(out)
    assert list(rows) == ["bfloat16", *demo.SCHEMES]
    bits = {name: float(row[1]) for name, row in rows.items()}
    assert bits["bfloat16"] == 16
    assert 8 < bits["int8"] < 8.2
    assert all(4.1 < bits[name] < 4.6 for name in ("nf4", "gptq-4bit-g128", "awq-4bit-g128"))


def test_the_numbers_are_those_of_the_checkpoints_it_wrote(shown):
    folder, out, _ = shown
    rows = rows_of(out)
    for name in ("nf4", "gptq-4bit-g128"):
        found = evaluate(folder / name, TEXT, reference=MODEL, context=256, max_tokens=510, batch_size=4)
        assert f"{found.perplexity:.2f}" in rows[name]
        assert f"{100 * found.top1:.1f}" in rows[name]
        assert f"{found.kl:.4f}" in rows[name]
        assert f"{found.reference_perplexity:.2f}" in rows["bfloat16"]
        stored = (folder / name / "model.safetensors").stat().st_size
        assert f"{stored / 1e6:#.3g}" in rows[name]


def test_what_it_says_besides(shown):
    folder, out, err = shown
    assert "510 tokens scored, 2 windows of 256 positions, stride 255" in " ".join(out.split())
    assert demo.PROMPT in " ".join(out.split("nf4 writes")[1].split())
    assert str(folder) in out
    for command in ("run", "inspect", "plan", "eval", "quantize"):
        assert f"  anybit {command} " in out
    prose = [line for line in out.splitlines() if "anybit " not in line and str(folder) not in line]
    assert max(map(len, prose)) <= 80
    assert "quantized to nf4" in err
    assert "\x1b" not in out + err


def test_what_to_try_next_works(shown, capsys):
    _, out, _ = shown
    lines = [line.strip() for line in out.splitlines() if re.match(r"  anybit (inspect|plan) ", line)]
    assert len(lines) == 2
    for line in lines:
        assert run(line.split()[1:]) == 0
        assert "model.layers.{0-5}.mlp.up_proj" in capsys.readouterr().out


def test_another_model_and_json(tmp_path, capsys):
    words = tmp_path / "words.txt"
    words.write_text("The king was in the city, and the people of the city were with the king. " * 8)
    arguments = ["demo", "--model", MODEL, "--text", words, "--output", tmp_path / "out", "--tokens", "100", "--json"]
    assert run([str(argument) for argument in arguments]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in data["rows"]] == ["bfloat16", *demo.SCHEMES]
    assert data["rows"][0]["kl"] is None
    assert all(row["kl"] > 0 and row["tokens_per_second"] > 0 for row in data["rows"][1:])
    assert data["sample"]["scheme"] == "nf4"
    assert data["sample"]["tokens"] > 0


class TestWithoutSources:
    def test_it_says_where_the_model_is(self, monkeypatch, tmp_path, capsys):
        monkeypatch.setattr(demo, "__file__", str(tmp_path / "site-packages" / "anybit" / "cli" / "demo.py"))
        assert run(["demo"]) == 2
        err = " ".join(capsys.readouterr().err.split())
        assert "come with the source code, not with the installed package" in err
        assert "--model PATH" in err

    def test_a_given_path_is_only_named(self, tmp_path, capsys):
        assert run(["demo", "--model", str(tmp_path / "none")]) == 2
        assert "none does not exist" in " ".join(capsys.readouterr().err.split())
