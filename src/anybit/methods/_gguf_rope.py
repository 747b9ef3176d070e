"""Rotary frequencies of a GGUF file in the words of transformers' `rope_parameters`.

Scaled frequencies come as metadata (linear, yarn) or as tensors of divisors: `rope_freqs` (llama 3's rule, worked out) and
`rope_factors_short` / `_long`. Divisors that llama 3's rule gives are written as that rule; any others as longrope, which
takes them as they are.
"""

from __future__ import annotations

import math
from typing import Any

from anybit.methods._gguf_metadata import Metadata, shortest

TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def rope_parameters(m: Metadata, head_dim: int) -> dict[str, Any]:
    """`rope_parameters` of a model whose heads have `head_dim` channels."""
    rotated = m.whole("rope.dimension_count", head_dim)
    if rotated > head_dim:
        m.fail(f"rope.dimension_count is {rotated}, but a head has {head_dim} channels")
    found: dict[str, Any] = {"rope_theta": m.number("rope.freq_base", 10_000.0), "rope_type": "default"}
    if rotated < head_dim:
        found["partial_rotary_factor"] = rotated / head_dim
    kind = m.text("rope.scaling.type", "none")
    original = m.whole("rope.scaling.original_context_length", m.whole("context_length"))
    if "rope_freqs.weight" in m.tensors:
        divisors = _divisors(m, "rope_freqs.weight", rotated)
        if all(divisor == 1 for divisor in divisors):
            return found
        rule = _llama3(divisors, found["rope_theta"], rotated)
        if rule is not None:
            return {**found, **rule}
        return {**found, **_long(m, divisors, divisors, original, 1.0)}
    if "rope_factors_long.weight" in m.tensors or "rope_factors_short.weight" in m.tensors:
        long, short = (_divisors(m, f"rope_factors_{length}.weight", rotated) for length in ("long", "short"))
        return {**found, **_long(m, long, short, original, _attention_factor(m, original))}
    if kind == "linear":
        found.update(rope_type="linear", factor=m.number("rope.scaling.factor"))
    elif kind == "yarn":
        found.update(
            rope_type="yarn",
            factor=m.number("rope.scaling.factor"),
            original_max_position_embeddings=original,
            beta_fast=m.number("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=m.number("rope.scaling.yarn_beta_slow", 1.0),
            # llama.cpp rounds the limits of the ramp only for models that say so, which files do not record
            truncate=m.architecture != "gpt-oss",
        )
    elif kind == "none" and m.has("rope.scale_linear") and m.number("rope.scale_linear") != 1:
        found.update(rope_type="linear", factor=m.number("rope.scale_linear"))
    elif kind != "none":
        m.refuse(
            f"rope.scaling.type is {kind!r}, and no tensor of the file holds its factors; linear, yarn, longrope with its "
            "factors and none are understood"
        )
    return found


def _divisors(m: Metadata, name: str, rotated: int) -> list[float]:
    if name not in m.tensors:
        m.fail(f"there is no tensor {name!r}, though its twin is stored")
    info = m.tensors[name]
    if info.dtype != "float32" or tuple(info.shape) != (rotated // 2,):
        m.fail(f"tensor {name!r} is {info.dtype} {tuple(info.shape)}, expected float32 ({rotated // 2},)")
    values = [shortest(value) for value in m.read(name).tolist()]
    if not all(math.isfinite(value) and value > 0 for value in values):
        m.fail(f"tensor {name!r} holds numbers that are no divisors: {values[:8]}")
    return values


def _long(m: Metadata, long: list[float], short: list[float], original: int, attention: float) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "long_factor": long,
        "short_factor": short,
        "factor": max(m.whole("context_length") / original, 1.0),
        "original_max_position_embeddings": original,
        "attention_factor": attention,
    }


def _attention_factor(m: Metadata, original: int) -> float:
    if m.has("rope.scaling.attn_factor"):
        return m.number("rope.scaling.attn_factor")
    scale = m.whole("context_length") / original
    return math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 and original > 1 else 1.0


def _llama3(divisors: list[float], theta: float, rotated: int) -> dict[str, Any] | None:
    """The settings of llama 3's rule that give these divisors, or None."""
    factor = max(divisors)
    for original in (1 << power for power in range(24, 2, -1)):
        for high in (4.0, 2.0, 8.0):
            wanted = llama3_divisors(theta, rotated, factor, 1.0, high, original)
            if all(math.isclose(one, two, rel_tol=2e-6) for one, two in zip(divisors, wanted, strict=True)):
                return {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": high,
                    "original_max_position_embeddings": original,
                }
    return None


def llama3_divisors(theta: float, rotated: int, factor: float, low: float, high: float, original: int) -> list[float]:
    """Llama 3's rule, a divisor for each pair of channels."""
    found = []
    for channel in range(0, rotated, 2):
        wavelength = 2 * math.pi * theta ** (channel / rotated)
        if wavelength < original / high:
            found.append(1.0)
        elif wavelength > original / low:
            found.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return found
