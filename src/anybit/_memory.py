"""The process' memory: its largest so far, pages to give back, and the collector of cycles."""

from __future__ import annotations

import contextlib
import functools
import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

_STATUS = Path("/proc/self/status")


def peak_resident_bytes() -> int:
    """Since the program started. 0 where the system does not tell."""
    if _STATUS.exists():
        # not getrusage: its maximum starts, for a new program on Linux, with that of the process that started it
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def give_back_free_memory() -> None:
    """Let the allocator return pages that lie free between live ones; after many temporaries these add up. glibc only."""
    trim = _trimmer()
    if trim is not None:
        trim(0)


@functools.lru_cache(maxsize=1)
def _trimmer() -> Callable[[int], int] | None:
    import ctypes

    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, macOS, Windows
        return None


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """While hundreds of thousands of objects are made that stay, and hold no cycles: looking for some would take a fifth."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            if gc.get_freeze_count() == 0:  # nobody's objects are frozen, so none of theirs is thawed
                # all that was made counts as old, as if it had been looked at; otherwise the next object that is made pays
                gc.freeze()
                gc.unfreeze()
            gc.enable()
