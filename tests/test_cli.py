"""The command line: what it prints where, its exit codes, and how fast it answers."""

from __future__ import annotations

import errno
import json
import os
import pty
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from anybit import errors
from anybit.cli import errors as codes
from anybit.cli.app import run
from anybit.cli.report import Output, duration, size
from anybit.cli.schemes import methods, parse_setting, schemes
from anybit.engine.outlining import _ranged

EXAMPLES = Path(__file__).parents[1] / "examples"
MODEL = str(EXAMPLES / "tiny-llama")
TEXT = str(EXAMPLES / "data" / "evaluation.txt")


@pytest.fixture
def cli(capsys):
    """Run a command line here: (exit code, stdout, stderr)."""

    def call(*arguments):
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The example model in NF4, written by the command line."""
    folder = tmp_path_factory.mktemp("cli") / "nf4"
    assert run(["quantize", MODEL, "-o", str(folder), "--scheme", "nf4", "--quiet"]) == 0
    return folder


def process(*arguments, **options):
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "anybit", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


class TestResults:
    def test_quantize_says_what_was_written(self, cli, tmp_path):
        code, out, err = cli("quantize", MODEL, "-o", tmp_path / "q", "--scheme", "gptq-4bit-g64")
        assert code == 0
        assert err == ""
        written = sum(file.stat().st_size for file in (tmp_path / "q").glob("*.safetensors"))
        assert f"-> {size(written)}" in out
        assert "gptq" in out
        config = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
        assert (config["quant_method"], config["bits"], config["group_size"]) == ("gptq", 4, 64)
        assert (tmp_path / "q" / "tokenizer_config.json").is_file()

    def test_method_with_settings(self, cli, tmp_path):
        code, out, _ = cli(
            "quantize", MODEL, "-o", tmp_path / "q", "--method", "gptq", "--set", "bits=3", "--set", "group_size=32",
            "--json",
        )  # fmt: skip
        assert code == 0
        data = json.loads(out)
        assert data["method"] == "gptq"
        assert data["bytes_written"] < 0.6 * data["bytes_read"]
        assert data["peak_memory_bytes"] > data["bytes_read"]
        config = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
        assert (config["bits"], config["group_size"]) == (3, 32)

    def test_config_file(self, cli, tmp_path):
        file = tmp_path / "wanted.json"
        file.write_text('{"quant_method": "gptq", "bits": 8, "group_size": 128, "colour": 3}')
        code, _, err = cli("quantize", MODEL, "-o", tmp_path / "q", "--config", file, "--set", "group_size=64")
        assert code == 0
        assert "warning" in err
        assert "no option 'colour'" in err
        config = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
        assert (config["bits"], config["group_size"]) == (8, 64)

    def test_dequantize(self, cli, packed, tmp_path):
        code, out, _ = cli("dequantize", packed, "-o", tmp_path / "dense", "--json")
        assert code == 0
        assert json.loads(out)["output"] == str(tmp_path / "dense")
        assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
        code, out, _ = cli("inspect", tmp_path / "dense", "--json")
        assert code == 0
        assert json.loads(out)["method"] is None

    def test_inspect(self, cli, packed):
        code, out, _ = cli("inspect", packed)
        assert code == 0
        assert re.search(r"method +bitsandbytes", out)
        assert re.search(r"model\.layers\.\{0-5\}\.mlp\.up_proj +Bnb4Bit +4\.5", out)
        assert "no problems found" in out
        data = json.loads(cli("inspect", packed, "--json")[1])
        assert data["method"] == "bitsandbytes"
        assert data["problems"] == []
        assert "weight uint8" in cli("inspect", packed, "--tensors")[1]

    def test_inspect_shows_problems_and_says_so(self, cli, packed, tmp_path):
        broken = tmp_path / "broken"
        broken.mkdir()
        for file in packed.iterdir():
            content = file.read_bytes()
            (broken / file.name).write_bytes(content[:-100] if file.suffix == ".safetensors" else content)
        code, out, _ = cli("inspect", broken)
        assert code == codes.CHECKPOINT
        assert "problem: " in out
        assert "model.safetensors" in out

    def test_plan(self, cli, packed):
        code, out, _ = cli("plan", packed)
        assert code == 0
        assert re.search(r"self_attn\.q_proj +Bnb4Bit +256x256 +4\.5\d +[\d.]+ kB +\w", out)
        assert re.search(r"in memory +6\.\d+ MB", out)
        single = cli("plan", packed, "--all")[1]
        assert "model.layers.5.self_attn.q_proj" in single
        data = json.loads(cli("plan", MODEL, "--scheme", "nf4", "--json")[1])
        assert {module["action"] for module in data["modules"]} == {"quantize", "dense"}

    def test_eval(self, cli, packed):
        words = ("--text", TEXT, "--max-tokens", "300", "--context", "128")
        code, out, _ = cli("eval", packed, *words, "--reference", MODEL, "--per-module", "--json")
        assert code == 0
        data = json.loads(out)
        assert data["tokens"] == 300
        assert 0 < data["kl"] < 0.1
        assert 0.8 < data["top1"] < 1
        assert len(data["modules"]) == 42
        code, out, err = cli("eval", packed, *words, "--reference", MODEL)
        assert code == 0
        assert "KL(reference || model)" in out
        assert "300 tokens scored, 3 windows of 128 positions" in " ".join(out.split())
        assert "peak memory" in err
        now = json.loads(cli("eval", MODEL, *words, "--scheme", "nf4", "--json", "--quiet")[1])
        assert now["perplexity"] == pytest.approx(data["perplexity"], rel=1e-6)

    def test_eval_of_a_text_itself(self, cli):
        code, out, _ = cli("eval", MODEL, "--text", "The history of the city begins with a king.", "--json")
        assert code == 0
        assert json.loads(out)["windows"] == 1

    @pytest.mark.parametrize("command", ["methods", "--help", "inspect", "plan", "doctor"])
    def test_tables_fit_80_columns(self, cli, packed, command):
        """Lines that are no table may be longer: paths and reasons are kept whole where they can be copied."""
        code, out, _ = cli(command, *([packed] if command in ("inspect", "plan") else []))
        assert code == 0
        assert "\x1b" not in out
        lines = [line for line in out.splitlines() if not re.match(r"\[\d+\]|.*/", line)]
        assert max(map(len, lines)) <= 80
        assert not any(line.endswith(" ") for line in lines)

    def test_run(self, cli, packed):
        arguments = ("run", packed, "-p", "The city was", "-n", "8", "--greedy")
        code, out, err = cli(*arguments)
        assert code == 0
        assert out.startswith("The city was ")
        assert "8 tokens in" in err
        assert "tokens/s" in err
        code, again, err = cli(*arguments, "--json", "--quiet")
        assert err == ""
        data = json.loads(again)
        assert data["text"] == out.rstrip("\n")
        assert (data["tokens"], data["prompt"]) == (8, "The city was")
        assert data["memory_bytes"] < 7_000_000

    def test_a_seed_repeats_a_sample(self, cli, packed):
        arguments = ("run", packed, "-p", "The", "-n", "6", "--temperature", "1.5", "--quiet", "--json", "--seed")
        texts = [json.loads(cli(*arguments, seed)[1])["text"] for seed in (1, 1, 2)]
        assert texts[0] == texts[1] != texts[2]

    def test_methods(self, cli):
        code, out, _ = cli("methods")
        assert code == 0
        assert re.search(r"^gptq +yes +yes", out, re.MULTILINE)
        data = json.loads(cli("methods", "--json")[1])
        assert {"gptq", "bitsandbytes_4bit"} <= {info["name"] for info in data["methods"]}
        assert data["schemes"]["nf4"]["options"]["bnb_4bit_quant_type"] == "nf4"

    def test_doctor(self, cli):
        import torch

        code, out, _ = cli("doctor")
        assert code == 0
        assert re.search(rf"torch +{re.escape(torch.__version__)}", out)
        assert "reference" in out
        data = json.loads(cli("doctor", "--json")[1])
        assert data["versions"]["torch"] == torch.__version__
        assert any(kernel["name"] == "reference" and kernel["unavailable"] is None for kernel in data["kernels"])
        assert all("pip install 'anybit[" in item["install"] for item in data["missing"])
        assert data["encoders"]["cpu"].startswith(("native, ", "torch: "))


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (["quantise", "x"], 2, "no command 'quantise'; did you mean 'quantize'?"),
            (["inspect", "--jsn", "x"], 2, "did you mean '--json'?"),
            (["quantize", MODEL, "-o", "x"], 2, "say how to quantize: --scheme"),
            (["quantize", MODEL, "-o", "x", "--scheme", "nf4", "--method", "gptq"], 2, "--scheme and --method exclude"),
            (["quantize", MODEL, "-o", "x", "--method", "gptq", "--set", "bits"], 2, "--set 'bits' is not NAME=VALUE"),
            (["quantize", MODEL, "-o", "x", "--set", "bits=4"], 2, "name one of them"),
            (["quantize", MODEL, "-o", "x", "--config", "none.json"], 2, "there is no such file"),
            (["run", MODEL, "-p", "x", "--greedy", "--temperature", "1"], 2, "exclude each other"),
            (["run", MODEL, "-p", "x", "-n", "many"], 2, "/ '-n'"),
            (["run", MODEL], 2, "--prompt"),
            (["quantize", MODEL, "-o", "x", "--scheme", "nf5"], 3, "no scheme 'nf5'; did you mean 'nf4'?"),
            (["quantize", MODEL, "-o", "x", "--method", "gptqq"], 3, "did you mean 'gptq'?"),
            (["quantize", MODEL, "-o", "x", "--method", "gptq"], 3, "bits"),
            (
                ["quantize", MODEL, "-o", "x", "--method", "gptq", "--set", "bits=4", "--set", "group_sise=4"],
                3,
                "group_size",
            ),
            (["quantize", MODEL, "-o", "x", "--method", "gptq", "--set", "bits=17"], 3, "17"),
            (["eval", MODEL, "--text", "a"], 3, "too short to evaluate on"),
            (["eval", MODEL, "--text", TEXT, "--per-module"], 3, "reference"),
            (["dequantize", MODEL, "-o", "x"], 3, "not quantized"),
            (["plan", MODEL, "--device", "gpu9"], 3, "'gpu9' is no device"),
            (["inspect", "./nowhere"], 4, "'./nowhere' is neither a folder or file here nor a hub id"),
            (["run", "./nowhere", "-p", "x"], 4, "./nowhere"),
            (["quantize", MODEL, "-o", "x", "--method", "spqr"], 6, "calibration"),
        ],
    )
    def test_one_block_and_its_exit_code(self, cli, tmp_path, monkeypatch, arguments, code, message):
        monkeypatch.chdir(tmp_path)
        found, out, err = cli(*arguments)
        assert found == code, err
        assert out == ""
        assert message in " ".join(err.split())
        assert err.startswith("error (")
        assert "Traceback" not in err
        assert list(tmp_path.iterdir()) == []

    def test_an_existing_output_needs_force(self, cli, tmp_path):
        target = tmp_path / "there"
        target.mkdir()
        (target / "config.json").write_text('{"old": true}')
        arguments = ("quantize", MODEL, "-o", target, "--scheme", "nf4")
        code, _, err = cli(*arguments)
        assert code == codes.OUTPUT
        assert "--force" in err
        assert (target / "config.json").read_text() == '{"old": true}'
        assert cli(*arguments, "--force")[0] == 0
        assert (target / "model.safetensors").is_file()

    def test_force_does_not_delete_what_is_no_model(self, cli, tmp_path):
        (tmp_path / "precious").write_text("mine")
        code, _, err = cli("quantize", MODEL, "-o", tmp_path, "--scheme", "nf4", "--force")
        assert code == codes.OUTPUT
        assert "precious" in err
        assert (tmp_path / "precious").read_text() == "mine"

    def test_a_damaged_checkpoint(self, cli, packed, tmp_path):
        for file in packed.iterdir():
            content = file.read_bytes()
            (tmp_path / file.name).write_bytes(content[:5000] if file.suffix == ".safetensors" else content)
        code, out, err = cli("run", tmp_path, "-p", "x")
        assert code == codes.CHECKPOINT
        assert out == ""
        assert "model.safetensors" in err

    def test_json_of_an_error(self, cli):
        code, out, err = cli("quantize", MODEL, "-o", "x", "--scheme", "nf5", "--json")
        assert code == 3
        assert err.startswith("error (InvalidOption)")
        data = json.loads(out)["error"]
        assert data["exit_code"] == 3
        assert data["kind"] == "InvalidOption"
        assert "nf5" in data["message"]

    def test_debug_shows_the_traceback(self, cli):
        code, _, err = cli("inspect", "./nowhere", "--debug")
        assert code == 4
        assert "Traceback (most recent call last)" in err

    @pytest.mark.parametrize(
        ("error", "code"),
        [
            (errors.UnexpectedTensor("x"), 4),
            (errors.NoKernel("x"), 5),
            (errors.MissingDependency("reading x", "gguf", "gguf"), 5),
            (errors.PluginError("x"), 5),
            (errors.NotRepresentable("x"), 6),
            (errors.CalibrationNeeded("x"), 6),
            (OSError(errno.ENOSPC, "No space left on device", "/data/out"), 7),
            (PermissionError(errno.EACCES, "Permission denied", "/data/out"), 7),
            (KeyboardInterrupt(), 130),
            (RuntimeError("x"), 1),
            (MemoryError(), 1),
        ],
    )
    def test_exit_codes_of_exceptions(self, error, code, capsys):
        assert codes.exit_code(error) == code
        codes.show(error)
        assert "error (" in capsys.readouterr().err

    def test_a_full_disk_says_what_to_do(self, capsys):
        codes.show(OSError(errno.ENOSPC, "No space left on device", "/data/out"))
        assert "/data/out: No space left on device. Free some space" in capsys.readouterr().err

    def test_every_exit_code_is_in_the_help_and_the_documents(self, cli):
        code, out, _ = cli("--help")
        assert code == 0
        for number, meaning in codes.EXIT_CODES.items():
            assert re.search(rf"^ +{number}  {re.escape(meaning)}$", out, re.MULTILINE)
            documented = (EXAMPLES.parent / "docs" / "cli.md").read_text(encoding="utf-8").replace("`", "")
            assert f"| {number} | {meaning}" in documented


class TestSchemes:
    def test_they_come_from_the_configuration_classes(self):
        known = schemes()
        assert {"nf4", "nf4-dq", "fp4", "int8", "gptq-4bit-g128", "awq-4bit-g128"} <= set(known)
        for cls, options in known.values():
            config = cls(**options)
            assert config.quant_method

    def test_a_name_offered_twice_is_refused(self, monkeypatch):
        one, two = list({cls for cls, _ in schemes().values()})[:2]
        monkeypatch.setattr(one, "schemes", {"same": {}})
        monkeypatch.setattr(two, "schemes", {"same": {}})
        with pytest.raises(errors.ConfigError, match="'same' is offered by both"):
            schemes()

    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("a=4", 4), ("a=0.5", 0.5), ("a=true", True), ("a=False", False), ("a=null", None), ("a=nf4", "nf4"),
            ("a=[1, 2]", [1, 2]), ('a="4"', "4"), ("a=", ""), ("a=b=c", "b=c"),
        ],
    )  # fmt: skip
    def test_values(self, text, value):
        assert parse_setting(text) == ("a", value)

    def test_methods_are_quant_methods(self):
        assert {"gptq", "awq", "bitsandbytes"} <= set(methods())
        assert "bitsandbytes_4bit" not in methods()


class TestProcess:
    """In a process of its own: start-up time, imports, streams, terminals, signals."""

    @pytest.mark.parametrize(
        "arguments", [["--help"], ["quantize", "--help"], ["methods"], ["inspect", MODEL, "--tensors"], ["run"]]
    )
    def test_fast_and_without_torch(self, arguments):
        code = (
            "import sys; from anybit.cli.app import run; run(sys.argv[1:]); "
            "sys.exit(f'imported: {found}' if (found := {'torch', 'transformers'} & set(sys.modules)) else 0)"
        )
        seconds = []  # of the processor, not of the clock: a busy machine must not decide
        while len(seconds) < 3 and min(seconds, default=1) >= 1:
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
            assert done.returncode == 0, done.stderr
        assert min(seconds) < 1

    def test_version(self):
        done = process("--version")
        assert (done.returncode, done.stderr) == (0, "")
        assert re.fullmatch(r"anybit \d+\.\d+\.\S+\n", done.stdout)

    def test_no_arguments_show_the_help(self):
        done = process()
        assert done.returncode == 0
        assert "Usage: anybit" in done.stdout

    def test_piped_output_is_plain(self):
        done = process("methods")
        assert done.returncode == 0, done.stderr
        assert "\x1b" not in done.stdout
        assert done.stdout.isascii()

    def test_json_alone_is_on_stdout(self, tmp_path):
        done = process("quantize", MODEL, "-o", tmp_path / "q", "--scheme", "int8", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["method"] == "bitsandbytes"

    def test_a_terminal_gets_progress_with_memory(self, tmp_path):
        code, shown = terminal("quantize", MODEL, "-o", str(tmp_path / "q"), "--scheme", "nf4")
        assert code == 0
        assert "quantize" in shown
        assert re.search(r"peak \d+ MB", shown)
        assert "written" in shown

    def test_a_terminal_gets_errors_in_one_block(self):
        code, shown = terminal("inspect", "./nowhere")
        assert code == 4
        assert shown.startswith("error (CheckpointError): './nowhere'")

    def test_interrupt(self):
        command = [sys.executable, "-m", "anybit", "run", MODEL, "-p", "The city", "-n", "100000", "--greedy"]
        # a run in the background of a script hands down that interrupts are ignored
        running = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        try:
            running.stdout.read(20)  # words are coming
            running.send_signal(signal.SIGINT)
            _, err = running.communicate(timeout=30)
        finally:
            running.kill()
        assert running.returncode == 130
        assert b"error (interrupted)" in err
        assert b"Traceback" not in err

    def test_a_closed_pipe_is_no_error_message(self):
        reading, writing = os.pipe()
        os.close(reading)
        done = subprocess.run(
            [sys.executable, "-m", "anybit", "methods"], stdout=writing, stderr=subprocess.PIPE, timeout=60
        )
        os.close(writing)
        assert b"Traceback" not in done.stderr
        assert b"unexpected" not in done.stderr

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            ("anybit quan", "quantize"),
            ("anybit quantize x --scheme gptq-4bit-g1", "gptq-4bit-g128"),
            ("anybit quantize x --method bitsand", "bitsandbytes"),
            ("anybit plan x --dtype bf", "bfloat16"),
        ],
    )
    def test_shell_completion(self, words, expected):
        count = len(words.split()) - 1
        environment = {**os.environ, "_ANYBIT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(count)}
        done = process(env=environment)
        assert done.returncode == 0
        assert done.stdout.split() == [expected]


def terminal(*arguments):
    """Run the command line under a pseudo terminal: (exit code, everything it showed)."""
    main, second = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    running = subprocess.Popen(
        [sys.executable, "-m", "anybit", *arguments], stdin=second, stdout=second, stderr=second, env=environment
    )
    os.close(second)
    shown = b""
    while True:
        try:
            piece = os.read(main, 4096)
        except OSError:  # the other end is gone
            break
        if not piece:
            break
        shown += piece
    os.close(main)
    return running.wait(timeout=60), shown.decode().replace("\r\n", "\n")


class TestReport:
    @pytest.mark.parametrize(
        ("count", "text"),
        [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.00 kB"),
            (13_644_312, "13.6 MB"),
            (999_600, "1.00 MB"),
            (7.3e11, "730 GB"),
            (None, "-"),
        ],
    )
    def test_sizes(self, count, text):
        assert size(count) == text

    def test_quiet_draws_no_bar_even_on_a_terminal(self, monkeypatch, capsys):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        for quiet in (True, False):
            with Output(quiet=quiet).progress("work") as report:
                report("module", 1, 2)
            assert (capsys.readouterr().err == "") == quiet

    def test_durations(self):
        assert [duration(seconds) for seconds in (0.04, 8.24, 200, 4000)] == [
            "0.0 s",
            "8.2 s",
            "3 min 20 s",
            "1 h 6 min",
        ]

    def test_ranges_of_names(self):
        assert _ranged(["a.0.b", "a.1.b", "a.2.b", "a.5.b"]) == "a.{0-2,5}.b"
        assert _ranged(["lm_head"]) == "lm_head"
        assert _ranged(["a.0.e.0", "a.0.e.1", "a.1.e.0", "a.1.e.1"]) == "a.{0-1}.e.{0-1}"
