"""FP-Quant's goldens under all laws."""

from anybit.testing import MethodConformance


class TestFpQuant(MethodConformance):
    method = "fp_quant"
