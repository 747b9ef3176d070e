"""Damaged GGUF files, without end: what opens lies inside the file, everything else is refused by an error of the library, fast.

    python tests/fuzz_gguf.py --seconds 600 --seed 7 [--keep DIR]

Files that do otherwise are kept, and named at the end. The corpus is tests/data/gguf_corpus and the models in
tests/golden/gguf; `test_gguf_fuzz.py` runs a few hundred of the same files every time.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import resource
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf_files

import anybit
from anybit.containers import Checkpoint
from anybit.errors import AnybitError
from anybit.methods import _gguf_imatrix
from anybit.methods._gguf_bundle import bundle_of

TESTS = Path(__file__).parent
WIDE = [0, 1, 2, 31, 32, 255, 256, 1 << 16, (1 << 31) - 1, 1 << 31, 1 << 32, 1 << 62, (1 << 64) - 1]
SLOW = 1.0  # seconds
LARGE = 256 << 20  # bytes more than at the start


def corpus() -> list[bytes]:
    files = [
        *sorted((TESTS / "data" / "gguf_corpus").glob("*.gguf")),
        *sorted((TESTS / "golden" / "gguf").glob("*/model.gguf")),
    ]
    return [file.read_bytes() for file in files]


def parts(big: bool) -> list[bytes]:
    """A small model in two files, in either byte order; damage reaches the keys by which they find each other."""
    metadata = {
        "general.architecture": "llama", "llama.block_count": 1, "llama.context_length": 16, "llama.embedding_length": 32,
        "llama.feed_forward_length": 32, "llama.attention.head_count": 2, "llama.attention.layer_norm_rms_epsilon": 1e-6,
    }  # fmt: skip
    names = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    tensors: list[Any] = [(f"blk.0.{name}.weight", (32, 32), 8, bytes(34 * 32)) for name in names]
    tensors += [(f"blk.0.{name}_norm.weight", (32,), 0, bytes(128)) for name in ("attn", "ffn")]
    ends = [("token_embd.weight", (32, 8), 0, bytes(1024)), ("output_norm.weight", (32,), 0, bytes(128))]
    return [
        gguf_files.build(
            {
                **(metadata if not number else {}), "split.no": (gguf_files.U16, number), "split.count": (gguf_files.U16, 2),
                "split.tensors.count": (gguf_files.I32, len(tensors) + len(ends)),
            },
            own, big=big,
        )
        for number, own in enumerate((ends, tensors))
    ]  # fmt: skip


def damaged(chance: random.Random, whole: bytes, other: bytes) -> bytes:
    """One to six changes, most of them in the header."""
    content = bytearray(whole)
    for _ in range(chance.randint(1, 6)):
        limit = min(len(content), chance.choice([32, 400, 4000, 40000, len(content)])) or 1
        place = chance.randrange(limit)
        kind = chance.randrange(7)
        if kind == 0:
            content[place : place + 8] = struct.pack("<Q", chance.choice(WIDE))
        elif kind == 1:
            content[place : place + 4] = struct.pack("<I", chance.choice([*range(14), *range(35, 44), 99, 1 << 31]))
        elif kind == 2:
            content[place : place + 1] = bytes([chance.randrange(256)])
        elif kind == 3:
            del content[place : place + chance.randint(1, 64)]
        elif kind == 4:
            content[place:place] = chance.randbytes(chance.randint(1, 64))
        elif kind == 5:
            start = chance.randrange(len(other))
            content[place : place + 200] = other[start : start + chance.randint(1, 200)]
        else:
            del content[place:]
        content = content or bytearray(b"G")
    return bytes(content)


def run(file: Path) -> None:
    """Everything that a load does before it asks for weights, and the weights themselves."""
    try:
        with Checkpoint.open(file) as checkpoint:
            for name, info in checkpoint.tensors.items():
                assert info.offset + info.nbytes <= Path(info.file).stat().st_size, name
                assert checkpoint.read(name).nbytes == info.nbytes, name
            if "general.architecture" in checkpoint.values:
                bundle = bundle_of(checkpoint)
                for derived in bundle.tensors.values():
                    assert all(source in checkpoint.tensors for source in derived.sources)
                bundle.files()
    except AnybitError:
        pass
    with contextlib.suppress(AnybitError):
        _gguf_imatrix.read(str(file), Checkpoint.another)


def fuzz(seed: int, folder: Path) -> Iterator[tuple[bytes, str]]:
    """(file, what was wrong with it, or "") without end; the same ones for the same seed."""
    chance, files = random.Random(seed), corpus()
    (folder / "whole.gguf").write_bytes(files[-1])
    with contextlib.suppress(Exception):
        run(folder / "whole.gguf")  # imports are not counted
    split = [parts(big) for big in (False, True)]
    for number, pair in enumerate(split):
        written = _written(folder, pair)
        with Checkpoint.open(written) as checkpoint:
            assert bundle_of(checkpoint).tensors, f"pair {number} is no model"
    while True:
        if chance.random() < 0.2:
            pair = list(chance.choice(split))
            which = chance.randrange(2)
            pair[which] = content = damaged(chance, pair[which], chance.choice(files))
            file = _written(folder, pair)
        else:
            content = damaged(chance, chance.choice(files), chance.choice(files))
            file = folder / "fuzz.gguf"
            file.write_bytes(content)
        before, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        wrong = ""
        try:
            run(file)
        except Exception:  # whatever it is, it is what this looks for
            wrong = traceback.format_exc(limit=-3)
        if time.process_time() - before > SLOW:
            wrong += f"{time.process_time() - before:.1f} s"
        if (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * 1024 > LARGE:
            wrong += "too much memory"
        yield content, wrong


def _written(folder: Path, pair: list[bytes]) -> Path:
    """Two parts beside each other; the first one's file."""
    for number, content in enumerate(pair):
        (folder / f"fuzz-{number + 1:05d}-of-00002.gguf").write_bytes(content)
    return folder / "fuzz-00001-of-00002.gguf"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-gguf"))
    options: Any = parser.parse_args(arguments)
    end, count, kept = time.monotonic() + options.seconds, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        for content, wrong in fuzz(options.seed, Path(folder)):
            count += 1
            if wrong:
                options.keep.mkdir(parents=True, exist_ok=True)
                (options.keep / f"{options.seed}-{count}.gguf").write_bytes(content)
                print(f"{options.keep}/{options.seed}-{count}.gguf\n{wrong}", file=sys.stderr)
                kept += 1
            if time.monotonic() > end:
                break
    print(f"anybit {anybit.__version__}: {count} files, {kept} of them not refused as they should be")
    return 1 if kept else 0


if __name__ == "__main__":
    sys.exit(main())
