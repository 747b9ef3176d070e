"""SINQ's goldens under all laws. What they cannot see is in test_sinq.py."""

from anybit.testing import MethodConformance


class TestSinq(MethodConformance):
    method = "sinq"
