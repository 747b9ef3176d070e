"""The rows of the scoreboard: every way that anybit or a vendor's package has to choose codes, at 8, 4, 3 and 2 bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

GROUP = 64  # where a format lets one choose
STEPS = 50  # of AutoRound, ours and theirs; its default is 200


@dataclass(frozen=True)
class Way:
    """One row. `config` and `options`: the configuration class and its arguments. `algorithm` None: without calibration; "": the
    method's own.

    `peer`: the package that makes it (a function of peers.py) instead of anybit, with `options`.
    """

    name: str
    bits: int
    config: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    algorithm: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    peer: str = ""

    @property
    def key(self) -> str:
        return f"{self.name} {self.bits}bit" + (f" by {self.peer}" if self.peer else "")


TUNED = {"steps": STEPS, "batch": 4}
# algorithm and its arguments, by the name of the row
ROUNDINGS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "rtn": (None, {}),
    "gptq": ("gptq", {}),
    "gptq, mse 2.4": ("gptq", {"mse": 2.4}),
    "autoround": ("autoround", TUNED),
    "awq": ("awq", {}),
    "awq+gptq": ("awq+gptq", {}),
}
# schemes of anybit that need data, and ModelOpt's own recipes for them
MODELOPT = {
    "modelopt-fp8": (8, "FP8_DEFAULT_CFG"),
    "modelopt-w8a8-sq": (8, "INT8_SMOOTHQUANT_CFG"),
    "modelopt-nvfp4": (4, "NVFP4_DEFAULT_CFG"),
    "modelopt-w4a8-awq": (4, "W4A8_AWQ_BETA_CFG"),
}


def _ours() -> Iterator[Way]:
    for bits in (8, 4, 3, 2):
        for name, (algorithm, arguments) in ROUNDINGS.items():
            if bits == 8 and "awq" in name:  # nothing is left to gain
                continue
            config = "AutoRoundConfig" if name == "autoround" else "GPTQConfig"
            yield Way(name, bits, config, {"bits": bits, "group_size": GROUP}, algorithm, arguments)
        mlx = {"bits": bits, "group_size": GROUP, "mode": "affine"}
        for name in ("rtn", "gptq, mse 2.4", "autoround") if bits < 8 else ("rtn",):
            algorithm, arguments = ROUNDINGS[name]
            yield Way(f"mlx {name}", bits, "MetalConfig", mlx, algorithm, arguments)
        if bits < 8:  # in AWQ's own format
            yield Way("awq, zero points", bits, "AwqConfig", {"bits": bits, "group_size": GROUP}, "awq")
        yield Way("hqq", bits, "HqqConfig", {"nbits": bits, "group_size": GROUP})
        yield Way("sinq", bits, "SinqConfig", {"nbits": bits, "group_size": GROUP})
    for bits, mixes in {8: ("Q8_0",), 4: ("Q4_0", "Q4_K_M", "IQ4_XS"), 3: ("Q3_K_M",), 2: ("Q2_K",)}.items():
        for mix in mixes:
            yield Way(f"gguf {mix}", bits, "GgufConfig", {"mix": mix})
            if mix not in ("Q8_0", "Q4_0"):
                yield Way(f"gguf {mix}, importance matrix", bits, "GgufConfig", {"mix": mix}, "ggml")
    for bits in (4, 2):
        yield Way("higgs", bits, "HiggsConfig", {"bits": bits})
    for bits in (8, 4, 2):
        yield Way("quanto", bits, "QuantoConfig", {"weights": f"int{bits}"})
        yield Way("gemma", bits, "GemmaQuantizationConfig", {"num_bits": bits})
    yield from _named()


def _named() -> Iterator[Way]:
    """Named schemes of methods that have few settings."""
    for bits, schemes in {
        8: "int8 eetq ct-w8a16 ct-w8a8 ct-fp8-dynamic ct-fp8-block ct-mxfp8a16 fbgemm-fp8 fp8 mxfp8 modelopt-fp8-pb quark-int8 "
        "quark-fp8-ptpc torchao-int8 torchao-float8 quanto-float8",
        4: "nf4 nf4-dq fp4 ct-w4a16 ct-w4a16-asym ct-nvfp4a16 ct-mxfp4a16 nvfp4 fouroversix fp-quant-nvfp4 fp-quant-mxfp4 "
        "quark-int4-g128 quark-uint4-g32 quark-mxfp4 modelopt-w4a16-int4 torchao-int4-g64 torchao-intx4-g32 mlx-mxfp4 mlx-nvfp4",
        3: "torchao-intx3-g32",
        2: "torchao-intx2-g32 bitnet",
    }.items():
        for scheme in schemes.split():
            yield Way(scheme, bits, "scheme")
    for algorithm in ("smoothquant", "smoothquant+gptq"):
        yield Way(f"ct-w8a8 {algorithm}", 8, "scheme ct-w8a8", {}, algorithm)
    for name, (bits, _) in MODELOPT.items():
        yield Way(name, bits, f"scheme {name}", {}, "")
    yield Way("spqr, calibrated", 3, "SpQRConfig", {}, "spqr")
    yield Way("aqlm-2x8, calibrated", 2, "scheme aqlm-2x8", {}, "aqlm")
    yield Way("vptq-v8-k256-256, calibrated", 2, "scheme vptq-v8-k256-256", {}, "vptq")
    yield Way("aqlm-2x8, fine-tuned", 2, "scheme aqlm-2x8", {}, "aqlm+finetune")
    yield Way("vptq-v8-k256-256, fine-tuned", 2, "scheme vptq-v8-k256-256", {}, "vptq+finetune")
    for bits in (3, 2):
        plain = {"bits": bits, "group_size": GROUP}
        yield Way("gptq, mse 2.4, fine-tuned", bits, "GPTQConfig", plain, "gptq+finetune", {"mse": 2.4})
    damped = {"mse": 2.4, "damp": 0.3}
    yield Way("mlx gptq, mse 2.4, damp 0.3", 2, "MetalConfig", {**plain, "mode": "affine"}, "gptq", damped)


def _theirs() -> Iterator[Way]:
    for bits in (8, 4, 3, 2):
        plain = {"bits": bits, "group_size": GROUP}
        yield Way("gptq", bits, options=plain, peer="gptqmodel")
        yield Way("gptq, mse 2.4", bits, options={**plain, "mse": 2.4}, peer="gptqmodel")
        yield Way("autoround", bits, options={**plain, "iters": STEPS}, peer="auto-round")
        yield Way("mlx rtn", bits, options=plain, peer="mlx-lm")
        yield Way("hqq", bits, options=plain, peer="hqq")
    for bits in (4, 3):
        yield Way("awq, zero points", bits, options={"bits": bits, "group_size": GROUP, "awq": True}, peer="gptqmodel")
    four = {"bits": 4, "group_size": GROUP}
    yield Way("gptq", 4, options={**four, "gptq": True}, peer="llm-compressor")
    yield Way("awq", 4, options={**four, "awq": True}, peer="llm-compressor")
    yield Way("awq, zero points", 4, options={**four, "awq": True, "symmetric": False}, peer="llm-compressor")
    for scheme, bits in {"W8A16": 8, "W8A8": 8, "FP8_DYNAMIC": 8, "W4A16": 4, "NVFP4A16": 4, "MXFP4A16": 4}.items():
        named = f"ct-{scheme.lower().replace('_', '-')}"
        yield Way(named, bits, options={"scheme": scheme}, peer="llm-compressor")
    for more in ({}, {"gptq": True}):
        name = "ct-w8a8 smoothquant" + "+gptq" * bool(more)
        yield Way(name, 8, options={"scheme": "W8A8", "smooth": True, **more}, peer="llm-compressor")
    for name, (bits, preset) in MODELOPT.items():
        yield Way(name, bits, options={"preset": preset}, peer="modelopt")
    for bits in (8, 4, 2):
        yield Way("quanto", bits, options={"bits": bits}, peer="optimum-quanto")
    yield Way("torchao-int8", 8, options={"kind": "Int8WeightOnlyConfig"}, peer="torchao")
    yield Way("torchao-intx4-g32", 4, options={"kind": "IntxWeightOnlyConfig", "bits": 4}, peer="torchao")
    yield Way("torchao-intx3-g32", 3, options={"kind": "IntxWeightOnlyConfig", "bits": 3}, peer="torchao")
    yield Way("torchao-intx2-g32", 2, options={"kind": "IntxWeightOnlyConfig", "bits": 2}, peer="torchao")
    for name, bits in (("int8", 8), ("nf4", 4), ("fp4", 4)):
        yield Way(name, bits, options={"kind": name}, peer="bitsandbytes")
    for mix, bits in (("Q8_0", 8), ("Q4_0", 4), ("Q4_K_M", 4), ("IQ4_XS", 4), ("Q3_K_M", 3), ("Q2_K", 2)):
        yield Way(f"gguf {mix}", bits, options={"mix": mix}, peer="llama.cpp")


def _order(way: Way) -> tuple[int, int]:
    if not way.algorithm and not way.peer:
        return 0, way.bits
    trained = "autoround" in way.name or "fine-tuned" in way.name or way.name.startswith(("aqlm", "vptq"))
    return 3 if way.bits == 8 else 2 if trained else 1, way.bits


# cheap ones first, then few bits, where ways differ: a run that is broken off has something of everything
WAYS: tuple[Way, ...] = tuple(sorted((*_ours(), *_theirs()), key=_order))
