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
    "Q1_0": (40, "Q1_0"), "Q2_0": (41, "Q2_0"), "MXFP4_MOE": (38, "MXFP4"), "NVFP4": (39, "NVFP4"),
    "Q2_K_S": (21, "Q2_K"), "IQ1_S": (24, "IQ1_S"), "IQ1_M": (31, "IQ1_M"), "IQ2_XXS": (19, "IQ2_XXS"),
    "IQ2_XS": (20, "IQ2_XS"), "IQ2_S": (28, "IQ2_XS"), "IQ2_M": (29, "IQ2_S"), "IQ3_XXS": (23, "IQ3_XXS"),
    "IQ3_XS": (22, "IQ3_S"), "IQ3_S": (26, "IQ3_S"), "IQ3_M": (27, "IQ3_S"),
}  # fmt: skip
# what a file of one type says of itself
FILE_TYPES = {
    **{kind: number for number, kind in MIXES.values()},
    **{name: number for name, (number, _) in MIXES.items()},
}
# the type a row gets that is not whole blocks (for Q1_0 and NVFP4 llama.cpp has none)
NARROWER = {
    **dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0", "Q1_0", "Q2_0"), "Q4_0"), "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"), "NVFP4": "MXFP4",
}  # fmt: skip
NEVER = re.compile(
    r"_norm\.weight$|ffn_gate_inp\.weight$|^position_embd\.weight$|^token_types\.weight$|altup|laurel|per_layer_model_proj"
    r"|ssm_conv1d|shortconv\.conv\.weight|attn_rel_b\.weight"
)
_LOW = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M")
_HIGHER = ("IQ2_S", "IQ2_M")  # of these
_EIGHT_EXPERTS = (
    "Q2_K", "IQ3_XS", "IQ3_XXS", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ3_S", "IQ3_M", "IQ4_XS",
)  # fmt: skip
# types that are made for what the inputs of a layer weigh
WEIGHTED_ONLY = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")


def needs_importance(name: str, kind: str, mix: str) -> bool:
    """Whether llama.cpp refuses to make this tensor without an importance matrix."""
    if name in ("token_embd.weight", "output.weight"):
        return False
    return kind in WEIGHTED_ONLY or (kind == "Q2_K" and mix == "Q2_K_S")


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
            if (
                self.mix == "MXFP4_MOE" or base == "Q8_0" or self.architecture == "falcon"
                or columns % BY_NAME[base].elements
            ):  # fmt: skip
                return "Q8_0"
            return "Q5_K" if self.mix in (*_LOW, "IQ3_XXS") else "Q6_K"
        if self.mix == "MXFP4_MOE":
            return base if stacked else "Q8_0"
        if own in ("token_embd", "per_layer_token_embd"):
            if self.mix in ("TQ1_0", "TQ2_0", "Q2_0"):
                return "Q4_K"
            low = "IQ3_S" if self.mix in _HIGHER else "Q2_K"
            return low if self.mix in _LOW else {"IQ3_XXS": "IQ3_S", "NVFP4": "Q6_K"}.get(self.mix, base)
        if self.mix in _LOW:
            return self._low(own, block, base)
        if own in ("attn_v", "attn_qkv", "attn_kv_b"):
            return self._values(block, base)
        if own == "attn_k" and self.experts == 8:
            return "Q8_0"
        if own in ("attn_q", "attn_k"):
            return {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(self.mix, base)
        if own.startswith("ffn_down"):
            return self._down(block, base)
        if own.startswith(("ffn_gate", "ffn_up")) and self.mix == "IQ3_XS":
            return "IQ3_XXS" if self.blocks // 8 <= block < 7 * self.blocks // 8 else base
        if own == "attn_output":
            if self.architecture == "falcon":
                return "Q4_K" if self.mix == "Q3_K_L" else base
            if self.experts == 8:
                return "Q5_K" if self.mix in _EIGHT_EXPERTS else base
            higher = {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_XXS": "IQ3_S", "IQ3_M": "Q4_K"}
            return higher.get(self.mix, base)
        return base

    def _low(self, own: str, block: int, base: str) -> str:
        """Mixes of one and two bits."""
        higher = "IQ3_S" if self.mix in _HIGHER else "Q2_K"
        if own in ("attn_v", "attn_qkv", "attn_kv_b"):
            return "Q4_K" if self.shared >= 4 or self.experts >= 4 else higher
        if own == "attn_k" and self.experts == 8:
            return "Q4_K"
        if own.startswith("ffn_down"):
            return higher if block < self.blocks // 8 else base
        if own == "attn_output":
            if self.experts == 8:
                return "Q5_K"
            return {"IQ1_S": "IQ2_XXS", "IQ1_M": "IQ2_XXS", "IQ2_S": "IQ3_S", "IQ2_M": "IQ3_S"}.get(self.mix, base)
        return base

    def _values(self, block: int, base: str) -> str:
        """Small where heads share them, and sensitive."""
        many = self.shared >= 4
        found = base
        if self.mix == "Q2_K":
            found = "Q4_K" if many else "Q3_K"
        elif self.mix == "IQ3_M" or (self.mix in ("Q2_K_S", "IQ3_XXS", "IQ3_XS", "IQ3_S") and many):
            found = "Q4_K"
        elif self.mix == "IQ3_XXS":
            found = base if self.weighted else "IQ3_S"
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
        early, falcon = block < self.blocks // 8, self.architecture == "falcon"
        if self.mix == "Q3_K_M":
            if block < self.blocks // 16:
                return "Q5_K"
            return "Q4_K" if not falcon or self._more_bits(block) else "Q3_K"
        if self.mix == "Q4_K_M" and falcon:
            return "Q6_K" if block < self.blocks // 16 else "Q5_K" if self._more_bits(block) else base
        if self.mix in ("Q4_K_M", "Q5_K_M"):
            return "Q6_K" if self._more_bits(block) else base
        if self.mix == "IQ3_XXS" and not self.weighted:
            return "Q4_K" if early else "Q3_K"
        if self.mix == "IQ3_M":
            return "Q4_K" if early or (self.experts == 8 and self._more_bits(block)) else base
        if early and self.mix == "Q2_K_S":
            return "Q4_K"
        if early and (
            (self.mix == "Q4_K_S" and not falcon) or (self.mix in ("IQ4_NL", "IQ4_XS") and not self.weighted)
        ):
            return "Q5_K"
        if early and self.weighted and self.mix in ("Q4_0", "Q5_0"):
            return "Q4_1" if self.mix == "Q4_0" else "Q5_1"
        return {"Q2_K": "Q3_K", "Q3_K_L": "Q4_K" if falcon else "Q5_K"}.get(self.mix, base)


def fitting(kind: str, columns: int) -> str | None:
    """The type, or the one that narrower rows get; None where no block fits."""
    if columns % BY_NAME[kind].elements:
        kind = NARROWER.get(kind, kind)
    return None if columns % BY_NAME[kind].elements else kind
