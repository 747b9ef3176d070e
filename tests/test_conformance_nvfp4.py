"""NVFP4 under all laws. No peer stores it, so the golden is ModelOpt's, without what belongs to its inputs."""

from anybit.testing import MethodConformance


class TestNvfp4(MethodConformance):
    method = "nvfp4"
