"""AWQ's goldens under all laws."""

from anybit.testing import MethodConformance


class TestAwq(MethodConformance):
    method = "awq"
