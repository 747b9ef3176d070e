"""`--record-capabilities FILE`: write what the conformance suite saw, per method; `make capabilities` does it."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest

# capability -> start of the names of the laws that must all hold, on every golden that they do not skip for a reason
LAWS = {
    "reads": ("test_law_1_", "test_law_3_"),
    "runs": ("test_law_6_", "test_logits_"),
    "saves": ("test_law_12_",),
    "trains": ("test_law_9_gradients",),
    "creates": ("test_creation",),
}
outcomes: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
variants: dict[str, set[str]] = defaultdict(set)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-capabilities", metavar="FILE", help="write per method which laws held")


def pytest_runtest_setup(item: pytest.Item) -> None:
    method = getattr(getattr(item, "cls", None), "method", None)
    if method is not None:
        golden = getattr(item, "callspec", None)
        name = golden.params["golden"].name if golden is not None and "golden" in golden.params else ""
        item.user_properties.append(("conformance", [method, item.originalname, name]))  # type: ignore[attr-defined]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    found = dict(report.user_properties).get("conformance")
    if isinstance(found, list) and (report.when == "call" or report.outcome != "passed"):
        method, law, variant = found
        outcomes[method][law].add(report.outcome)
        variants[method].add(variant)


def pytest_sessionfinish(session: pytest.Session) -> None:
    target = session.config.getoption("--record-capabilities")
    if target is None or hasattr(session.config, "workerinput"):
        return
    recorded = {}
    for method, laws in sorted(outcomes.items()):
        own: dict[str, bool | int] = {}
        for capability, starts in LAWS.items():
            results = set().union(*(laws[law] for law in laws if law.startswith(starts)))
            own[capability] = "passed" in results and "failed" not in results
        recorded[method] = {**own, "checkpoints": len(variants[method] - {""})}
    Path(target).write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")
