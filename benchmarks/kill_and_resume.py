"""Kill a calibrated quantization at random moments until it has been killed often enough; every result must be the same bytes.

    python benchmarks/kill_and_resume.py --kills 50

Each run is a forked process that gets SIGKILL after a random time; the next one goes on from what it left. Where fewer than half
of the kills so far have met a state to go on from, the time begins when there is one, however fast the machine is. When a run
finishes, its folder is compared with that of the unbroken run, file by file, and the series begins anew.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "examples" / "tiny-llama"
TEXT = ROOT / "examples" / "data" / "calibration.txt"


@dataclass
class Outcome:
    """How often runs were killed, how many of those left a state, and how many series ended in the same bytes."""

    kills: int = 0
    states: int = 0
    series: int = 0


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def quantize(target: Path) -> None:
    """The run that is killed: calibrated, 4 bits, several files."""
    import anybit

    anybit.quantize(
        MODEL, target, anybit.GPTQConfig(bits=4, group_size=64), calibration=TEXT, samples=4, sequence_length=64,
        max_shard_size="1MB",
    )  # fmt: skip


def kill_at_random(folder: Path, kills: int, seed: int = 0, run: Callable[[Path], None] = quantize) -> Outcome:
    """Run, kill, run again ... AssertionError for a difference to the unbroken run or for anything left over.

    At least half of the kills, rounded down, leave a state of `run(target)`.
    """
    from anybit.engine import resume

    resume.SECONDS_BETWEEN_STATES = 0.0  # the model is small: a state after every job
    chance, outcome = random.Random(seed), Outcome()
    run(folder / "warm")  # imports and caches, which the forked runs inherit
    begin = time.perf_counter()
    run(folder / "unbroken")
    seconds = time.perf_counter() - begin
    wanted = content(folder / "unbroken")
    assert content(folder / "warm") == wanted, "two unbroken runs differ"
    target, state = folder / "killed", folder / "killed.partial" / "state.json"
    while outcome.kills < kills or outcome.states < kills // 2:
        child = os.fork()
        if child == 0:
            try:
                os.close(2)  # nothing of a killed run is worth reading
                run(target)
            except BaseException:
                os._exit(1)
            os._exit(0)
        if 2 * outcome.states < outcome.kills:
            _until(lambda: state.exists() or target.exists())
        time.sleep(chance.uniform(0, 0.7 * seconds))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0, "a run that goes on failed"
        if os.WIFSIGNALED(status):
            outcome.kills += 1
            outcome.states += state.exists()
        if target.exists():
            _compare(folder, target, wanted)
            outcome.series += 1
            shutil.rmtree(target)
    run(target)
    _compare(folder, target, wanted)
    outcome.series += 1
    assert sorted(path.name for path in folder.iterdir()) == ["killed", "unbroken", "warm"]
    return outcome


def _until(happened: Callable[[], bool]) -> None:
    """Wait for it; AssertionError after a minute."""
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end, "no state and no result within a minute"
        time.sleep(0.001)


def _compare(folder: Path, target: Path, wanted: dict[str, bytes]) -> None:
    found = content(target)
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    differing = [name for name in wanted if found[name] != wanted[name]]
    assert not differing, f"{differing} differ from the unbroken run"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = kill_at_random(Path(folder), options.kills, options.seed)
    print(
        f"{found.kills} kills, {found.states} of them left a state; {found.series} finished series, all with the bytes of the "
        "unbroken run"
    )
    sys.exit(0)


if __name__ == "__main__":
    main()
