"""A folder that is complete or not there: errors, kill -9, full disks, and what is never replaced."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from anybit.containers.writer import SafetensorsWriter, atomic_folder
from anybit.errors import AnybitError, WriteError


def visible(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def fill(target: Path, text: str = "new", force: bool = False, error: type[BaseException] | None = None) -> None:
    """A folder with a file and a sub-folder; with `error`, raised when half of it is there."""
    with atomic_folder(target, force=force) as folder:
        assert not target.exists() or (target / "config.json").read_text() != text
        (folder / "config.json").write_text(text)
        if error is not None:
            raise error("halfway")
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text(text)


def test_appears_at_the_end(tmp_path):
    with atomic_folder(tmp_path / "out") as folder:
        assert folder.parent == tmp_path
        assert folder.name.startswith(".out.anybit-")
        assert visible(tmp_path) == [folder.name]
        (folder / "config.json").write_text("{}")
    assert visible(tmp_path) == ["out"]
    assert visible(tmp_path / "out") == ["config.json"]
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_vanishes_on_an_error(tmp_path, error):
    with pytest.raises(error):
        fill(tmp_path / "a" / "b" / "out", error=error)
    assert visible(tmp_path) == []


def test_parents_are_made(tmp_path):
    fill(tmp_path / "a" / "b" / "out")
    assert visible(tmp_path / "a" / "b") == ["out"]


@pytest.mark.parametrize("content", [{}, {"config.json": "old"}])
def test_an_existing_folder_is_kept_without_force_and_replaced_with_it(tmp_path, content):
    target = tmp_path / "out"
    target.mkdir()
    for name, text in content.items():
        (target / name).write_text(text)
    with pytest.raises(FileExistsError, match=r"out exists.*--force"):
        fill(target)
    assert {name: (target / name).read_text() for name in os.listdir(target)} == content
    if content:
        with pytest.raises(ValueError, match="halfway"):
            fill(target, "half", force=True, error=ValueError)
        assert (target / "config.json").read_text() == "old"
    if not content:
        (target / "config.json").write_text("old")
    fill(target, force=True)
    assert (target / "sub" / "file").read_text() == "new"
    assert visible(tmp_path) == ["out"]


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path):
    target = tmp_path / "out"

    def overtaken() -> None:
        with atomic_folder(target):
            target.mkdir()
            (target / "config.json").write_text("theirs")

    with pytest.raises(FileExistsError, match="out exists"):
        overtaken()
    assert visible(tmp_path) == ["out"]
    assert (target / "config.json").read_text() == "theirs"


def test_what_is_no_model_folder_is_never_replaced(tmp_path, monkeypatch):
    notes, checkout, file, home = (tmp_path / name for name in ("notes", "checkout", "file", "home"))
    for folder in (notes, checkout / ".git", home / "model"):
        folder.mkdir(parents=True)
    (notes / "thesis.txt").write_text("years of work")
    (checkout / "config.json").write_text("{}")
    (home / "config.json").write_text("{}")
    (home / "model" / "config.json").write_text("{}")
    file.write_text("mine")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home / "model")
    before = sorted(tmp_path.rglob("*"))
    for target, why in [
        (notes, r"no config\.json.*thesis\.txt"),
        (checkout, "git checkout"),
        (file, "not a folder"),
        (home, "home folder"),
        (home / "model", "current folder"),
        (Path("/"), "folder"),
    ]:
        with (
            pytest.raises(FileExistsError, match=f"not replaced, even with --force.*{why}"),
            atomic_folder(target, force=True),
        ):
            raise AssertionError("must not come this far")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.name == "nt", reason="needs links")
def test_a_link_is_replaced_and_what_it_points_to_is_kept(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "config.json").write_text("old")
    os.symlink("real", tmp_path / "out")
    fill(tmp_path / "out", force=True)
    assert not (tmp_path / "out").is_symlink()
    assert (tmp_path / "real" / "config.json").read_text() == "old"
    assert visible(tmp_path) == ["out", "real"]


def test_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises((WriteError, FileExistsError), match="file"), atomic_folder(tmp_path / "file" / "out"):
        raise AssertionError("must not come this far")


# --- killed runs ----------------------------------------------------------------------------------------------------------

# Imports torch once. Each line of input starts a new process that writes a model, and kills it after so many seconds.
WRITERS = """
import os, signal, sys, time
import torch
from anybit.containers.writer import SafetensorsWriter, atomic_folder

def write():
    specs = {f"t{i}": ("int32", (1 << 18,)) for i in range(24)}
    with atomic_folder(sys.argv[1], force=True) as folder:
        with SafetensorsWriter(folder, specs, max_shard_size=8 << 20) as writer:
            for i in range(24):
                writer.write(f"t{i}", torch.arange(i, i + (1 << 18), dtype=torch.int32))
                time.sleep(0.005)
        (folder / "config.json").write_text("{}")

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        write()
        os._exit(0)
    if float(line) > 0:
        time.sleep(float(line))
        os.kill(child, signal.SIGKILL)  # a child that has ended is still ours until waitpid
    print(os.waitpid(child, 0)[1], flush=True)
"""


def digests(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in sorted(os.listdir(folder))}


@pytest.mark.skipif(os.name == "nt", reason="needs kill -9")
def test_killed_while_writing(tmp_path):
    target, choose, halfway = tmp_path / "out", random.Random(1), 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WRITERS, str(target)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as writers:

        def run(seconds: float) -> int:
            writers.stdin.write(f"{seconds}\n")
            writers.stdin.flush()
            return int(writers.stdout.readline())

        assert run(0) == 0  # includes the import of torch
        shutil.rmtree(target)
        began = time.perf_counter()
        assert run(0) == 0
        lasts = time.perf_counter() - began
        expected = digests(target)
        assert len(expected) == 5
        shutil.rmtree(target)
        for moment in (0.1, 0.4, 0.7, 0.95, *(choose.random() for _ in range(4))):
            run(lasts * moment)
            left = [name for name in os.listdir(tmp_path) if name != "out"]
            assert all(name.startswith(".out.anybit-") for name in left)
            assert len(left) <= 2, "each run removes what the one before it left"
            halfway += bool(left)
            if target.exists():
                assert digests(target) == expected
        writers.stdin.close()
    assert halfway, "no child was caught while writing"
    fill(target, force=True)
    assert visible(tmp_path) == ["out"]


def test_a_running_writer_is_left_alone(tmp_path):
    with atomic_folder(tmp_path / "out") as first:
        (first / "config.json").write_text("first")
        with atomic_folder(tmp_path / "out") as second:
            assert first.exists()
            (second / "config.json").write_text("second")
        (tmp_path / "out" / "config.json").unlink()
        (tmp_path / "out").rmdir()
    assert (tmp_path / "out" / "config.json").read_text() == "first"


def test_killed_between_the_two_renames(tmp_path):
    """The old folder lies aside, the new one is complete but unnamed: the next run starts from the old one."""
    aside = tmp_path / ".out.anybit-old-01234567"
    aside.mkdir()
    (aside / "config.json").write_text("old")
    (tmp_path / ".out.anybit-89abcdef").mkdir()
    with pytest.raises(FileExistsError, match="out exists"):
        fill(tmp_path / "out")
    assert visible(tmp_path) == ["out"]
    assert (tmp_path / "out" / "config.json").read_text() == "old"
    fill(tmp_path / "out", force=True)
    assert (tmp_path / "out" / "config.json").read_text() == "new"


def test_other_targets_are_left_alone(tmp_path):
    for name in (".other.anybit-01234567", "out.anybit-1", ".out2.anybit-01234567", ".out"):
        (tmp_path / name).mkdir()
    fill(tmp_path / "out")
    assert len(visible(tmp_path)) == 5


# --- no room --------------------------------------------------------------------------------------------------------------

LIMITED = """
import resource, sys
import torch
from anybit.containers.writer import SafetensorsWriter, atomic_folder
from anybit.errors import AnybitError
if len(sys.argv) > 2:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), -1))

def write(side_file):
    with atomic_folder(sys.argv[1]) as folder:
        if side_file:
            (folder / "tokenizer.json").write_bytes(bytes(4 << 20))
        with SafetensorsWriter(folder, {"w": ("float32", (1 << 20,))}) as writer:
            print("opened")
            writer.write("w", torch.ones(1 << 20))

for side_file in (False, True):
    try:
        write(side_file)
    except OSError as error:
        assert isinstance(error, AnybitError), repr(error)
        print(error.errno, error)
"""


def limited(*arguments: object, before: list[str] = ()) -> list[str]:
    """What a process says that writes a model of 4 MB, then one with a side file of 4 MB, where neither has room."""
    command = [*before, sys.executable, "-c", LIMITED, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


@pytest.mark.skipif(os.name == "nt", reason="needs rlimits")
def test_a_file_size_limit(tmp_path):
    weights, side_file = limited(tmp_path / "out", 1 << 20)
    assert weights.startswith(f"{errno.EFBIG} {tmp_path}"), "noticed before the first tensor"
    assert "model.safetensors" in weights
    assert "ulimit" in weights
    assert side_file.startswith(f"{errno.EFBIG} {tmp_path}")
    assert visible(tmp_path) == []


def can_mount() -> bool:
    try:
        done = subprocess.run(
            ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"],
            capture_output=True,
        )
    except OSError:
        return False
    return done.returncode == 0


@pytest.mark.skipif(not can_mount(), reason="needs a mount namespace")
def test_a_full_disk(tmp_path):
    mount = f'mount -t tmpfs -o size=2m tmpfs {tmp_path} && "$@" && ls -A {tmp_path}'
    before = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
    weights, side_file, *left = limited(tmp_path / "out", before=before)
    assert weights.startswith(f"{errno.ENOSPC} {tmp_path}"), "noticed before the first tensor"
    assert "model.safetensors" in weights
    assert "Free some space" in weights
    assert side_file.startswith(f"{errno.ENOSPC} {tmp_path}")
    assert not left


def test_a_disk_that_fills_while_writing(tmp_path, monkeypatch):
    """Where space cannot be reserved, the error comes with a tensor."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)

    def filling() -> None:
        with atomic_folder(tmp_path / "out") as folder, SafetensorsWriter(folder, {"w": ("float32", [4])}) as writer:
            monkeypatch.setattr("anybit.containers.writer._write_all", full)
            writer.write("w", torch.ones(4))

    with pytest.raises(WriteError, match=r"model\.safetensors, tensor 'w' cannot be written: No space left") as caught:
        filling()
    assert caught.value.errno == errno.ENOSPC
    assert isinstance(caught.value, AnybitError)
    assert visible(tmp_path) == []


def test_a_failed_flush_is_an_error(tmp_path, monkeypatch):
    def full(_: int) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match="quota"), atomic_folder(tmp_path / "out") as folder:
        (folder / "config.json").write_text("{}")
    assert visible(tmp_path) == []
