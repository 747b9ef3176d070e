"""FBGEMM FP8's golden under all laws."""

from anybit.testing import MethodConformance


class TestFbgemmFp8(MethodConformance):
    method = "fbgemm_fp8"
