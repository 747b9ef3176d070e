"""AutoRound's goldens under all laws."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from anybit.methods._gptq_layout import GptqLayout
from anybit.testing import MethodConformance, random_weight
from anybit.weight import Codes, Grid, Layout, Weight


def storable(weight: Any, layout: Layout) -> Any:
    """Files that store zero - 1 have no zero point of 0; readers do not take the highest field for it."""
    if not isinstance(layout, GptqLayout) or layout.zeros == "v2":
        return weight
    assert isinstance(weight.tree, Grid)
    assert isinstance(weight.tree.zero, Codes)
    zeros = weight.tree.zero.integers().to(torch.int32).clamp(min=1, max=(1 << layout.bits) - 1)
    tree = replace(weight.tree, zero=Codes.of(zeros, weight.tree.zero.bits))
    return Weight(tree, weight.dtype, weight.activation, weight.extras)


class TestAutoRound(MethodConformance):
    method = "auto-round"

    def legal(self, weight: Any, unit: Any) -> Any:
        return storable(weight, unit.layout)

    def enlarge(self, layout: Any, shape: tuple[int, ...], extras: Mapping[str, Any]) -> Any:
        larger = replace(layout, shape=shape)
        return larger.encode(storable(random_weight(larger.scheme(), extras=extras), larger))
