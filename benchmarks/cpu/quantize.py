"""Quantizing on the CPU: gigabytes of source weight a second, by scheme, beside bitsandbytes, llama.cpp, quanto and hqq.

    python benchmarks/cpu/quantize.py [--peer llama.cpp=/venv/bin/python --peer bitsandbytes=...] [--threads 2] [-o FOLDER]

One matrix (--rows x --columns) is quantized by every library in a process of its own, in turns; medians of wall-clock time. A
peer is given as NAME=INTERPRETER that has the library; without peers only anybit is measured. The source is bfloat16, for GGUF
types float32, which is what llama.cpp's quantizer takes. All libraries get the same number of threads. anybit's time is that of
the algorithm and of putting the numbers into the tensors that are stored. Writes quantize.json and quantize.md into FOLDER.
About four minutes with all peers on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from products import machine
from quantize_peers import GGML, WORKERS

HERE = Path(__file__).parent


class Worker:
    """A library in a process of its own."""

    def __init__(self, name: str, interpreter: str, options: argparse.Namespace):
        self.name = name
        command = [interpreter, str(HERE / "quantize_peers.py"), name]
        command += [str(number) for number in (options.rows, options.columns, options.threads)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, bufsize=1
        )
        self.schemes = self._line().split("\t")[1:]

    def _line(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:  # libraries print things of their own
            if line.startswith("schemes\t") or line[:1].isdigit():
                return line.rstrip("\n")
        raise SystemExit(f"{self.name} stopped: {self.process.wait()}")

    def seconds(self, scheme: str) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(scheme + "\n")
        return float(self._line())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    facts = machine()
    peers = dict(peer.split("=", 1) for peer in options.peer)
    workers = [Worker("anybit", sys.executable, options)]
    workers += [Worker(name, interpreter, options) for name, interpreter in peers.items()]
    numbers, found = options.rows * options.columns, []
    for scheme in workers[0].schemes:
        if options.only and scheme.split()[0] not in options.only.split(","):
            continue
        taking_part = [worker for worker in workers if scheme in worker.schemes]
        times: dict[str, list[float]] = {worker.name: [] for worker in taking_part}
        for turn in range(options.repeats + 1):
            for worker in taking_part:
                seconds = worker.seconds(scheme)
                if turn:  # the first one warms up
                    times[worker.name].append(seconds)
            if turn >= 3 and sum(map(sum, times.values())) > options.seconds:
                break
        source = numbers * (4 if scheme.split()[0] in GGML else 2)
        medians = {name: statistics.median(own) for name, own in times.items()}
        entry: dict[str, Any] = {"scheme": scheme, "source_bytes": source, "repeats": len(times["anybit"])}
        entry["milliseconds"] = {name: round(1e3 * median, 3) for name, median in medians.items()}
        entry["gigabytes_per_second"] = {name: round(source / median / 1e9, 3) for name, median in medians.items()}
        entry["ratio"] = {
            name: round(median / medians["anybit"], 2) for name, median in medians.items() if name != "anybit"
        }
        found.append(entry)
        print(scheme, entry["gigabytes_per_second"], flush=True)
    for worker in workers:
        worker.close()
    shown = {name: getattr(options, name) for name in ("rows", "columns", "threads", "repeats")}
    return {"machine": {**facts, **shown}, "peers": sorted(peers), "schemes": found}


def table(result: dict[str, Any]) -> str:
    """GB/s of anybit and of the peer, and how many times as fast."""
    lines = [
        "# Quantizing on the CPU",
        "",
        "Gigabytes of source weight a second (bfloat16; float32 for GGUF types). `python benchmarks/cpu/quantize.py`",
        "",
        *(f"- {name}: {value}" for name, value in result["machine"].items()),
        "",
        "| scheme | anybit | peer | its GB/s | anybit is faster by |",
        "|---|---:|---|---:|---:|",
    ]
    for entry in result["schemes"]:
        speeds = entry["gigabytes_per_second"]
        for name in entry["ratio"] or [""]:
            own = [f"{speeds[name]:.2f}", f"{entry['ratio'][name]:.1f}x"] if name else ["", ""]
            lines.append(f"| {entry['scheme']} | {speeds['anybit']:.2f} | {name} | {own[0]} | {own[1]} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help=", ".join(list(WORKERS)[1:]))
    parser.add_argument("--rows", type=int, default=5632)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=5.0, help="of a scheme; at least three repeats are made")
    parser.add_argument("--only", default="", help="schemes, separated by commas; a weighted one by its type")
    parser.add_argument("-o", "--output", type=Path, default=HERE)
    options = parser.parse_args()
    for peer in options.peer:
        if peer.split("=")[0] not in list(WORKERS)[1:] or "=" not in peer:
            parser.error(f"--peer {peer}: NAME=INTERPRETER, where NAME is one of {', '.join(list(WORKERS)[1:])}")
    result = measure(options)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "quantize.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.output / "quantize.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
