"""The commands that decide and make, as somebody types them: their output, their flags, and what a slip of the finger gets."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from anybit.cli.app import run
from anybit.containers import Checkpoint
from anybit.engine.recipe import FILE_NAME, read_recipe

EXAMPLES = Path(__file__).parents[1] / "examples"
TEXT = EXAMPLES / "data" / "calibration.txt"
SMALL = ["--samples", "2", "--sequence-length", "32"]


@pytest.fixture(scope="module")
def little(tmp_path_factory):
    """The example model's first layer alone, with its tokenizer."""
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "little"
    LlamaForCausalLM.from_pretrained(EXAMPLES / "tiny-llama", num_hidden_layers=1).save_pretrained(folder)
    for file in (EXAMPLES / "tiny-llama").glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def cli(capsys, monkeypatch):
    """Run a command as on a terminal of 80 columns without colours; (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")

    def call(*arguments):
        code = run([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


class TestDeciding:
    def test_sensitivity(self, cli, little, tmp_path):
        arguments = ["sensitivity", little, "--calib", TEXT, "--schemes", "gptq-3bit-g64,gptq-4bit-g64", *SMALL]
        code, out, err = cli(*arguments, "--cache", tmp_path / "costs.json", "-q")
        assert (code, err) == (0, "")
        assert re.search(r"^model\.layers\.0\.\S+ +gptq-3bit-g64 ", out, re.MULTILINE), "the dearest comes first"
        assert "and 2 less sensitive: --all" in out
        assert "0 of 14 cached" in out
        assert max(map(len, out.splitlines())) <= 80
        code, out, _ = cli(*arguments, "--cache", tmp_path / "costs.json", "--no-kl", "--json")
        found = json.loads(out)
        assert (code, found["from_cache"], len(found["costs"])) == (0, 14, 14)
        assert sum(one["kl"] for one in found["costs"] if one["scheme"] == "gptq-4bit-g64") > 0

    def test_allocate_writes_a_recipe_that_quantize_follows(self, cli, little, tmp_path):
        recipe, out = tmp_path / "r.json", tmp_path / "out"
        schemes = "gptq-2bit-g64,gptq-3bit-g64,gptq-4bit-g64"
        arguments = [
            "allocate", little, "--calib", TEXT, "--bits", "3.2", "--schemes", schemes, "--metric", "output", "-o", recipe, *SMALL
        ]  # fmt: skip
        code, shown, err = cli(*arguments, "--no-check", "-q")
        assert (code, err) == (0, "")
        assert re.search(r"^mix +\d+(\.\d+)? [kM]B +3\.\d+ ", shown, re.MULTILINE)
        assert f"anybit quantize {little} -o OUT --recipe" in " ".join(shown.split())
        assert len(read_recipe(recipe).modules) > 0
        code, _, err = cli(*arguments)
        assert code == 7
        assert "--force" in err
        code, shown, _ = cli(*arguments, "--force", "--json")
        found = json.loads(shown)
        assert (code, found["mixed"]) == (0, found["perplexity"] < found["uniform_perplexity"])
        code, _, _ = cli("quantize", little, "-o", out, "--recipe", recipe, "-q")
        assert code == 0
        assert read_recipe(out / FILE_NAME).to_dict() == read_recipe(recipe).to_dict()
        assert '"quantization": {' in (out / "README.md").read_text(encoding="utf-8"), "the model card has the recipe"

    def test_an_impossible_budget(self, cli, little, tmp_path):
        arguments = ["--schemes", "gptq-4bit-g64", "--metric", "output", "-o", tmp_path / "r.json", *SMALL]
        code, out, err = cli("allocate", little, "--calib", TEXT, "--bits", "2", *arguments)
        assert (code, out) == (3, "")
        assert "the smallest mix has" in " ".join(err.split())
        assert not (tmp_path / "r.json").exists()

    def test_recommend_for_a_quantized_model(self, cli, little, tmp_path):
        assert cli("quantize", little, "-o", tmp_path / "q", "--scheme", "awq-4bit-g64", "-q")[0] == 0
        code, out, _ = cli("recommend", tmp_path / "q", "--memory", "1GB", "--target", "vllm")
        assert code == 0
        assert re.search(r"^method +awq; it is quantized already$", out, re.MULTILINE)
        assert re.search(r"^read by +.*vllm", out, re.MULTILINE)
        assert re.search(r"^gptq-4bit-g64 +exact ", out, re.MULTILINE)
        assert "mlx" not in out


class TestMaking:
    def test_a_dry_run_says_what_it_takes_and_writes_nothing(self, cli, little, tmp_path):
        target = tmp_path / "out"
        code, out, err = cli("quantize", little, "-o", target, "--scheme", "nf4", "--dry-run")
        assert (code, err) == (0, "")
        assert re.search(r"^weights +\d.* -> \d.*", out, re.MULTILINE)
        assert not target.exists()
        target.mkdir()
        (tmp_path / "r.json").write_text('{"quantization": "nf4"}')
        code, out, _ = cli("quantize", little, "-o", target, "--recipe", tmp_path / "r.json", "--dry-run", "--json")
        assert code == 0
        assert json.loads(out)["bytes_written"] > 0
        assert list(target.iterdir()) == [], "no recipe beside what was not made"

    def test_a_cap_on_memory(self, cli, little, tmp_path):
        arguments = ["quantize", little, "--scheme", "gptq-4bit-g64", "--calib", TEXT, *SMALL]
        assert cli(*arguments, "-o", tmp_path / "out", "--max-memory", "1GB", "-q")[0] == 0
        assert (tmp_path / "out" / "config.json").is_file()
        code, _, err = cli(*arguments, "-o", tmp_path / "none", "--max-memory", "1KB")
        assert code == 3
        assert re.search(r"Allow at least \d+MiB \(--max-memory\)", " ".join(err.split()))
        code, _, err = cli(*arguments, "-o", tmp_path / "none", "--max-memory", "many")
        assert code == 3
        assert "such as '5GB'" in " ".join(err.split())
        assert not (tmp_path / "none").exists()

    def test_options_of_calibration_need_a_text(self, cli, little, tmp_path):
        for option in (["--samples", "4"], ["--seed", "0"], ["--algorithm", "gptq"], ["--algorithm-set", "mse=2.4"]):
            code, _, err = cli("quantize", little, "-o", tmp_path / "x", "--scheme", "gptq-4bit-g64", *option)
            assert code == 2
            assert f"{option[0]} says how to use calibration text" in " ".join(err.split())
        (tmp_path / "r.json").write_text('{"quantization": "gptq-4bit-g64"}')
        code, _, err = cli("quantize", little, "-o", tmp_path / "x", "--recipe", tmp_path / "r.json", "--samples", "4")
        assert code == 2
        assert "--recipe and --samples exclude each other" in " ".join(err.split())

    def test_merge(self, cli, little, tmp_path):
        peft = pytest.importorskip("peft")
        from transformers import AutoModelForCausalLM

        model = peft.get_peft_model(
            AutoModelForCausalLM.from_pretrained(little), peft.LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False)
        )  # fmt: skip
        model.save_pretrained(tmp_path / "adapter")
        assert cli("quantize", little, "-o", tmp_path / "q", "--scheme", "nf4", "-q")[0] == 0
        code, out, err = cli("merge", tmp_path / "q", tmp_path / "adapter", "-o", tmp_path / "merged")
        assert (code, err) == (0, "")
        assert re.search(r"^merged +1 modules?$", out, re.MULTILINE)
        assert re.search(r"^model\.layers\.0\.mlp\.down_proj +\d\.\d+e-\d+", out, re.MULTILINE)
        assert (
            cli("merge", tmp_path / "q", tmp_path / "adapter", "-o", tmp_path / "dense", "--dequantize", "-q")[0] == 0
        )
        with Checkpoint.open(tmp_path / "dense") as checkpoint:
            assert "model.layers.0.mlp.down_proj.weight" in checkpoint.tensors


class TestSlips:
    """The first line that an error takes says what was probably meant, and no long list follows."""

    @pytest.mark.parametrize(
        ("arguments", "meant"),
        [
            (["quantise", "MODEL"], "quantize"),
            (["quantize", "MODEL", "-o", "x", "--schem", "nf4"], "--scheme"),
            (["quantize", "MODEL", "-o", "x", "--scheme", "nf44"], "nf4"),
            (["quantize", "MODEL", "-o", "x", "--scheme", "gptq-4bit-g63"], "gptq-4bit-g64"),
            (["quantize", "MODEL", "-o", "x", "--method", "gtpq"], "gptq"),
            (["quantize", "MODEL", "-o", "x", "--method", "gptq", "--set", "bitz=4"], "bits"),
            (["quantize", "MODEL", "-o", "x", "--scheme", "nf4", "--config", "confg.json"], None),
            (["quantize", "MODEL", "-o", "x", "--recipe", "PLACE/own.jsn"], "own.json"),
            (["quantize", "MODEL", "-o", "x", "--scheme", "gptq-4bit-g64", "--calib", "PLACE/tex.txt"], "text.txt"),
            (["convert", "MODEL", "-o", "x", "--to", "awq-4bit-g65"], "awq-4bit-g64"),
            (["inspect", "MODELL"], "little"),
            (["plan", "MODEL", "--scheme", "nf44"], "nf4"),
            (["eval", "MODEL", "--text", "PLACE/tex.txt"], None),
            (["recommend", "MODEL", "--target", "vlm"], "vllm"),
            (["recommend", "MODEL", "--device", "cdua"], "cuda"),
            (["allocate", "MODEL", "--calib", "PLACE/text.txt", "--bits", "3", "--method", "gptqq"], "gptq"),
            (["sensitivity", "MODEL", "--calib", "PLACE/text.txt", "--schemes", "gptq-4bit-g46"], "gptq-4bit-g64"),
        ],
    )  # fmt: skip
    def test_the_closest_name_comes_first(self, cli, little, tmp_path, monkeypatch, arguments, meant):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "own.json").write_text('{"quantization": "nf4"}')
        (tmp_path / "text.txt").write_text("A text. " * 100)
        words = [word.replace("MODELL", f"{little}e").replace("MODEL", str(little)) for word in arguments]
        code, out, err = cli(*[word.replace("PLACE", str(tmp_path)) for word in words])
        assert code in (2, 3, 4)
        assert out == ""
        lines = err.splitlines()
        assert lines[0].startswith("error (")
        assert max((len(line) for line in lines if "/" not in line), default=0) <= 80
        said = " ".join(err.split())
        if meant is not None:
            assert re.search(rf"did you mean '\S*{re.escape(meant)}'\?", said), err
            assert said.index("did you mean") < 80 + 2 * len(str(little)), "the list comes after it"
        assert len(lines) <= 8, err

    @pytest.mark.parametrize(
        "command",
        ["methods", "inspect", "plan", "doctor", "recommend", "sensitivity", "allocate", "quantize", "dequantize", "convert",
         "merge", "run", "eval", "report", "demo"],
    )  # fmt: skip
    def test_every_help_fits_and_names_what_it_takes(self, cli, command):
        code, out, _ = cli(command, "--help")
        assert code == 0
        assert max(map(len, out.splitlines())) <= 80
        assert not re.search(r"-\w+ <(int|float|str|list)", out), (
            "a value is called N, X or NAME, not by its Python type"
        )
        assert "Exit codes: anybit --help" in out
