"""All laws in one class to inherit."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import ClassVar

import pytest

from anybit.testing.goldens import Golden, find_goldens
from anybit.testing.kernel_laws import KernelLaws
from anybit.testing.model_laws import ModelLaws
from anybit.testing.stored_laws import StoredLaws


class MethodConformance(StoredLaws, KernelLaws, ModelLaws):
    """Subclass, set `method`, and every golden of that method is held to the laws.

    `goldens`: the folder of variants, default golden/<method> or tests/golden/<method> next to or above the test file.
    `variants`: only these, if the class is about some of them. What a format makes impossible is said, not skipped:
    `legal_mutations` maps (tensor's relative name, mutation) to the reason why no reader can notice it.
    """

    goldens: ClassVar[Path | None] = None
    variants: ClassVar[tuple[str, ...] | None] = None

    @classmethod
    def all_goldens(cls) -> list[Golden]:
        return find_goldens(cls.method, cls.goldens, Path(inspect.getfile(cls)), cls.variants)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "golden" in metafunc.fixturenames:
            goldens = self.all_goldens()
            metafunc.parametrize("golden", goldens, ids=[golden.name for golden in goldens])
