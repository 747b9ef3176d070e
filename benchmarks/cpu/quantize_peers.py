"""Workers of quantize.py: one library each, asked over standard input to quantize a matrix once, answering with the seconds.

Runs under the interpreter that has the library, which needs nothing of anybit. A line of input is a scheme, a line of output is a
number. Every worker makes the same matrix; what a scheme makes is thrown away.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

Scheme = Callable[[], Any]
# enum ggml_type
GGML = {
    "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14,
    "IQ4_NL": 20, "IQ4_XS": 23, "TQ1_0": 34, "TQ2_0": 35, "MXFP4": 39,
}  # fmt: skip
UNWEIGHTED = ("Q8_0", "MXFP4", "TQ1_0", "TQ2_0")  # make no use of an importance


def matrix(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02


def importance(columns: int) -> torch.Tensor:
    return torch.rand(columns, generator=torch.Generator().manual_seed(1)) + 0.01


def anybit_schemes(dense: torch.Tensor) -> dict[str, Scheme]:
    """As `quantize` does it: dense -> weight -> stored tensors."""
    from anybit import (
        AwqConfig,
        BitsAndBytesConfig,
        FineGrainedFP8Config,
        GPTQConfig,
        Mxfp4Config,
        QuantoConfig,
        algorithms,
    )
    from anybit.methods._gguf_layout import GgufLayout
    from anybit.quantizers import AutoHfQuantizer
    from anybit.weight.layout import ModuleInfo

    half, shape = dense.to(torch.bfloat16), tuple(dense.shape)

    def by(layout: Any, source: torch.Tensor) -> Scheme:
        scheme, quantize = layout.scheme(), algorithms.get(layout.algorithm)
        return lambda: layout.encode(quantize(source, scheme, **layout.algorithm_options()))

    module = ModuleInfo("model.layers.0.mlp.up_proj", "linear", shape, "bfloat16")
    configs = {
        "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        "nf4 nested": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        "fp4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
        "llm.int8": BitsAndBytesConfig(load_in_8bit=True),
        "quanto int8": QuantoConfig(weights="int8"),
        "quanto int4": QuantoConfig(weights="int4"),
        "gptq int4 rtn": GPTQConfig(bits=4, group_size=128),
        "awq int4 rtn": AwqConfig(bits=4, group_size=128),
        "fp8 blocks": FineGrainedFP8Config(),
        "mxfp4": Mxfp4Config(),
    }
    found: dict[str, Scheme] = {}
    for name, config in configs.items():
        layout = AutoHfQuantizer.from_config(config, pre_quantized=False).layout_for(module)
        if layout is not None:
            found[name] = by(layout, half)
    for kind in GGML:
        found[kind] = by(GgufLayout(shape, "float32", kind), dense)
        if kind not in UNWEIGHTED:
            found[f"{kind} weighted"] = by(GgufLayout(shape, "float32", kind, importance=importance(shape[1])), dense)
    return found


def llama_cpp_schemes(dense: torch.Tensor) -> dict[str, Scheme]:
    """ggml_quantize_chunk over runs of rows, as many threads as torch has: what llama-quantize does with a tensor."""
    import llama_cpp

    library = ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.*"))))
    quantize = library.ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    library.ggml_quantize_init.argtypes = [ctypes.c_int]
    rows, columns = dense.shape
    raw = torch.empty(rows * columns * 2, dtype=torch.uint8)
    pool, threads = ThreadPoolExecutor(torch.get_num_threads()), torch.get_num_threads()
    step = max(1, -(-rows // (8 * threads)))

    def scheme(number: int, weights: torch.Tensor | None) -> Scheme:
        library.ggml_quantize_init(number)
        pointer = None if weights is None else weights.data_ptr()

        def piece(start: int) -> None:
            count = min(step, rows - start)
            quantize(number, dense.data_ptr(), raw.data_ptr(), start * columns, count, columns, pointer)

        def run() -> None:
            list(pool.map(piece, range(0, rows, step)))

        run.weights = weights  # type: ignore[attr-defined]
        return run

    found = {name: scheme(number, None) for name, number in GGML.items()}
    for name, number in GGML.items():
        if name not in UNWEIGHTED:
            found[f"{name} weighted"] = scheme(number, importance(columns))
    return found


def bitsandbytes_schemes(dense: torch.Tensor) -> dict[str, Scheme]:
    from bitsandbytes import functional

    half = dense.to(torch.bfloat16)
    rounded = dense.to(torch.float16)
    return {
        "nf4": lambda: functional.quantize_4bit(half, quant_type="nf4"),
        "nf4 nested": lambda: functional.quantize_4bit(half, quant_type="nf4", compress_statistics=True),
        "fp4": lambda: functional.quantize_4bit(half, quant_type="fp4"),
        "llm.int8": lambda: functional.int8_vectorwise_quant(rounded),
    }


def quanto_schemes(dense: torch.Tensor) -> dict[str, Scheme]:
    from optimum.quanto import AbsmaxOptimizer, MaxOptimizer, qint4, qint8, quantize_weight

    half = dense.to(torch.bfloat16)

    def eight() -> Any:
        return quantize_weight(half, qint8, 0, scale=AbsmaxOptimizer()(half, qtype=qint8, axis=0))

    def four() -> Any:
        scale, shift = MaxOptimizer()(half, qtype=qint4, axis=0, group_size=128)
        return quantize_weight(half, qint4, 0, scale=scale, shift=shift, group_size=128)

    return {"quanto int8": eight, "quanto int4": four}


def hqq_schemes(dense: torch.Tensor) -> dict[str, Scheme]:
    """Without its optimization: round to nearest, in groups of 128."""
    from hqq.core.quantize import Quantizer

    half = dense.to(torch.bfloat16)
    return {
        "gptq int4 rtn": lambda: Quantizer.quantize(
            half, nbits=4, group_size=128, optimize=False, device="cpu", compute_dtype=torch.bfloat16
        )
    }


WORKERS: dict[str, Callable[[torch.Tensor], dict[str, Scheme]]] = {
    "anybit": anybit_schemes,
    "llama.cpp": llama_cpp_schemes,
    "bitsandbytes": bitsandbytes_schemes,
    "quanto": quanto_schemes,
    "hqq": hqq_schemes,
}


def main() -> None:
    name, rows, columns, threads = sys.argv[1], *map(int, sys.argv[2:5])
    torch.set_num_threads(threads)
    schemes = WORKERS[name](matrix(rows, columns))
    print("\t".join(["schemes", *schemes]), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        schemes[line.strip()]()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
