"""SpQR's goldens under all laws."""

import json
from pathlib import Path
from typing import Any, ClassVar

import torch

from anybit.testing import MethodConformance
from anybit.testing.goldens import Golden
from anybit.testing.memory import enlarged_checkpoint, peak_of_load
from anybit.testing.model_laws import SLACK_BYTES


class TestSpqr(MethodConformance):
    method = "spqr"
    legal_mutations: ClassVar[dict[tuple[str, str], str]] = {
        ("col_vals", "off_by_one"): "a word is any column and any float16; one more is another column of the same width"
    }

    def logits_of_reference(self, golden: Golden) -> tuple[torch.Tensor, float, dict[str, Any]]:
        wanted, tolerance, _ = super().logits_of_reference(golden)
        return wanted, tolerance, {"dtype": torch.float32}  # of the dense model

    def test_law_11_peak_memory_of_a_load(self, tmp_path: Path) -> None:
        large = enlarged_checkpoint(self.all_goldens()[0], tmp_path / "large", stored_as=self.enlarge)
        config = json.loads((large.path / "config.json").read_text())
        config["quantization_config"]["shapes"] = {}  # of the golden's sizes
        (large.path / "config.json").write_text(json.dumps(config))
        peak, packed, largest = peak_of_load(large.path)
        limit = packed + largest + SLACK_BYTES
        assert large.dense_bytes > limit
        assert peak < limit, f"load took {peak >> 20} MB, allowed {limit >> 20} MB"
