"""MXFP8. E4M3 codes with an E8M0 scale for each 32 inputs: fine-grained FP8 whose blocks are [1, 32], in its classes.

Stored: weight float8_e4m3fn [out, in], weight_scale_inv uint8 or float8_e8m0fnu [out, in/32], each byte b meaning 2^(b - 127).
"""

from __future__ import annotations

from anybit.methods.fp8 import FineGrainedFP8Config, FineGrainedFP8HfQuantizer
from anybit.quantizers.registry import register_quantization_config, register_quantizer

register_quantization_config("mxfp8")(FineGrainedFP8Config)
register_quantizer("mxfp8")(FineGrainedFP8HfQuantizer)
