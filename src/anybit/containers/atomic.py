"""A folder that appears under its name only when it is complete.

It is made under a temporary name beside the target, `.NAME.anybit-XXXXXXXX`, written through to the disk, then renamed. The
process holds a lock on the temporary folder; the system drops the lock however the process ends, so the next run for the same
target can tell what a killed run left from what a running one is writing, and removes only the former.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from anybit.errors import WriteError

try:
    import fcntl
except ImportError:  # Windows has no flock: leftovers of killed runs stay until the user removes them
    fcntl = None  # type: ignore[assignment]


STATE, NEW_STATE, RESULT = "state.json", "state.json.new", "result"  # in a folder of work that can be gone on with
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_failed(error: OSError, where: str, lasting: bool = False) -> WriteError:
    """The same failure with what was being written, and the cure. `lasting`: what was written stays for the next run."""
    cure = {
        errno.ENOSPC: "Free some space or choose another disk",
        errno.EDQUOT: "Free some space or ask for a larger quota",
        errno.EFBIG: "Raise the file size limit (ulimit -f) or write smaller shards (max_shard_size)",
    }.get(error.errno or 0, "Choose another output")
    left = "the same command then goes on from there" if lasting else "nothing was left behind"
    return WriteError(f"{where} cannot be written: {error.strerror or error}. {cure}; {left}", error.errno)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], force: bool = False) -> Iterator[Path]:
    """A folder to fill; at the end of the `with` block it becomes `path`, and on any error nothing of it remains.

    Raises FileExistsError if `path` exists, unless `force`: then a model folder (or an empty one) is replaced, at the end.
    What is not plainly a model folder is never replaced. Raises WriteError when the folder cannot be made or the disk is full.
    """
    target = Path(os.path.abspath(path))
    _check_target(target, force)
    made: list[Path] = []
    folder, lock = None, None
    try:
        try:
            made = _make_parents(target.parent)
            _clean(target)
            _check_target(target, force)  # cleaning may have put the old folder back
            folder, lock = _temporary(target)
        except FileExistsError:
            raise
        except OSError as error:
            raise write_failed(error, str(target)) from error
        yield folder
        _flush(folder)
        _check_target(target, force)  # it may have appeared meanwhile
        old = _exchange(folder, target)
    except BaseException as error:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError) and error.errno in DISK_FULL and not isinstance(error, WriteError):
            raise write_failed(error, error.filename or str(target)) from error
        raise
    finally:
        if lock is not None:
            os.close(lock)
    if os.path.lexists(old):
        _remove(old, target)


@contextlib.contextmanager
def resumable_folder(path: str | os.PathLike[str], force: bool = False, restart: bool = False) -> Iterator[Path]:
    """A folder `NAME.partial` beside `path` to work in; its folder `result` becomes `path` at the end of the `with` block.

    An error leaves it for the next run if it holds a file `STATE`; `restart` begins with an empty one. `path` is treated as by
    `atomic_folder`. Raises WriteError, too, when another process is working there.
    """
    target = Path(os.path.abspath(path))
    work = target.with_name(f"{target.name}.partial")
    _check_target(target, force)
    made: list[Path] = []
    lock = None
    try:
        try:
            made = _make_parents(target.parent)
            _clean(target)
            _check_target(target, force)
            if work.exists() and not _is_work(work):
                raise FileExistsError(f"{work} is needed to work in, but holds something else. Move it away")
            work.mkdir(exist_ok=True)
            lock = _lock(work)
            if restart or not (work / STATE).exists():
                _empty(work)
            (work / RESULT).mkdir(exist_ok=True)
        except FileExistsError:
            raise
        except BlockingIOError as error:
            raise WriteError(f"another process is making {target} in {work}. Wait for it, or stop it") from error
        except OSError as error:
            raise write_failed(error, str(work)) from error
        yield work
        _flush(work / RESULT)
        _check_target(target, force)
        old = _exchange(work / RESULT, target)
        shutil.rmtree(work, ignore_errors=True)
    except BaseException as error:
        if lock is not None and not (work / STATE).exists():
            shutil.rmtree(work, ignore_errors=True)
            for parent in made:
                with contextlib.suppress(OSError):
                    parent.rmdir()
        if isinstance(error, OSError) and error.errno in DISK_FULL and not isinstance(error, WriteError):
            raise write_failed(error, error.filename or str(work), (work / STATE).exists()) from error
        raise
    finally:
        if lock is not None:
            os.close(lock)
    if os.path.lexists(old):
        _remove(old, target)


def _is_work(work: Path) -> bool:
    """Whether a folder is what an earlier run left: it has a state, or nothing but the beginning of a result."""
    if not work.is_dir() or (work / STATE).is_file():
        return work.is_dir()
    return all(file.name in (RESULT, NEW_STATE) or file.name.startswith("hidden-") for file in work.iterdir())


def _empty(work: Path) -> None:
    (work / STATE).unlink(missing_ok=True)  # first: without it, whatever else is left counts as nothing
    for file in work.iterdir():
        if file.is_dir():
            shutil.rmtree(file)
        else:
            file.unlink()


def _exchange(folder: Path, target: Path) -> Path:
    """Give the folder its name; what had the name before lies under the returned one."""
    old = _sibling(target, "old-")
    if os.path.lexists(target):
        os.rename(target, old)
    try:
        os.rename(folder, target)
    except BaseException:
        if os.path.lexists(old):
            os.rename(old, target)
        raise
    _flush_folder(target.parent)
    return old


def _make_parents(parent: Path) -> list[Path]:
    missing = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    parent.mkdir(parents=True, exist_ok=True)
    return missing


def _sibling(target: Path, kind: str = "") -> Path:
    return target.with_name(f".{target.name}.anybit-{kind}{secrets.token_hex(4)}")


def _temporary(target: Path) -> tuple[Path, int | None]:
    while True:
        folder = _sibling(target)
        os.mkdir(folder)
        # a cleaner may come between the two lines, and take the folder for a leftover
        with contextlib.suppress(BlockingIOError):
            lock = _lock(folder)
            if folder.exists():
                return folder, lock


def _lock(folder: Path) -> int | None:
    """A locked descriptor of the folder; None where locks do not work. BlockingIOError if another process holds it."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return descriptor


def _clean(target: Path) -> None:
    """Remove what killed runs for the same target left; put back a folder that a killed run had moved aside."""
    prefix = f".{target.name}.anybit-"
    left = [target.parent / name for name in os.listdir(target.parent) if name.startswith(prefix)]
    locks: dict[Path, int] = {}
    alive = False
    try:
        for folder in left:
            with contextlib.suppress(BlockingIOError):
                lock = _lock(folder)
                if lock is not None:
                    locks[folder] = lock
                    continue
            alive = True
        for folder in locks:
            if not folder.name.startswith(f"{prefix}old-"):
                shutil.rmtree(folder, ignore_errors=True)
            elif alive:
                continue  # a running process may be between its two renames
            elif os.path.lexists(target):
                shutil.rmtree(folder, ignore_errors=True)
            else:
                os.rename(folder, target)
    finally:
        for lock in locks.values():
            os.close(lock)


def _check_target(target: Path, force: bool) -> None:
    if not os.path.lexists(target):
        return
    if not force:
        raise FileExistsError(f"{target} exists. Choose another output or pass force=True (--force) to replace it")
    why = _not_replaceable(target)
    if why:
        raise FileExistsError(f"{target} is not replaced, even with --force: {why}. Choose another output")


def _not_replaceable(target: Path) -> str:
    if not target.is_dir():
        return "it is not a folder"
    real = Path(os.path.realpath(target))
    for name, precious in (("your home folder", Path.home()), ("the current folder", Path.cwd())):
        if Path(os.path.realpath(precious)).is_relative_to(real):
            return f"it is or holds {name}"
    names = os.listdir(target)
    if ".git" in names:
        return "it is a git checkout"
    if names and "config.json" not in names and not all(name.endswith(".gguf") for name in names):
        return f"it holds no config.json, so it is no model folder ({len(names)} entries, such as {sorted(names)[0]!r})"
    return ""


def _flush(folder: Path) -> None:
    for where, _, files in os.walk(folder):
        for name in files:
            descriptor = os.open(os.path.join(where, name), os.O_RDWR)  # Windows flushes only what is open for writing
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        _flush_folder(Path(where))


def _flush_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # Windows and some network disks cannot; the rename is still atomic
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove(old: Path, target: Path) -> None:
    """Delete the replaced folder; first under a name that no run will take for a folder to put back."""
    if old.is_symlink():
        old.unlink()
        return
    garbage = _sibling(target)
    os.rename(old, garbage)
    shutil.rmtree(garbage, ignore_errors=True)
