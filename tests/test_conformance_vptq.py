"""VPTQ's goldens under all laws."""

import json
from pathlib import Path
from typing import Any

import torch

from anybit.testing import MethodConformance
from anybit.testing.goldens import Golden
from anybit.testing.memory import enlarged_checkpoint, peak_of_load
from anybit.testing.model_laws import SLACK_BYTES


class TestVptq(MethodConformance):
    method = "vptq"

    def logits_of_reference(self, golden: Golden) -> tuple[torch.Tensor, float, dict[str, Any]]:
        wanted, tolerance, _ = super().logits_of_reference(golden)
        return wanted, tolerance, {"dtype": torch.float32}  # the vendor's torch path ran in it

    def test_law_11_peak_memory_of_a_load(self, tmp_path: Path) -> None:
        large = enlarged_checkpoint(self.all_goldens()[0], tmp_path / "large", stored_as=self.enlarge)
        config = json.loads((large.path / "config.json").read_text())
        layers = config["quantization_config"]["config_for_layers"]
        for name, entry in list(layers.items()):  # the golden has one block of other sizes, the large model four
            entry.update(in_features=-1, out_features=-1, group_size=-1)
            layers.update({name.replace(".0.", f".{block}."): entry for block in range(4)})
        (large.path / "config.json").write_text(json.dumps(config))
        peak, packed, largest = peak_of_load(large.path)
        limit = packed + largest + SLACK_BYTES
        assert large.dense_bytes > limit
        assert peak < limit, f"load took {peak >> 20} MB, allowed {limit >> 20} MB"
