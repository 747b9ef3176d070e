"""GGUF's goldens (whole models quantized by llama.cpp) under all laws."""

from anybit.testing import MethodConformance


class TestGguf(MethodConformance):
    method = "gguf"
