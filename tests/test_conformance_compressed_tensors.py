"""compressed-tensors' goldens under all laws. What they cannot see is in test_compressed_tensors.py."""

from dataclasses import replace
from typing import Any

from anybit.testing import MethodConformance
from anybit.weight.nodes import Masked


class TestCompressedTensors(MethodConformance):
    method = "compressed-tensors"

    def legal(self, weight: Any, unit: Any) -> Any:
        """Random bytes under a mask may be the two that mean NaN, which nothing writes."""
        codes = getattr(weight.tree, "codes", None)
        if not isinstance(codes, Masked) or weight.tree.levels != "e4m3":
            return weight
        packed = codes.values.packed.clone()
        packed[(packed & 0x7F) == 0x7F] = 0
        return replace(
            weight, tree=replace(weight.tree, codes=replace(codes, values=replace(codes.values, packed=packed)))
        )
