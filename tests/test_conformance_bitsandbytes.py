from dataclasses import replace
from typing import Any

import torch

from anybit.methods._llm_int8 import ONE_127TH, LlmInt8Layout
from anybit.testing import MethodConformance
from anybit.weight.nodes import Values


class TestBitsAndBytes(MethodConformance):
    method = "bitsandbytes"
    legal_mutations = {
        ("weight_format", "missing"): "the first int8 files had none, and their rows lie as those of format 0",
    }

    def legal(self, weight: Any, unit: Any) -> Any:
        """int8 codes are multiplied by one constant, which is not stored."""
        if not isinstance(unit.layout, LlmInt8Layout):
            return weight
        return replace(weight, tree=replace(weight.tree, scale=Values(torch.full((1, 1), ONE_127TH))))
