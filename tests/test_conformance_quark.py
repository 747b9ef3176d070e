"""Quark's goldens under all laws."""

from anybit.testing import MethodConformance


class TestQuark(MethodConformance):
    method = "quark"
