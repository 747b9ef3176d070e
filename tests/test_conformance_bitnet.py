"""BitNet's goldens under all laws. What they cannot see is in test_bitnet.py."""

from anybit.testing import MethodConformance


class TestBitNet(MethodConformance):
    method = "bitnet"
    # the mean magnitude of ternary weights is their scale times the share that is not zero, here two thirds
    creation_error = 0.4
