"""Checkpoints of ours in the hands of compressed-tensors 0.20 and transformers 5.23.

Run it in an environment with both and this package: python -m pytest -m interop tests/interop/test_compressed_tensors.py
"""

from pathlib import Path

import pytest
import torch

pytest.importorskip("compressed_tensors", minversion="0.20.0")
transformers = pytest.importorskip("transformers", minversion="5.23.0")

from anybit import CompressedTensorsConfig  # noqa: E402
from anybit.engine.dequantize import dequantize  # noqa: E402
from anybit.engine.load import load  # noqa: E402
from anybit.engine.quantize import quantize  # noqa: E402

pytestmark = pytest.mark.interop
GOLDEN = Path(__file__).parents[1] / "golden" / "compressed-tensors" / "w3a16-sym-g64"
# transformers itself cannot load these without making them dense (or, the last ones, in float32 at all)
AS_DENSE = ("ct-w4a16-asym", "ct-nvfp4a16", "ct-mxfp4a16", "ct-mxfp4", "ct-mxfp6a16", "ct-mxfp8", "ct-mxfp8a16")


@pytest.mark.parametrize("scheme", sorted(CompressedTensorsConfig.schemes))
def test_theirs_computes_what_ours_does(scheme, tmp_path):
    dequantize(GOLDEN, tmp_path / "dense")
    quantize(tmp_path / "dense", tmp_path / "made", CompressedTensorsConfig(**CompressedTensorsConfig.schemes[scheme]))
    options = (
        {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)} if scheme in AS_DENSE else {}
    )
    options["dtype"] = torch.bfloat16 if scheme in AS_DENSE else torch.float32
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "made", **options).eval()
    ours = load(tmp_path / "made", dtype=options["dtype"])
    ids = torch.tensor([[1, 5, 9, 3, 15, 2]])
    if scheme in AS_DENSE:  # which also forgets that inputs are quantized
        for name, module in ours.named_modules():
            if hasattr(module, "quantized_weight"):
                wanted = theirs.get_submodule(name).weight.float()
                assert (module.dequantize(torch.float32) - wanted).abs().max() <= 2**-8 * wanted.abs().max(), name
        return
    with torch.no_grad():
        left, right = ours(ids).logits.float(), theirs(ids).logits.float()
    assert (left - right).abs().max() < 0.01 * right.abs().max()
