"""MXFP4's golden under all laws."""

from anybit.testing import MethodConformance


class TestMxfp4(MethodConformance):
    method = "mxfp4"
