"""Goldens of transformers' Metal format and of MLX under all laws."""

from anybit.testing import MethodConformance


class TestMetal(MethodConformance):
    method = "metal"
