"""Imports point one way, and no shared file knows a method by name.

    errors, _lazy, ... <- weight <- quantizers <- containers, methods, algorithms, kernels, modules <- engine <- huggingface, cli

Imports inside functions count, and so do module names in strings (`LazyModule("anybit.weight.nodes")`): late is not elsewhere.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import anybit
from anybit.quantizers import AUTO_QUANTIZER_MAPPING, QuantizationMethod

ROOT = Path(anybit.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

BASE = {"errors", "_lazy", "_names", "_memory", "__version__", "py"}
MIDDLE = {"containers", "methods", "algorithms", "kernels", "modules"}
ALLOWED: dict[str, set[str]] = {
    "weight": BASE,
    # the dispatch base: what methods derive from, and what the engine asks
    "quantizers": BASE,
    "containers": BASE | {"weight", "quantizers"},
    "methods": BASE | {"weight", "quantizers", "algorithms"},  # rounding to a number format belongs to algorithms
    "algorithms": BASE | {"weight"},
    "kernels": BASE | {"weight"},
    "modules": BASE | {"weight", "kernels"},
    "engine": BASE | MIDDLE | {"weight", "quantizers"},
    "huggingface": BASE | MIDDLE | {"weight", "quantizers", "engine"},
    "reporting": BASE | MIDDLE | {"weight", "quantizers", "engine"},
    "cli": BASE | MIDDLE | {"weight", "quantizers", "engine", "huggingface", "reporting"},
    "testing": BASE | MIDDLE | {"weight", "quantizers", "engine", "huggingface"},
}
# names in annotations and file names looked up at run time: (from, to)
ANNOTATIONS = {("quantizers", "weight")}
# the registries scan the folder; nothing in it is named
BY_NAME = {("quantizers", "methods"), ("weight", "kernels")}

MODULE_IN_STRING = re.compile(r"anybit\.[a-z_]+(\.[a-z_0-9]+)*")


def package(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[0] if len(parts) > 1 else path.stem


def imports(node: ast.AST, annotation: bool = False) -> Iterator[tuple[str, str, int]]:
    """(module, "run" | "annotation" | "string", line) of everything a file refers to in this package."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            yield from imports(ast.Module(child.body, []), annotation=True)
            yield from imports(ast.Module(child.orelse, []), annotation)
        elif isinstance(child, ast.Import):
            yield from ((item.name, "annotation" if annotation else "run", child.lineno) for item in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: a relative import hides its arrow"
            for item in child.names:
                yield f"{child.module}.{item.name}", "annotation" if annotation else "run", child.lineno
        elif (
            isinstance(child, ast.Constant) and isinstance(child.value, str) and MODULE_IN_STRING.fullmatch(child.value)
        ):
            yield child.value, "string", child.lineno
        else:
            yield from imports(child, annotation)


def arrows(path: Path) -> Iterator[tuple[str, str, int]]:
    for module, kind, line in imports(ast.parse(path.read_text(encoding="utf-8"))):
        parts = module.split(".")
        if parts[0] == "anybit" and len(parts) > 1:
            yield parts[1], kind, line


def wrong_arrows(path: Path) -> list[str]:
    source = package(path)
    if source in BASE or source in ("__init__", "__main__"):
        return []
    found = []
    for target, kind, line in arrows(path):
        allowed = target == source or target in ALLOWED[source]
        allowed = allowed or (kind == "annotation" and (source, target) in ANNOTATIONS)
        allowed = allowed or (kind == "string" and (source, target) in BY_NAME)
        if not allowed:
            found.append(f"{path.relative_to(ROOT)}:{line}: {source} -> {target} ({kind})")
    return found


def test_imports_point_one_way():
    assert len(FILES) > 50
    assert [wrong for path in FILES for wrong in wrong_arrows(path)] == []


def test_every_folder_is_in_the_table():
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and any(path.rglob("*.py"))}
    assert folders == set(ALLOWED)


@pytest.mark.parametrize("source", [*sorted(MIDDLE), "weight", "quantizers"])
def test_nothing_below_sees_the_engine(source):
    for above in ("engine", "huggingface", "cli", "testing"):
        assert above not in ALLOWED[source]


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("from anybit.kernels import choose", True),
        ("def late():\n    from anybit.engine.load import load", True),
        ("import anybit.modules.linear", True),
        ("engine = LazyModule('anybit.engine.load')", True),
        ("from anybit.weight import Layout\nfrom anybit.quantizers.base import HfQuantizer", False),
        ("'a sentence about anybit.engine and more'", False),
    ],
)
def test_the_walk_sees_an_arrow(text, wrong, tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    (tmp_path / "methods").mkdir()
    path = tmp_path / "methods" / "mine.py"
    path.write_text(text)
    assert bool(wrong_arrows(path)) == wrong


def test_the_root_only_resolves_names():
    """Importing the package must import nothing of it but the table's resolver."""
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in top}
    assert {module for module in modules if module and module.startswith("anybit")} == {"anybit._names"}


def method_names() -> set[str]:
    """Words that mean a method and nothing else."""
    names = {item.value for item in QuantizationMethod} | set(AUTO_QUANTIZER_MAPPING)
    return names - {"fp8", "mxfp4", "mxfp8", "nvfp4", "gguf"}  # also number formats, a container


def named_methods(tree: ast.AST) -> list[int]:
    """Lines that compare something with a method's name, or look one up."""
    words, lines = method_names(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            constants = [inner for side in (node.left, *node.comparators) for inner in ast.walk(side)]
        elif isinstance(node, ast.match_case):
            constants = list(ast.walk(node.pattern))
        elif isinstance(node, ast.Dict):
            constants = [key for key in node.keys if key is not None]
        else:
            continue
        lines += [inner.lineno for inner in constants if isinstance(inner, ast.Constant) and inner.value in words]
    return sorted(set(lines))


def test_no_shared_file_knows_a_method():
    """`if method == "gptq"` outside methods/gptq.py is a bug."""
    shared = [path for path in FILES if package(path) not in ("methods", "testing")]
    found = {str(path.relative_to(ROOT)): named_methods(ast.parse(path.read_text(encoding="utf-8"))) for path in shared}
    assert {name: lines for name, lines in found.items() if lines} == {}
    assert named_methods(ast.parse("if method == 'gptq': pass")) == [1]
    assert named_methods(ast.parse("table = {'awq': 1}")) == [1]
    assert named_methods(ast.parse("x in ('hqq', 'sinq')")) == [1]
