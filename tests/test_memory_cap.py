"""Calibrated quantization under a cap on memory, held to it by the operating system's own count.

What counts is resident memory beyond what the process holds once the libraries are loaded and a first small model is done: the
peak is set back at that moment (/proc/self/clear_refs), and read at the end (VmHWM). Pages of the source that are mapped into the
process count as well.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import anybit
from anybit import BitsAndBytesConfig, GPTQConfig
from anybit.engine import forecast
from anybit.errors import InvalidOption

TOKENS = torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(0))

CHILD = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
import anybit
from anybit._memory import give_back_free_memory, peak_resident_bytes
small, large, out, cap = sys.argv[1:]
tokens = torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(0))
config = anybit.GPTQConfig(bits=4, group_size=32)
anybit.quantize(small, out + "-small", config, calibration=tokens)
give_back_free_memory()
Path("/proc/self/clear_refs").write_text("5")
before = peak_resident_bytes()
anybit.quantize(large, out, config, calibration=tokens, max_memory=int(cap))
print(peak_resident_bytes() - before)
"""


def llama(folder: Path, layers: int, hidden: int = 512) -> Path:
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=hidden, intermediate_size=hidden, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=8, dtype="float32",
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def smallest(message: str) -> int:
    """Bytes of the cap that an error names."""
    return int(message.partition("Allow at least ")[2].partition("MiB")[0]) << 20


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux sets a peak back")
def test_a_model_eight_times_larger_than_the_cap(tmp_path: Path) -> None:
    small = llama(tmp_path / "small", 1, hidden=64)
    with pytest.raises(InvalidOption) as info:
        anybit.quantize(
            llama(tmp_path / "one", 1),
            tmp_path / "out",
            GPTQConfig(bits=4, group_size=32),
            calibration=TOKENS,
            max_memory="1MB",
        )
    cap = smallest(str(info.value))
    large = llama(tmp_path / "large", -(-8 * cap // (size(tmp_path / "one") - 2 * 256 * 512 * 4)))
    assert size(large) >= 8 * cap
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(small), str(large), str(tmp_path / "out"), str(cap)],
        capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) <= cap
    assert size(tmp_path / "out") < 0.2 * size(large)


@pytest.mark.parametrize(
    ("config", "options", "what"),
    [
        (lambda: GPTQConfig(bits=4, group_size=32), {"calibration": TOKENS}, "one decoder block"),
        (lambda: BitsAndBytesConfig(load_in_4bit=True), {}, "its largest weight"),
    ],
)
def test_a_cap_that_is_too_small_says_the_smallest(config: Any, options: Any, what: str, tmp_path: Path) -> None:
    source = llama(tmp_path / "source", 1, hidden=256)
    with pytest.raises(InvalidOption, match=rf"max_memory is 1 MiB, but {what}.*Allow at least \d+MiB") as info:
        anybit.quantize(source, tmp_path / "out", config(), max_memory="1MiB", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    anybit.quantize(source, tmp_path / "out", config(), max_memory=smallest(str(info.value)), **options)
    with pytest.raises(InvalidOption, match=r"max_memory is 'much'"):
        anybit.quantize(source, tmp_path / "other", config(), max_memory="much", **options)


def test_a_forecast_comes_first_and_can_end_the_run(tmp_path: Path) -> None:
    source = llama(tmp_path / "source", 2, hidden=256)
    told: list[Any] = []
    for options in ({"calibration": TOKENS}, {}):
        anybit.quantize(source, tmp_path / "out", GPTQConfig(bits=4, group_size=32), announce=told.append, **options)  # type: ignore[arg-type]
        assert not (tmp_path / "out").exists()
        assert told[-1].seconds > 0
    anybit.quantize(source, tmp_path / "out", GPTQConfig(bits=4, group_size=32))
    written = size(tmp_path / "out")
    for ahead in told:
        assert ahead.bytes_read == pytest.approx(size(source), rel=0.02)
        assert ahead.bytes_written == pytest.approx(written, rel=0.02)


@pytest.mark.parametrize(
    ("algorithm", "arguments"),
    [("gptq", {}), ("awq", {}), ("smoothquant", {}), ("autoround", {"steps": 7}), ("awq+gptq", {"mse": 2.4})],
)
def test_every_algorithm_is_foretold_what_it_computes(
    algorithm: str, arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With speeds that are given, the time is theirs: a step of training is a step, a ratio of AWQ a rounding."""
    speed = forecast._Speed(product=1.0, number=1e-30, step=1e-30)
    monkeypatch.setattr(forecast._Speed, "measured", staticmethod(lambda: speed))
    monkeypatch.setattr(forecast, "_seconds_each", lambda ready, wanted: 0.0)
    source = llama(tmp_path / "source", 1, hidden=64)
    told: list[Any] = []
    options = {"calibration": TOKENS, "algorithm": algorithm, "algorithm_options": arguments, "announce": told.append}
    anybit.quantize(source, tmp_path / "out", GPTQConfig(bits=4, group_size=32), **options)
    forward = 2.0 * 7 * 64 * 64 * TOKENS.numel()  # seven matrices of one block
    passes = {"gptq": 6, "awq": 6 + 2 * 21, "smoothquant": 6, "autoround": 6 + 7 * 3, "awq+gptq": 6 + 2 * 21}[algorithm]
    assert passes * forward <= told[0].seconds <= 1.6 * passes * forward
