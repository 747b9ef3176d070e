"""AQLM's goldens under all laws."""

from typing import Any

import torch

from anybit.testing import MethodConformance
from anybit.testing.goldens import Golden


class TestAqlm(MethodConformance):
    method = "aqlm"

    def logits_of_reference(self, golden: Golden) -> tuple[torch.Tensor, float, dict[str, Any]]:
        wanted, tolerance, _ = super().logits_of_reference(golden)
        return wanted, tolerance, {"dtype": torch.float32}  # the only dtype of the vendor's CPU kernel
