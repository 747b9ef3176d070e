"""A plugin inherits the laws."""

from anybit.testing import MethodConformance


class TestToy8(MethodConformance):
    method = "toy8"
