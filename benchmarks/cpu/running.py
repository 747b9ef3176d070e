"""What the benchmarks of whole models share: candidates in processes of their own, facts of the machine, Markdown."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
QUIET = {  # settings under which a peer runs on a machine without a GPU or a compiler at hand
    "gptqmodel": {"GPTQMODEL_CPU_WORKERS": "2", "GPTQMODEL_DISABLE_PACK_EXT": "1", "TORCH_COMPILE_DISABLE": "1"},
}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A program and what it runs. `peer`: whose interpreter it needs; `scheme`: what it loads, "dense" for bfloat16."""

    label: str
    kind: str
    peer: str | None
    scheme: str


class Running:
    """A candidate that has loaded its model and waits for commands."""

    def __init__(self, candidate: Candidate, python: str, path: Path, threads: int, seconds: float = 900):
        self.candidate = candidate
        own = QUIET.get(candidate.peer or "", {})
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", **own}
        command = [python, str(HERE / "candidate.py"), candidate.kind, str(path), str(threads)]
        self.log = open(log_file(candidate), "w")  # noqa: SIM115 (closed in stop)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment
        )
        self.facts = self._answer(seconds)

    def _answer(self, seconds: float) -> dict[str, Any]:
        import select

        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        line = self.process.stdout.readline() if ready else ""
        if not line:
            self.stop()
            lines = log_file(self.candidate).read_text().strip().splitlines() or [f"no answer in {seconds:.0f} s"]
            raise RuntimeError(f"{self.candidate.label}: {lines[-1][:300]}")
        found: dict[str, Any] = json.loads(line)
        return found

    def do(self, what: str, tokens: int, seconds: float = 300) -> Any:
        """The answer's seconds."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": what, "tokens": tokens}) + "\n")
        self.process.stdin.flush()
        return self._answer(seconds)["seconds"]

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()


def log_file(candidate: Candidate) -> Path:
    import tempfile

    name = "".join(letter if letter.isalnum() else "_" for letter in candidate.label)
    return Path(tempfile.gettempdir()) / f"anybit-benchmark-{os.getpid()}-{name}.log"


def interpreters(options: list[str]) -> dict[str, str]:
    """--peer NAME=PYTHON, checked."""
    found: dict[str, str] = {}
    for option in options:
        name, _, python = option.partition("=")
        if not Path(python).exists():
            print(f"{option}: no such interpreter; {name} is left out", file=sys.stderr)
            continue
        found[name] = python
    return found


def wake(path: Path) -> None:
    """Read a checkpoint once, so that the first candidate does not pay for the disk."""
    for file in [path] if path.is_file() else sorted(path.iterdir()):
        with open(file, "rb", buffering=0) as handle:
            while handle.read(1 << 24):
                pass


def machine(threads: int) -> dict[str, Any]:
    """What the numbers depend on."""
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), model)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gb": round(memory / 1e9, 1),
        "load_before": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "system": platform.platform(),
        "date": time.strftime("%Y-%m-%d"),
    }


def sentence(facts: dict[str, Any]) -> str:
    """The machine, in Markdown."""
    return f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, load {facts['load_before']} before the run"


def write(folder: Path, name: str, result: dict[str, Any], markdown: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    (folder / f"{name}.md").write_text(markdown)
    print(markdown)


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table; all columns but the first to the right."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]
