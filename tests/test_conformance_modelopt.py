"""ModelOpt's goldens under all laws."""

from anybit.testing import MethodConformance


class TestModelOpt(MethodConformance):
    method = "modelopt"
