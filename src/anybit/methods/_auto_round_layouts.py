"""How AutoRound stores one weight: as GPTQ or AWQ do, with codes chosen by its own rules. No method of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from anybit._lazy import torch
from anybit.methods import _awq_layout as awq
from anybit.methods import _gptq_layout as gptq
from anybit.methods._words import read_codes

if TYPE_CHECKING:
    from torch import Tensor

    from anybit.weight.layout import ModuleInfo

GptqLayout = gptq.GptqLayout
SMALLEST = 1e-5  # scale


@dataclass(frozen=True)
class AutoRoundGptqLayout(gptq.GptqLayout):
    """GPTQ's tensors, continuous streams in all widths. `zeros`: "v2" stores the zero, the others subtract one."""

    index: str = "absent"

    @property
    def algorithm(self) -> str:  # type: ignore[override]
        return "scale_search" if self.symmetric else "rtn"

    def algorithm_options(self) -> dict[str, object]:
        return _options(self.bits, self.symmetric, self.dtype)


@dataclass(frozen=True)
class AutoRoundAwqLayout(awq.AwqGemmLayout):
    """AWQ's gemm tensors, interleaved in all widths."""

    @property
    def algorithm(self) -> str:  # type: ignore[override]
        return "scale_search" if self.symmetric else "rtn"

    def algorithm_options(self) -> dict[str, object]:
        return _options(self.bits, self.symmetric, self.dtype)


def layout(
    module: ModuleInfo, arrangement: str, bits: int, group_size: int, symmetric: bool
) -> AutoRoundGptqLayout | AutoRoundAwqLayout:
    """The layout of a new weight, or of a stored one before its zero points are looked at."""
    if arrangement == "awq":
        return AutoRoundAwqLayout(module.shape, module.dtype, bits, group_size, symmetric=symmetric)
    return AutoRoundGptqLayout(
        module.shape, module.dtype, bits, group_size, symmetric=symmetric,
        zeros="v1_agreed" if arrangement == "gptq" else "v2",
        index="plain" if arrangement == "indexed" else "absent",
    )  # fmt: skip


def with_evidence(
    found: gptq.GptqLayout, module: ModuleInfo, stored: Mapping[str, Any], peek: Callable[[str], Any]
) -> gptq.GptqLayout:
    """The layout of stored tensors, completed by what they hold: an index, and zero points of 2**bits."""
    if "g_idx" in stored and (stored["g_idx"].dtype, tuple(stored["g_idx"].shape)) != ("int32", (module.shape[1],)):
        found = replace(found, index="plain")  # the plan names what is wrong with it
    elif "g_idx" in stored:
        index = peek("g_idx")
        plain = torch.arange(module.shape[1], dtype=torch.int32) // found.group_size
        found = replace(found, index="plain" if torch.equal(index, plain) else "columns")
    if found.zeros == "v1_agreed":
        fields = read_codes(peek("qzeros"), found.bits, module.shape[0], f"{module.name}.qzeros").integers()
        if bool((fields == (1 << found.bits) - 1).any()):  # auto-round adds one without cutting the sum off
            return replace(found, zeros="v1_unmasked")
    return found


def stored_middle(words: Tensor, bits: int, rows: int) -> str | None:
    """The arrangement whose zero points of symmetric codes these are: "gptq", "plain", or None for neither."""
    fields, middle = read_codes(words, bits, rows, "qzeros").integers(), 1 << (bits - 1)
    for arrangement, value in (("gptq", middle - 1), ("plain", middle)):
        if bool((fields == value).all()):
            return arrangement
    return None


def _options(bits: int, symmetric: bool, dtype: str) -> dict[str, object]:
    if symmetric:
        return {}
    # scales are float16, so quotients are float16 for float16 weights and float32 for all others
    arithmetic = "float16" if dtype == "float16" else "float32"
    return {"ranges": partial(asymmetric_ranges, bits=bits, dtype=dtype), "arithmetic": arithmetic}


def asymmetric_ranges(low: Tensor, high: Tensor, *, bits: int, dtype: str) -> dict[str, Tensor]:
    """AutoRound's scale, rounded to float16, and zero point. The range is taken in the dtype of the dense weight."""
    kind: torch.dtype = getattr(torch, dtype)
    low, high = low.clamp(max=0), high.clamp(min=0)
    top = (1 << bits) - 1
    scale = ((high.to(kind) - low.to(kind)) / top).to(torch.float16).clamp(min=SMALLEST).to(low.dtype)
    # a tiny scale, rounded down to float16, could put the zero one beyond the last code
    return {"scale": scale, "zero": (torch.round(-low / scale) + 0).clamp(max=top)}
