"""Facts about this machine and installation, for `anybit doctor`."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from anybit.cli.report import size

PACKAGES = ("anybit", "torch", "transformers", "accelerate", "safetensors", "huggingface_hub", "numpy", "typer", "rich")
# extras that only this project's own developers need
FOR_DEVELOPERS = ("test", "dev")


def facts() -> dict[str, Any]:
    """Everything `doctor` shows, as plain data."""
    from anybit.kernels import infos as kernels

    return {
        "versions": {
            "python": f"{platform.python_version()} ({sys.executable})",
            **{name: _version(name) or "missing" for name in PACKAGES},
        },
        "machine": _machine(),
        "torch": _torch(),
        "devices": _devices(),
        "kernels": [kernel.to_dict() for kernel in kernels()],
        "encoders": _encoders(),
        "missing": _missing(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _machine() -> dict[str, str]:
    cache = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    found = {"system": f"{platform.system()} {platform.release()}, {platform.machine()}", "cpus": _cpus()}
    total, free = _memory()
    if total is not None:
        found["memory"] = f"{size(total)}" + (f", {size(free)} free" if free is not None else "")
    found["disk here"] = f"{size(shutil.disk_usage('.').free)} free"
    while not cache.exists():
        cache = cache.parent
    found["disk of the hub cache"] = f"{size(shutil.disk_usage(cache).free)} free"
    return found


def _cpus() -> str:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{usable} usable of {os.cpu_count()}"


def _memory() -> tuple[int | None, int | None]:
    """(total, free) bytes; free counts what the system can give back at once. None where the system does not say."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return tuple(1024 * int(lines[name].split()[0]) for name in ("MemTotal", "MemAvailable"))  # type: ignore[return-value]
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), None
    except (AttributeError, OSError, ValueError):
        return None, None


def _torch() -> dict[str, str]:
    import torch

    shown = torch.__config__.show()
    blas = re.search(r"BLAS_INFO=(\w+)", shown)
    return {
        "build": f"CUDA {torch.version.cuda}"
        if torch.version.cuda
        else f"ROCm {torch.version.hip}"
        if torch.version.hip
        else "CPU only",
        "cpu instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": f"{torch.get_num_threads()} (OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'not set')})",
        "matrix library": blas.group(1) if blas else "unknown",
        "oneDNN": "yes" if torch.backends.mkldnn.is_available() else "no",
        "triton": _version("triton") or "not installed",
    }


def _devices() -> list[dict[str, Any]]:
    import torch

    found: list[dict[str, Any]] = [{"device": "cpu", "what": platform.processor() or platform.machine()}]
    if not torch.accelerator.is_available():
        return [*found, {"device": "accelerator", "what": "none that this torch build can use"}]
    kind = torch.accelerator.current_accelerator().type  # type: ignore[union-attr]
    for index in range(torch.accelerator.device_count()):
        what = kind
        if kind == "cuda":
            properties = torch.cuda.get_device_properties(index)
            what = f"{properties.name}, {size(properties.total_memory)}, compute capability {properties.major}.{properties.minor}"
        found.append({"device": f"{kind}:{index}", "what": what})
    return found


def _encoders() -> dict[str, str]:
    """What quantizes and packs, by device."""
    from anybit.kernels.cpu import encoding, native

    why_not = native.why_not()
    return {"cpu": f"native, {encoding.level()}" if why_not is None else f"torch: {why_not}"}


def _missing() -> list[dict[str, str]]:
    """Optional packages that are not installed, with the line that installs them."""
    missing = []
    for line in metadata.requires("anybit") or []:
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", line)
        package = re.match(r"[\w.-]+", line)
        if (
            extra is None
            or package is None
            or extra.group(1) in FOR_DEVELOPERS
            or _version(package.group()) is not None
        ):
            continue
        missing.append({"package": package.group(), "install": f"pip install 'anybit[{extra.group(1)}]'"})
    return missing
