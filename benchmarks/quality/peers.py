"""Vendors' packages choose the codes: run by scoreboard.py in an environment that has the package; nothing of anybit is imported.

    PYTHON peers.py PACKAGE OPTIONS.json MODEL CALIBRATION.json TARGET

`OPTIONS`: the row's. `CALIBRATION`: token ids, the same rows as anybit's. The last line printed is JSON: seconds, CPU seconds
and peak memory. docs/interop.md says how to make the environments.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Rows = list[list[int]]


def gptqmodel(model: Path, rows: Rows, target: Path, *, awq: bool = False, **options: Any) -> None:
    """GPTQ and AWQ, 16-bit as stored."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    if awq:
        options |= {"quant_method": "awq", "format": "gemm", "sym": False}
    own = GPTQModel.load(str(model), QuantizeConfig(offload_to_disk=False, **options), backend=BACKEND.AUTO)
    data = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
    own.quantize(data, batch_size=4, **({"backend": BACKEND.AWQ_TORCH} if awq else {}))
    own.save(str(target))


def auto_round(model: Path, rows: Rows, target: Path, *, bits: int, group_size: int, iters: int) -> None:
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    ids = torch.tensor(rows)
    data = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids]
    AutoRound(
        loaded, tokenizer, bits=bits, group_size=group_size, sym=True, iters=iters, seqlen=ids.shape[1], nsamples=len(ids),
        batch_size=4, dataset=data, device_map="cpu", enable_torch_compile=False,
    ).quantize_and_save(str(target), format="auto_round")  # fmt: skip


def mlx_lm(model: Path, rows: Rows, target: Path, *, bits: int, group_size: int) -> None:
    from mlx_lm import convert

    convert(str(model), mlx_path=str(target), quantize=True, q_bits=bits, q_group_size=group_size)


def _transformers(model: Path, target: Path, config: Any) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(model, quantization_config=config, device_map="cpu").save_pretrained(target)


def hqq(model: Path, rows: Rows, target: Path, *, bits: int, group_size: int) -> None:
    """Through hqq's own functions: today's transformers makes such checkpoints, and reads them wrongly."""
    import torch
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model)
    settings = BaseQuantizeConfig(nbits=bits, group_size=group_size, axis=1)
    AutoHQQHFModel.quantize_model(loaded, settings, compute_dtype=torch.bfloat16, device="cpu")
    target.mkdir()
    AutoHQQHFModel.save_quantized(loaded, str(target))


def optimum_quanto(model: Path, rows: Rows, target: Path, *, bits: int) -> None:
    import torch
    from optimum.quanto import QuantizedModelForCausalLM, qtypes
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    QuantizedModelForCausalLM.quantize(loaded, qtypes[f"qint{bits}"], exclude="lm_head").save_pretrained(str(target))


def torchao(model: Path, rows: Rows, target: Path, *, kind: str, bits: int = 8) -> None:
    import torch
    import torchao.quantization as ao
    from transformers import TorchAoConfig

    options = {}
    if kind == "IntxWeightOnlyConfig":
        options = {"weight_dtype": getattr(torch, f"int{bits}"), "granularity": ao.PerGroup(32)}
    _transformers(model, target, TorchAoConfig(getattr(ao, kind)(**options)))


def bitsandbytes(model: Path, rows: Rows, target: Path, *, kind: str) -> None:
    import torch
    from transformers import BitsAndBytesConfig

    four = {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_compute_dtype": torch.bfloat16}
    _transformers(model, target, BitsAndBytesConfig(**({"load_in_8bit": True} if kind == "int8" else four)))


def llm_compressor(
    model: Path,
    rows: Rows,
    target: Path,
    *,
    scheme: str = "",
    bits: int = 4,
    group_size: int = 0,
    symmetric: bool = True,
    awq: bool = False,
    smooth: bool = False,
    gptq: bool = False,
) -> None:
    """A named scheme, or weights of `bits` in groups; AWQ or SmoothQuant before, GPTQ instead of rounding to nearest."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
    from llmcompressor.pipelines.cache import IntermediatesCache
    from transformers import AutoModelForCausalLM, AutoTokenizer

    grid: dict[str, Any] = {"scheme": scheme}
    if not scheme:
        weights = QuantizationArgs(num_bits=bits, strategy="group", group_size=group_size, symmetric=symmetric)
        grid = {"config_groups": {"all": QuantizationScheme(targets=["Linear"], weights=weights)}}
    IntermediatesCache.pin_memory = lambda *given: None  # AWQ asks for it, and without an accelerator there is none
    rounding = (GPTQModifier if gptq else QuantizationModifier)(targets=["Linear"], ignore=["lm_head"], **grid)
    before = [AWQModifier()] if awq else [SmoothQuantModifier(smoothing_strength=0.5)] if smooth else []
    calibrated = bool(before) or gptq
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    data = Dataset.from_list([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows])
    seen = {"dataset": data, "max_seq_length": len(rows[0]), "num_calibration_samples": len(rows)} if calibrated else {}
    oneshot(model=loaded, processor=tokenizer, recipe=[*before, rounding], **seen)
    loaded.save_pretrained(str(target), save_compressed=True)


def modelopt(model: Path, rows: Rows, target: Path, *, preset: str) -> None:
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)

    def calibrate(own: Any) -> None:
        with torch.no_grad():
            for start in range(0, len(rows), 4):
                own(input_ids=torch.tensor(rows[start : start + 4]), use_cache=False)

    mtq.quantize(loaded, getattr(mtq, preset), calibrate)
    export_hf_checkpoint(loaded, export_dir=str(target))


def llama_cpp(model: Path, rows: Rows, target: Path, *, mix: str) -> None:
    """`model` is a GGUF file in 16 bit, made by anybit: llama.cpp's own converter is no package."""
    import ctypes

    from llama_cpp import llama_cpp as library

    options = library.llama_model_quantize_default_params()
    options.ftype, options.nthread = getattr(library, f"LLAMA_FTYPE_MOSTLY_{mix}"), 1
    target.mkdir()
    done = library.llama_model_quantize(
        str(model).encode(), str(target / f"{mix}.gguf").encode(), ctypes.byref(options)
    )
    assert done == 0, done


PEERS: dict[str, Callable[..., None]] = {
    "gptqmodel": gptqmodel, "auto-round": auto_round, "mlx-lm": mlx_lm, "hqq": hqq, "optimum-quanto": optimum_quanto,
    "llm-compressor": llm_compressor, "modelopt": modelopt, "torchao": torchao, "bitsandbytes": bitsandbytes,
    "llama.cpp": llama_cpp,
}  # fmt: skip


def main() -> None:
    os.environ.update(GPTQMODEL_CPU_WORKERS="2", GPTQMODEL_DISABLE_PACK_EXT="1", TORCH_COMPILE_DISABLE="1")
    package, options, model, calibration, target = sys.argv[1:]
    rows = json.loads(Path(calibration).read_text())
    begin, busy = time.perf_counter(), time.process_time()
    PEERS[package](Path(model), rows, Path(target), **json.loads(options))
    used = {
        "seconds": round(time.perf_counter() - begin, 1),
        "cpu_seconds": round(time.process_time() - busy, 1),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6),
    }
    print("\n" + json.dumps(used), flush=True)
    os._exit(0)  # gptqmodel's workers would outlive the work


if __name__ == "__main__":
    main()
