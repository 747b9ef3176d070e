"""quanto's goldens under all laws."""

from anybit.testing import MethodConformance


class TestQuanto(MethodConformance):
    method = "quanto"
