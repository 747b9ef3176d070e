from dataclasses import replace
from typing import Any

import torch

from anybit.methods._llm_int8 import ONE_127TH, LlmInt8Layout
from anybit.testing import MethodConformance
from anybit.testing.random_weights import random_weight
from anybit.weight.nodes import Values


class TestBitsAndBytes(MethodConformance):
    method = "bitsandbytes"
    legal_mutations = {
        ("weight_format", "missing"): "the first int8 files had none, and their rows lie as those of format 0",
    }

    def legal(self, weight: Any, unit: Any) -> Any:
        return legal(weight, unit.layout)

    def enlarge(self, layout: Any, shape: tuple[int, ...], extras: Any) -> dict[str, torch.Tensor]:
        larger = replace(layout, shape=shape)
        return larger.encode(legal(random_weight(larger.scheme(), extras=extras), larger))


def legal(weight: Any, layout: Any) -> Any:
    """int8 codes are multiplied by one constant, which is not stored."""
    if not isinstance(layout, LlmInt8Layout):
        return weight
    return replace(weight, tree=replace(weight.tree, scale=Values(torch.full((1, 1), ONE_127TH))))
