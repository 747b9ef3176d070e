"""Four Over Six's goldens under all laws."""

from anybit.testing import MethodConformance


class TestFourOverSix(MethodConformance):
    method = "fouroversix"
