"""`anybit recommend`: predictions against what is then made and measured, wishes, and what it does when it knows little."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import DeepseekV3Config, Gemma3TextConfig, LlamaConfig, MambaConfig

import anybit
from anybit.cli.app import run
from anybit.containers import Checkpoint
from anybit.engine import advice_rules as rules
from anybit.engine.memory import cache_bytes, parse_size, shape_of
from anybit.engine.recommend import recommend
from anybit.errors import CheckpointError, InvalidOption
from anybit.quantizers.named import from_scheme, schemes

MODEL = Path(__file__).parents[1] / "examples" / "tiny-llama"


@pytest.fixture(scope="module")
def usual():
    return recommend(MODEL, memory="8GB", device="cpu")


def named(found):
    return {one.scheme: one for one in found.candidates}


class TestSizes:
    @pytest.mark.parametrize(
        "scheme", ["nf4-dq", "gptq-3bit-g64", "awq-4bit-g64", "ct-w4a16", "mlx-4bit-g64", "fp8", "torchao-int8"]
    )
    def test_bytes_are_those_of_the_written_files(self, usual, scheme, tmp_path):
        anybit.quantize(MODEL, tmp_path / "out", from_scheme(scheme))
        with Checkpoint.open(tmp_path / "out") as checkpoint:
            written = sum(info.nbytes for info in checkpoint.tensors.values())
        predicted = named(usual)[scheme].bytes_written
        if scheme == "nf4-dq":  # keeps a text beside each weight, which is announced a few bytes too long
            assert written <= predicted <= written + 8 * 42
        else:
            assert predicted == written

    def test_dense_is_the_source(self, usual):
        with Checkpoint.open(MODEL) as checkpoint:
            assert named(usual)["dense"].bytes_written == sum(info.nbytes for info in checkpoint.tensors.values())

    def test_cache_of_a_configuration(self):
        # layers * (key + value) * heads * width * positions * bytes
        llama = LlamaConfig(num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2, hidden_size=64)
        assert cache_bytes(shape_of(llama), 2, 100, 2) == 3 * 2 * 2 * 8 * 100 * 2 * 2
        gemma = Gemma3TextConfig(
            num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"], sliding_window=16,
            num_key_value_heads=1, head_dim=4,
        )  # fmt: skip
        assert cache_bytes(shape_of(gemma), 1, 100, 2) == (16 + 100) * 2 * 4 * 2
        latent = DeepseekV3Config(
            num_hidden_layers=1,
            num_attention_heads=2,
            kv_lora_rank=8,
            qk_nope_head_dim=4,
            qk_rope_head_dim=2,
            v_head_dim=3,
        )
        assert cache_bytes(shape_of(latent), 1, 10, 2) == 10 * 2 * (6 + 3) * 2
        mamba = shape_of(MambaConfig(num_hidden_layers=2))
        assert cache_bytes(mamba, 1, 100, 2) == 0
        assert any("no attention heads" in note for note in mamba.notes)

    def test_peak_memory_is_predicted_to_ten_percent(self):
        """In a process of its own that loads the model and generates."""
        if not Path("/proc/self/status").exists():
            pytest.skip("needs /proc")
        found = named(recommend(MODEL, device="cpu", batch=8, context=512))["nf4"]
        child = (
            "import sys, torch, anybit\n"
            "from anybit._memory import peak_resident_bytes\n"
            "from anybit.quantizers.named import from_scheme\n"
            "model = anybit.load(sys.argv[1], from_scheme('nf4'))\n"
            "with torch.no_grad(): model.generate(torch.ones(8, 510, dtype=torch.int64), max_new_tokens=2, pad_token_id=0)\n"
            "print(peak_resident_bytes())"
        )
        command = [sys.executable, "-c", child, str(MODEL)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        assert found.bytes_needed == pytest.approx(int(done.stdout.splitlines()[-1]), rel=0.1)


class TestOrder:
    def test_every_scheme_has_a_place_and_a_reason(self, usual):
        planned = {one.scheme for one in usual.candidates} | {name for name, _ in usual.others}
        assert planned >= {*schemes(), "dense"}
        assert all(one.why for one in usual.candidates)
        assert [one.order for one in usual.choices] == sorted(one.order for one in usual.choices)
        assert not any(one.obstacle for one in usual.candidates[: len(usual.choices)])

    def test_classes_follow_what_was_measured(self, usual):
        quality = {one.scheme: rules.QUALITY_RANK[one.quality] for one in usual.candidates}
        for better, worse in (
            ("gptq-8bit-g64", "gptq-4bit-g64"),
            ("gptq-4bit-g64", "gptq-3bit-g64"),
            ("nf4", "mlx-2bit-g64"),
        ):
            assert quality[better] < quality[worse]
        assert usual.candidates[0].quality == "nearly lossless"

    def test_methods_made_elsewhere_are_named(self, usual):
        assert {name for name, _ in usual.others} | {one.method for one in usual.candidates} >= {
            info.name for info in anybit.quantizers.summary.methods() if info.loads
        }

    def test_a_scheme_that_was_never_measured_is_placed_by_its_bits(self):
        assert rules.quality_by_bits(8.5) == "nearly lossless"
        assert rules.quality_by_bits(2.1) == "heavy loss"
        assert rules.speed_class(1.0) == "like dense"


class TestWishes:
    def test_what_does_not_fit_says_by_how_much_and_what_would(self):
        tight = recommend(MODEL, memory="100MB", device="cpu")
        assert tight.choices == ()
        assert tight.smallest.bytes_needed == min(one.bytes_needed for one in tight.candidates if one.wished)
        assert all("too much" in one.why for one in tight.candidates if one.wished)
        between = tight.smallest.bytes_needed
        assert tight.smallest.scheme in {one.scheme for one in recommend(MODEL, memory=between, device="cpu").choices}

    def test_target_and_training(self):
        found = recommend(MODEL, memory="8GB", device="cpu", target="mlx", train=True)
        assert found.choices
        assert all("mlx" in one.targets and one.trainable for one in found.choices)
        assert named(found)["nf4"].obstacle == "mlx does not read it"
        files = recommend(MODEL, memory="8GB", device="cpu", target="llama.cpp")
        assert {one.method for one in files.choices} == {"gguf"}
        assert any("512 positions" in note for note in found.assumptions)

    def test_the_cache_counts(self):
        one, many = (named(recommend(MODEL, device="cpu", batch=batch, context=256))["nf4"] for batch in (1, 4))
        assert many.cache_bytes == 4 * one.cache_bytes == 4 * 6 * 2 * 2 * 64 * 256 * 2
        assert many.activation_bytes > one.activation_bytes

    def test_commands_make_what_they_promise(self, usual):
        words = named(usual)["gptq-4bit-g64"].command.split()
        assert words[:2] == ["anybit", "quantize"]
        assert words[-4:] == ["--scheme", "gptq-4bit-g64", "--calib", "TEXT_FILE"]
        plain = named(recommend(MODEL, device="cpu", calibration=False))["gptq-4bit-g64"]
        assert "--calib" not in plain.command
        static = named(usual)["modelopt-fp8"]  # scales of inputs that only data tells
        assert (static.calibration, static.obstacle) == ("needed", "")
        assert "--calib" in static.command
        for fitted in ("gguf-iq2_xs", "spqr"):  # codes that are chosen for what inputs weigh
            assert named(usual)[fitted].calibration == "needed"
        without = named(recommend(MODEL, device="cpu", calibration=False))["modelopt-fp8"]
        assert without.obstacle == "it needs calibration data"

    def test_hardware_that_is_not_here_is_assumed(self):
        if torch.accelerator.is_available():
            pytest.skip("needs a machine without an accelerator")
        found = recommend(MODEL, device="mps")
        assert found.memory is None
        assert any("not in this machine" in note for note in found.assumptions)
        assert found.choices

    def test_a_device_that_torch_has_no_name_for(self):
        found = recommend(MODEL, device="npu3000")
        assert found.device == "npu3000"
        assert any("torch has no device 'npu3000' here" in note for note in found.assumptions)
        assert named(found)["nf4"].speed in ("slower", "much slower")  # decoded by the reference kernel
        with pytest.raises(InvalidOption, match="no device 'cdua'; did you mean 'cuda'"):
            recommend(MODEL, device="cdua")

    def test_files_that_are_no_smaller_are_no_choice(self, usual):
        dense = named(usual)["dense"].bytes_written
        large = [one for one in usual.candidates if one.scheme != "dense" and one.bytes_written >= dense]
        assert large
        assert all(one.obstacle for one in large)

    @pytest.mark.parametrize("text", ["8 GB", "8gb", "8e9", 8_000_000_000])
    def test_sizes(self, text):
        assert parse_size(text) == 8_000_000_000

    @pytest.mark.parametrize("text", ["", "GB", "-3GB", "8 GBB", "nan", "1e400", True])
    def test_what_is_no_size(self, text):
        with pytest.raises(InvalidOption, match="write a number and a unit"):
            parse_size(text)

    def test_typos(self):
        with pytest.raises(InvalidOption, match="did you mean 'vllm'"):
            recommend(MODEL, target="vlm")
        with pytest.raises(CheckpointError, match="neither a folder"):
            recommend("no/such/folder")


class TestOtherModels:
    def test_an_unknown_architecture_is_taken_apart_by_its_headers(self, tmp_path):
        config = json.loads((MODEL / "config.json").read_text())
        config.update(architectures=["NobodyKnowsIt"], model_type="nobody_knows_it")
        (tmp_path / "config.json").write_text(json.dumps(config))
        shutil.copy(MODEL / "model.safetensors", tmp_path)
        found = recommend(tmp_path, memory="8GB", device="cpu", context=256)
        assert any("architecture is unknown here" in note for note in found.assumptions)
        known = named(recommend(MODEL, memory="8GB", device="cpu", context=256))
        assert named(found)["nf4"].bytes_written == known["nf4"].bytes_written
        assert named(found)["nf4"].cache_bytes == known["nf4"].cache_bytes

    def test_a_quantized_one_says_what_it_converts_to(self, tmp_path):
        anybit.quantize(MODEL, tmp_path / "awq", from_scheme("awq-4bit-g64"))
        found = recommend(tmp_path / "awq", memory="8GB")
        assert found.present == "awq"
        kinds = dict(found.conversions)
        assert kinds["gptq-4bit-g64"] == "exact"
        assert "nf4" not in kinds
        assert found.present_targets == from_scheme("awq-4bit-g64").served_by()
        assert found.present_trains
        assert 0 < found.present_needs < 8e9
        aimed = dict(recommend(tmp_path / "awq", memory="8GB", target="mlx").conversions)
        assert aimed == {
            name: kind for name, kind in kinds.items() if "mlx" in schemes()[name][0](**schemes()[name][1]).served_by()
        }
        done = anybit.convert(tmp_path / "awq", tmp_path / "gptq", from_scheme("gptq-4bit-g64"))
        assert set(done.counts) == {"exact"}


class TestCommand:
    def test_table_and_json(self, capsys):
        assert run(["recommend", str(MODEL), "--memory", "8GB", "--device", "cpu"]) == 0
        out = capsys.readouterr().out
        assert re.search(r"^the first one +anybit quantize ", out, re.MULTILINE)
        assert re.search(r"^calibration +(not needed|helps)$", out, re.MULTILINE)
        assert "taken for granted" in out
        assert run(["recommend", str(MODEL), "--memory", "8GB", "--device", "cpu", "--json"]) == 0
        data = json.loads(capsys.readouterr().out)
        assert data["choices"][0] == data["candidates"][0]["scheme"]

    def test_nothing_fits(self, capsys):
        assert run(["recommend", str(MODEL), "--memory", "1MB", "--device", "cpu"]) == 6
        assert "nothing fits these wishes; the smallest is" in capsys.readouterr().out
