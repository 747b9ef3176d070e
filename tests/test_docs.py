"""The documents: their code blocks run as they stand, and every method has a page."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from anybit.quantizers.summary import methods

ROOT = Path(__file__).parent.parent
WRITTEN = sorted(path for path in (ROOT / "docs").rglob("*.md") if "```python" in path.read_text(encoding="utf-8"))
BLOCK = re.compile(r"^```(python|console)\n(.*?)^```", re.M | re.S)

# Blocks of one page share names and a folder; commands of the shell are the CLI's own.
DRIVER = """
import shlex, sys
from anybit.cli import main
names = {"__name__": "__main__"}
for kind, block in BLOCKS:
    if kind == "python":
        sys.stdout.flush()
        exec(compile(block, PAGE, "exec"), names)
        continue
    for line in block.splitlines():
        assert line.startswith("$ anybit "), f"not a command of anybit: {line}"
        sys.argv = shlex.split(line[2:])
        try:
            main()
        except SystemExit as done:
            assert done.code in (0, None), f"{line}: exit code {done.code}"
"""


@pytest.mark.parametrize("page", WRITTEN, ids=lambda path: str(path.relative_to(ROOT / "docs")))
def test_code_blocks_run(page: Path, tmp_path: Path) -> None:
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    for name in ("examples", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    script = f"PAGE = {str(page)!r}\nBLOCKS = {blocks!r}\n{DRIVER}"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip(), "a page shows something"


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_method_has_a_page(generate: ModuleType) -> None:
    pages = generate.pages()
    for info in methods():
        page = pages[f"methods/{info.name}.md"]
        assert page.startswith(f"# {info.name}\n")
        assert info.config in page
        assert f"({info.name}.md)" in pages["methods/index.md"]


def test_pages_say_how_it_is_made_and_stored(generate: ModuleType) -> None:
    page = generate.pages()["methods/gptq.md"]
    assert "--scheme gptq-4bit-" in page, "the usual choice, not the first of the list"
    assert "Programs that read it besides this one: transformers, vllm." in page
    assert re.search(r"\| `gptq-2bit-g64` \| 0\.\d+ \| heavy loss \|", page)
    assert "| `int8` |" not in generate.pages()["methods/bitsandbytes_4bit.md"]
    assert "qweight int32" in page
    assert "| `desc_act` | `False` |" in page


def test_every_page_is_in_the_navigation_and_links_lead_somewhere(generate: ModuleType) -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    known = set(generate.pages())
    for path in (ROOT / "docs").rglob("*.md"):
        name = path.relative_to(ROOT / "docs").as_posix()
        assert name in navigation, f"{name} is not in mkdocs.yml"
        for target in re.findall(r"\]\(([^)#:]+\.md)\)", path.read_text(encoding="utf-8")):
            place = (path.parent / target).resolve()
            assert place.exists() or place.relative_to(ROOT / "docs").as_posix() in known, f"{name}: {target}"
