"""Gemma's goldens under all laws. What they cannot see is in test_gemma.py."""

from anybit.testing import MethodConformance

MAY_BE_MISSING = "a scale that is not stored is 0, which rounds nothing: the loader's own default"


class TestGemma(MethodConformance):
    method = "gemma"
    legal_mutations = {
        ("input_activation_scale", "missing"): MAY_BE_MISSING,
        ("output_activation_scale", "missing"): MAY_BE_MISSING,
    }
    creation_error = 0.6  # of two bits only -1, 0 and 1 are used, scaled to the largest weight of a row
