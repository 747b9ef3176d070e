"""One program that runs a model, in a process of its own: `python candidate.py KIND PATH THREADS`, commands on standard input.

Each line in is a JSON command, each line out its answer; what libraries print goes to standard error.
    (at start)                      -> {"imports": s, "load": s, "peak": bytes, "before": bytes, "versions": ...}
    {"do": "decode", "tokens": n}   -> {"seconds": [one per token]}     batch 1, a static cache where the program has one
    {"do": "prefill", "tokens": n}  -> {"seconds": s}                   one sequence
It runs in the peer's own environment, so it imports nothing of this repository, except where the KIND is anybit's.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

CACHE, PROMPT = 512, 16
answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)


def resident(kind: str) -> int:
    """Bytes: VmHWM the peak since the start, VmRSS now. 0 where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(kind))


class Transformers:
    """A model of transformers' classes, however it was made."""

    packages: tuple[str, ...] = ()

    def __init__(self, kind: str, path: str, threads: int):
        import torch
        import transformers
        from transformers import AutoModelForCausalLM  # noqa: F401 (the import counts)
        from transformers.models.llama.modeling_llama import LlamaForCausalLM  # noqa: F401

        self.torch, self.transformers, self.kind = torch, transformers, kind
        torch.set_num_threads(threads)
        getattr(self, f"import_{kind.partition('-')[0]}", lambda: None)()

    def import_anybit(self) -> None:
        import anybit.engine.load  # noqa: F401

        self.packages = ("anybit",)

    def import_bitsandbytes(self) -> None:
        import bitsandbytes  # noqa: F401

        self.packages = ("bitsandbytes",)

    def import_gptqmodel(self) -> None:
        import gptqmodel  # noqa: F401

        self.packages = ("gptqmodel",)

    def import_torchao(self) -> None:
        import torchao.quantization  # noqa: F401

        self.packages = ("torchao",)

    def import_quanto(self) -> None:
        import optimum.quanto  # noqa: F401

        self.packages = ("optimum-quanto",)

    def import_hqq(self) -> None:
        import hqq.core.quantize  # noqa: F401

        self.packages = ("hqq",)

    def load(self, path: str) -> None:
        torch, kind = self.torch, self.kind
        dense = {"dtype": torch.bfloat16}
        auto = self.transformers.AutoModelForCausalLM
        if kind.startswith("anybit"):
            import anybit
            from anybit.kernels import set_accuracy

            _, accuracy, scheme = [*kind.split("-", 2), ""][:3]
            set_accuracy(accuracy)
            own = None
            if scheme.startswith("make-"):
                from anybit.quantizers.named import from_scheme

                own = from_scheme(scheme.removeprefix("make-"))
            self.model = anybit.load(path, own, dtype=torch.bfloat16)
        elif kind == "gptqmodel":
            from gptqmodel import GPTQModel

            self.model = GPTQModel.load(path, device="cpu", dtype=torch.bfloat16).model
        elif kind == "bitsandbytes-make":
            config = self.transformers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
            )
            self.model = auto.from_pretrained(path, quantization_config=config, device_map="cpu", **dense)
        elif kind == "torchao-make-int8":
            from torchao.quantization import Int8WeightOnlyConfig, quantize_

            self.model = auto.from_pretrained(path, **dense)
            quantize_(self.model, Int8WeightOnlyConfig())
        elif kind == "quanto-make-int4":
            from optimum.quanto import freeze, qint4, quantize

            self.model = auto.from_pretrained(path, **dense)
            quantize(self.model, weights=qint4, exclude="lm_head")
            freeze(self.model)
        elif kind == "hqq-make-int4":
            config = self.transformers.HqqConfig(nbits=4, group_size=64)
            self.model = auto.from_pretrained(path, quantization_config=config, device_map="cpu", **dense)
        else:  # dense, or packed by a method that transformers loads itself
            self.model = auto.from_pretrained(path, device_map="cpu", **dense)
        self.model.eval()

    def _step(self, ids: Any) -> Any:
        return self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits

    def decode(self, tokens: int) -> list[float]:
        torch, found = self.torch, []
        self.cache = self.transformers.StaticCache(config=self.model.config, max_cache_len=CACHE)
        with torch.inference_mode():
            token = self._step(torch.arange(3, 3 + PROMPT).view(1, -1))[:, -1:].argmax(-1)
            for _ in range(tokens):
                start = time.perf_counter()
                token = self._step(token)[:, -1:].argmax(-1)
                found.append(time.perf_counter() - start)
        return found

    def prefill(self, tokens: int) -> float:
        with self.torch.inference_mode():
            ids = self.torch.arange(3, 3 + tokens).view(1, -1)
            start = time.perf_counter()
            self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
            return time.perf_counter() - start


class LlamaCpp:
    """llama.cpp through llama-cpp-python. Files have no vocabulary, which it accepts."""

    packages = ("llama_cpp_python",)

    def __init__(self, kind: str, path: str, threads: int):
        import llama_cpp

        self.llama_cpp, self.threads = llama_cpp, threads

    def load(self, path: str) -> None:
        self.model = self.llama_cpp.Llama(
            path, n_ctx=CACHE, n_batch=CACHE, n_ubatch=CACHE, n_threads=self.threads, n_threads_batch=self.threads, verbose=False
        )  # fmt: skip

    def decode(self, tokens: int) -> list[float]:
        self.model.reset()
        self.model.eval(list(range(3, 3 + PROMPT)))
        found, token = [], 5
        for _ in range(tokens):
            start = time.perf_counter()
            self.model.eval([token])
            found.append(time.perf_counter() - start)
            token = (token * 7 + 11) % 31000
        return found

    def prefill(self, tokens: int) -> float:
        self.model.reset()
        start = time.perf_counter()
        self.model.eval(list(range(3, 3 + tokens)))
        return time.perf_counter() - start


def main() -> None:
    kind, path, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    start = time.perf_counter()
    candidate: Any = (LlamaCpp if kind == "llama.cpp" else Transformers)(kind, path, threads)
    imported, before = time.perf_counter(), resident("VmRSS")
    candidate.load(path)
    loaded = time.perf_counter()
    names = ("torch", "transformers", *candidate.packages)
    versions = {name: importlib.metadata.version(name) for name in names if _installed(name)}
    facts = {"imports": imported - start, "load": loaded - imported, "before": before, "peak": resident("VmHWM")}
    print(json.dumps({**facts, "versions": versions}), file=answers, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps({"seconds": getattr(candidate, command["do"])(command["tokens"])}), file=answers, flush=True)


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
