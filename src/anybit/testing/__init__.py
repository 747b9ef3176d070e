"""The conformance suite. Methods of the library and of plugins inherit the same laws:

    from anybit.testing import MethodConformance

    class TestToy8(MethodConformance):
        method = "toy8"                 # goldens: a folder golden/toy8/<variant> beside the test file or above it

A golden is a checkpoint as its vendor wrote it, with `reference.safetensors` (input_ids, logits, dense.<module>, ...) and
`fixture.json` (who made it, and the tolerances). Needs pytest.
"""

import pytest

pytest.register_assert_rewrite("anybit.testing.stored_laws", "anybit.testing.kernel_laws", "anybit.testing.model_laws")

from anybit.testing.conformance import MethodConformance  # noqa: E402
from anybit.testing.goldens import Golden, Unit  # noqa: E402
from anybit.testing.random_weights import random_weight  # noqa: E402

__all__ = ["Golden", "MethodConformance", "Unit", "random_weight"]
