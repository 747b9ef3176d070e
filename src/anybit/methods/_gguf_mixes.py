"""llama.cpp's mixes by name: which block type every tensor of a file gets, by its place in the model."""

from __future__ import annotations

import re
from dataclasses import dataclass

from anybit.weight.block_types import BY_NAME

# mix -> (its number in general.file_type, the type of most tensors); F32, F16 and BF16 quantize nothing
MIXES: dict[str, tuple[int, str]] = {
    "F32": (0, ""), "F16": (1, ""), "BF16": (32, ""),
    "Q4_0": (2, "Q4_0"), "Q4_1": (3, "Q4_1"), "Q5_0": (8, "Q5_0"), "Q5_1": (9, "Q5_1"), "Q8_0": (7, "Q8_0"),
    "Q2_K": (10, "Q2_K"), "Q3_K_S": (11, "Q3_K"), "Q3_K_M": (12, "Q3_K"), "Q3_K_L": (13, "Q3_K"),
    "Q4_K_S": (14, "Q4_K"), "Q4_K_M": (15, "Q4_K"), "Q5_K_S": (16, "Q5_K"), "Q5_K_M": (17, "Q5_K"), "Q6_K": (18, "Q6_K"),
    "IQ4_NL": (25, "IQ4_NL"), "IQ4_XS": (30, "IQ4_XS"), "TQ1_0": (36, "TQ1_0"), "TQ2_0": (37, "TQ2_0"),
    "MXFP4_MOE": (38, "MXFP4"),
}  # fmt: skip
# what a file of one type says of itself
FILE_TYPES = {
    **{kind: number for number, kind in MIXES.values()},
    **{name: number for name, (number, _) in MIXES.items()},
}
# the type a row gets that is not whole blocks of 256
NARROWER = {
    "Q2_K": "Q4_0", "Q3_K": "Q4_0", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
    "IQ4_XS": "IQ4_NL",
}  # fmt: skip
NEVER = re.compile(r"_norm\.weight$|ffn_gate_inp\.weight$|^position_embd\.weight$|^token_types\.weight$")


@dataclass(frozen=True)
class Facts:
    """What a mix depends on."""

    mix: str
    architecture: str
    blocks: int
    shared: int  # query heads for each key head
    experts: int = 0
    tied: bool = False
    weighted: bool = False  # there is an importance matrix

    def type_of(self, name: str, columns: int, stacked: bool = False) -> str | None:
        """The block type of a tensor by its GGUF name; None for one that stays dense. `stacked`: it holds experts."""
        base = MIXES[self.mix][1]
        if not base or NEVER.search(name):
            return None
        return fitting(self._wanted(name, columns, stacked, base), columns)

    def _more_bits(self, block: int) -> bool:
        eighth = self.blocks // 8
        return block < eighth or block >= 7 * self.blocks // 8 or (block - eighth) % 3 == 2

    def _wanted(self, name: str, columns: int, stacked: bool, base: str) -> str:
        match = re.match(r"blk\.(\d+)\.(.+)\.weight$", name)
        block, own = (int(match[1]), match[2]) if match else (0, name.removesuffix(".weight"))
        if own == "output" or (own == "token_embd" and self.tied):
            if self.mix == "MXFP4_MOE" or base == "Q8_0" or columns % BY_NAME[base].elements:
                return "Q8_0"
            return "Q6_K"
        if self.mix == "MXFP4_MOE":
            return base if stacked else "Q8_0"
        if own == "token_embd":
            return "Q4_K" if self.mix in ("TQ1_0", "TQ2_0") else base
        if own in ("attn_v", "attn_qkv"):
            return self._values(block, base)
        if own == "attn_k" and self.experts == 8:
            return "Q8_0"
        if own.startswith("ffn_down"):
            return self._down(block, base)
        if own == "attn_output":
            if self.experts == 8:
                return (
                    "Q5_K" if self.mix in ("Q2_K", "Q3_K_S", "Q3_K_M", "IQ4_NL", "IQ4_XS", "Q4_K_S", "Q4_K_M") else base
                )
            return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(self.mix, base)
        return base

    def _values(self, block: int, base: str) -> str:
        """Small where heads share them, and sensitive."""
        many = self.shared >= 4
        found = base
        if self.mix == "Q2_K":
            found = "Q4_K" if many else "Q3_K"
        elif self.mix == "Q3_K_M":
            found = "Q5_K" if block < 2 else "Q4_K"
        elif self.mix == "Q3_K_L" or (self.mix in ("IQ4_NL", "IQ4_XS") and many):
            found = "Q5_K"
        elif self.mix in ("Q4_K_M", "Q5_K_M") and self._more_bits(block):
            found = "Q6_K"
        elif self.mix == "Q4_K_S" and block < 4:
            found = "Q5_K"
        if (
            self.blocks == 80
            and self.shared > 1
            and self.architecture in ("llama", "qwen2")
            and found in ("Q3_K", "Q4_K")
        ):
            found = "Q5_K"  # llama.cpp's rule for models of 70 billion
        return "Q8_0" if self.experts == 8 else found

    def _down(self, block: int, base: str) -> str:
        early = block < self.blocks // 8
        if self.mix == "Q3_K_M":
            return "Q5_K" if block < self.blocks // 16 else "Q4_K"
        if self.mix in ("Q4_K_M", "Q5_K_M"):
            return "Q6_K" if self._more_bits(block) else base
        if early and (self.mix == "Q4_K_S" or (self.mix in ("IQ4_NL", "IQ4_XS") and not self.weighted)):
            return "Q5_K"
        if early and self.weighted and self.mix in ("Q4_0", "Q5_0"):
            return "Q4_1" if self.mix == "Q4_0" else "Q5_1"
        return {"Q2_K": "Q3_K", "Q3_K_L": "Q5_K"}.get(self.mix, base)


def fitting(kind: str, columns: int) -> str | None:
    """The type, or the one that narrower rows get; None where no block fits."""
    if columns % BY_NAME[kind].elements:
        kind = NARROWER.get(kind, kind)
    return None if columns % BY_NAME[kind].elements else kind
