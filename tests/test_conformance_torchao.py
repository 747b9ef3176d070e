"""torchao's goldens under all laws."""

from typing import Any

import torch

from anybit.testing import MethodConformance


class TestTorchao(MethodConformance):
    method = "torchao"
    creation_error = 0.4  # rows of two bits

    def logits_of_reference(self, golden: Any) -> tuple[torch.Tensor, float, dict[str, Any]]:
        """The fixtures of layouts that run on GPUs only hold the logits of their dense weights in float32."""
        wanted, tolerance, options = super().logits_of_reference(golden)
        return wanted, tolerance, {"dtype": torch.float32} if golden.fixture["logits_from"] == "dense" else options
