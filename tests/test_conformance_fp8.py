"""Fine-grained FP8's and MXFP8's goldens under all laws."""

from anybit.testing import MethodConformance


class TestFp8(MethodConformance):
    method = "fp8"


class TestMxfp8(MethodConformance):
    method = "mxfp8"
