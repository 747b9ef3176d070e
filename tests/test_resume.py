"""A broken run is gone on with to the same bytes, and only by a run that would have made the same."""

import errno
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import anybit
from anybit import AutoRoundConfig, BitsAndBytesConfig, GPTQConfig
from anybit.containers import atomic
from anybit.engine import hidden_states, resume
from anybit.errors import CheckpointError, ConfigError, WriteError

ROOT = Path(__file__).parent.parent
TINY = ROOT / "examples" / "tiny-llama"
TEXT = ROOT / "examples" / "data" / "calibration.txt"
CALIBRATED: dict[str, Any] = {"calibration": TEXT, "samples": 4, "sequence_length": 64}


@pytest.fixture(autouse=True)
def _every_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "SECONDS_BETWEEN_STATES", 0.0)  # the model is small: a state after every job


class Stop(BaseException):
    """What a killed run does, as far as one process can show it."""


def stop_after(jobs: int) -> Callable[[str, int, int], None]:
    def progress(label: str, done: int, total: int) -> None:
        if done == jobs:
            raise Stop

    return progress


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def broken(target: Path, config: Any, jobs: int = 2, src: Path = TINY, **options: Any) -> Path:
    """A run that ended early; its folder of work."""
    with pytest.raises(Stop):
        anybit.quantize(src, target, config, progress=stop_after(jobs), **options)
    work = target.with_name(f"{target.name}.partial")
    assert not target.exists()
    assert len(json.loads((work / "state.json").read_text())["done"]) == jobs
    return work


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks")
def test_killed_at_random_moments_the_bytes_stay_the_same(tmp_path: Path) -> None:
    file = ROOT / "benchmarks" / "kill_and_resume.py"
    spec = importlib.util.spec_from_file_location("kill_and_resume", file)
    assert spec is not None and spec.loader is not None  # noqa: PT018
    script: Any = importlib.util.module_from_spec(spec)
    sys.modules["kill_and_resume"] = script  # dataclasses look their module up
    spec.loader.exec_module(script)
    outcome = script.kill_at_random(tmp_path, kills=3, seed=1)
    assert outcome.kills >= 3
    assert outcome.states >= 1


@pytest.mark.parametrize(
    ("config", "options", "jobs"),
    [
        (lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), {}, 5),
        (lambda: GPTQConfig(bits=4, group_size=64, desc_act=True), CALIBRATED, 2),
        (lambda: AutoRoundConfig(bits=4, group_size=64, iters=2), CALIBRATED, 2),
        (lambda: GPTQConfig(bits=4, group_size=64), {"rotate": "r1+r2", "algorithm": "awq+gptq", **CALIBRATED}, 3),
    ],
    ids=["without calibration", "calibrated", "tuned", "rotated and scaled"],
)
def test_the_work_that_was_done_is_not_done_again(config: Any, options: Any, jobs: int, tmp_path: Path) -> None:
    whole = anybit.quantize(TINY, tmp_path / "whole", config(), max_shard_size="1MB", **options)
    broken(tmp_path / "out", config(), jobs, max_shard_size="1MB", **options)
    seen: list[tuple[str, int]] = []
    plan = anybit.quantize(
        TINY, tmp_path / "out", config(), max_shard_size="1MB", progress=lambda *at: seen.append(at[:2]), **options
    )
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert [entry.reason for entry in plan.entries] == [entry.reason for entry in whole.entries]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_only_the_inputs_of_the_next_block_are_kept(tmp_path: Path) -> None:
    work = broken(tmp_path / "out", GPTQConfig(bits=4, group_size=64), 3, **CALIBRATED)
    assert sorted(path.name for path in work.iterdir()) == ["hidden-3", "result", "state.json"]
    assert len(list((work / "hidden-3").iterdir())) == 1  # four samples, one batch


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        (GPTQConfig(bits=3, group_size=64), CALIBRATED, r"settings.configuration.bits was 4 and is 3"),
        (GPTQConfig(bits=4, group_size=64), {**CALIBRATED, "seed": 5}, r"settings.calibration was"),
        (GPTQConfig(bits=4, group_size=64), {}, r"settings.calibration was .* and is null"),
    ],
)
def test_a_run_with_other_settings_is_refused(config: Any, options: Any, words: str, tmp_path: Path) -> None:
    work = broken(tmp_path / "out", GPTQConfig(bits=4, group_size=64), **CALIBRATED)
    before = (work / "state.json").read_bytes()
    with pytest.raises(ConfigError, match=rf"out.partial was left by a broken run.*{words}.*--restart"):
        anybit.quantize(TINY, tmp_path / "out", config, **options)
    assert (work / "state.json").read_bytes() == before  # the broken run can still be gone on with
    anybit.quantize(TINY, tmp_path / "out", config, restart=True, **options)
    assert not work.exists()


def test_another_source_or_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    config = GPTQConfig(bits=4, group_size=64)
    shutil.copytree(TINY, tmp_path / "src")
    broken(tmp_path / "out", config, src=tmp_path / "src", **CALIBRATED)
    with monkeypatch.context() as patch:
        patch.setattr(anybit, "__version__", "9.9.9")
        with pytest.raises(ConfigError, match=r"versions\.anybit was"):
            anybit.quantize(tmp_path / "src", tmp_path / "out", config, **CALIBRATED)
    with open(tmp_path / "src" / "model.safetensors", "r+b") as file:
        file.seek(-2, 2)
        file.write(b"\0\1")
    os.utime(tmp_path / "src" / "model.safetensors", (1, 1))
    with pytest.raises(ConfigError, match=r"source.model.safetensors was .*--restart"):
        anybit.quantize(tmp_path / "src", tmp_path / "out", config, **CALIBRATED)


def test_a_source_that_changes_while_it_is_read(tmp_path: Path) -> None:
    import shutil

    shutil.copytree(TINY, tmp_path / "src")

    def progress(label: str, done: int, total: int) -> None:
        if done == total:
            os.utime(tmp_path / "src" / "config.json", (1, 1))

    with pytest.raises(CheckpointError, match=r"was changed while it was read: config\.json was"):
        anybit.quantize(tmp_path / "src", tmp_path / "out", GPTQConfig(bits=4, group_size=64), progress=progress)
    assert not (tmp_path / "out").exists()


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    work = broken(tmp_path / "out", GPTQConfig(bits=4, group_size=64))
    (work / "state.json").write_text('{"done": [0, 1')
    with pytest.raises(ConfigError, match=r"state.json is not readable.*--restart"):
        anybit.quantize(TINY, tmp_path / "out", GPTQConfig(bits=4, group_size=64))


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = GPTQConfig(bits=4, group_size=64)
    anybit.quantize(TINY, tmp_path / "whole", config, **CALIBRATED)
    saved = 0

    def full(tensors: Any) -> bytes:
        nonlocal saved
        saved += 1
        if saved == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save(tensors)

    save = hidden_states.save
    with monkeypatch.context() as patch:
        patch.setattr(hidden_states, "save", full)
        with pytest.raises(
            WriteError, match=r"hidden-2.new.*No space left.*Free some space.*goes on from there"
        ) as info:
            anybit.quantize(TINY, tmp_path / "out", config, **CALIBRATED)
    assert info.value.errno == errno.ENOSPC
    assert json.loads((tmp_path / "out.partial" / "state.json").read_text())["done"] == [0]
    anybit.quantize(TINY, tmp_path / "out", config, **CALIBRATED)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_two_runs_for_one_output(tmp_path: Path) -> None:
    work = broken(tmp_path / "out", GPTQConfig(bits=4, group_size=64))
    lock = atomic._lock(work)
    assert lock is not None
    try:
        with pytest.raises(WriteError, match="another process is making"):
            anybit.quantize(TINY, tmp_path / "out", GPTQConfig(bits=4, group_size=64))
    finally:
        os.close(lock)
    assert (work / "state.json").exists()


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="holds something else"):
        anybit.quantize(TINY, tmp_path / "out", GPTQConfig(bits=4, group_size=64), restart=True)
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "precious"
