"""EETQ's golden under all laws."""

from anybit.testing import MethodConformance


class TestEetq(MethodConformance):
    method = "eetq"
