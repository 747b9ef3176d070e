"""The rules of `recommend`: one table. Facts about a method live in its own file; these say how facts are judged.

Quality. Every named scheme was made of the bundled model without calibration (`benchmarks/scheme_quality.py`); its KL from the
dense model, in nats per token, puts it into a class. Larger models lose less, so a class is a bound rather than a promise. A
scheme that was not measured (a plugin's) is placed by its bits per weight, and says so.

Speed. Writing one token reads every weight once, so memory bandwidth bounds it: bandwidth (measured here, or assumed for devices
that this machine does not have) over the bytes that are read. A weight that only the reference kernel takes is decoded to float32
first. The class compares with the dense model.

Order. Quality class, then speed class, then memory in steps of 5 %, then how many programs read it, then memory. A candidate
that does not fit, or that a wish excludes, comes after all others with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping

# (largest KL, class), best first
QUALITY: tuple[tuple[float, str], ...] = (
    (0.002, "nearly lossless"),
    (0.01, "very good"),
    (0.025, "good"),
    (0.1, "noticeable loss"),
    (float("inf"), "heavy loss"),
)
# (smallest bits per weight, class) for schemes that were never measured
QUALITY_BY_BITS: tuple[tuple[float, str], ...] = (
    (7.5, "nearly lossless"),
    (4.25, "very good"),
    (3.5, "good"),
    (2.75, "noticeable loss"),
    (0.0, "heavy loss"),
)
# (smallest ratio to the dense model's tokens per second, class), fastest first
SPEED: tuple[tuple[float, str], ...] = ((1.3, "faster"), (0.75, "like dense"), (0.25, "slower"), (0.0, "much slower"))
# the reference kernel writes a weight as float32 and reads it again
REFERENCE_BYTES_PER_WEIGHT = 8
MEMORY_STEP = 1.05
# bytes per second where it cannot be measured: a mid-range device of the kind
ASSUMED_BANDWIDTH: Mapping[str, float] = {"cpu": 40e9, "cuda": 900e9, "mps": 200e9, "xpu": 450e9}
UNKNOWN_BANDWIDTH = 100e9
# devices' own run time (a CUDA context, say)
DEVICE_RUNTIME_BYTES = 500 << 20
DEFAULT_CONTEXT = 2048
DEFAULT_TRAINING_CONTEXT = 512
TARGETS = ("transformers", "vllm", "llama.cpp", "mlx")


def quality_by_kl(kl: float) -> str:
    """The class of a measured KL."""
    return next(name for most, name in QUALITY if kl <= most)


def quality_by_bits(bits: float) -> str:
    """The class of a scheme that was never measured."""
    return next(name for least, name in QUALITY_BY_BITS if bits >= least)


def speed_class(ratio: float) -> str:
    """The class of a ratio to the dense model's speed."""
    return next(name for least, name in SPEED if ratio >= least)


QUALITY_RANK = {name: rank for rank, (_, name) in enumerate(QUALITY)}
SPEED_RANK = {name: rank for rank, (_, name) in enumerate(SPEED)}
