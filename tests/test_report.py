"""The report and the model card: what they show is what was measured, and the page needs nothing but itself."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import anybit
from anybit import BitsAndBytesConfig, GPTQConfig
from anybit.cli.app import run
from anybit.errors import ConfigError, WriteError
from anybit.reporting import Facts, gather, write_card
from anybit.reporting.page import page

ROOT = Path(__file__).parent.parent
MODEL, TEXT = ROOT / "examples" / "tiny-llama", ROOT / "examples" / "data" / "evaluation.txt"

pytestmark = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="charts need matplotlib")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    anybit.quantize(MODEL, folder / "nf4", BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))
    anybit.quantize(MODEL, folder / "gptq", GPTQConfig(bits=3, group_size=64))
    return folder


@pytest.fixture(scope="module")
def facts(folder: Path) -> Facts:
    return gather(
        folder / "nf4", command="anybit <quantize>", reference=MODEL, text=TEXT, compare=[folder / "gptq"],
        prompts=["The <b>history</b> of"], max_tokens=300,
    )  # fmt: skip


class Page(HTMLParser):
    """Tags as they come, and whether they close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "path", "use", "link", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture(scope="module")
def parsed(facts: Facts) -> Page:
    found = Page()
    found.feed(page(facts))
    return found


def test_figures_are_the_evaluation_s(facts: Facts, folder: Path, parsed: Page) -> None:
    found = anybit.evaluate(folder / "nf4", TEXT, reference=MODEL, max_tokens=300, per_module=True)
    assert facts.evaluation is not None
    assert facts.evaluation.perplexity == pytest.approx(found.perplexity, rel=1e-6)
    assert f"{found.perplexity:.3f}" in parsed.words
    assert f"{found.kl:.4f}" in parsed.words
    assert 4.4 < facts.bits_per_weight < 4.6, "NF4 in blocks of 64 with float32 scales is 4.5 bits"
    assert {module["module"] for module in facts.modules} == {module.module for module in found.modules}
    assert [candidate.name for candidate in facts.candidates] == ["nf4", "gptq"]


def test_the_heat_map_has_a_cell_for_every_module(facts: Facts, parsed: Page) -> None:
    cells = [
        attributes for tag, attributes in parsed.seen if tag == "td" and "--heat" in (attributes.get("style") or "")
    ]
    assert len(cells) == len(facts.modules) == 42


def test_histograms_count_every_weight(facts: Facts) -> None:
    weights = [one for one in facts.histograms if one.kind == "weights"]
    sizes = {module["module"]: module["shape"][0] * module["shape"][1] for module in facts.modules}
    assert len(weights) == 6
    for one in weights:
        assert sum(one.first) == sum(one.second) == sizes[one.module]
    assert {one.kind for one in facts.histograms} == {"weights", "inputs"}


def test_the_page_is_whole_by_itself(facts: Facts, parsed: Page) -> None:
    assert parsed.open == [], "every tag closes"
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in parsed.seen}
    addresses = [attributes.get("href") or "" for tag, attributes in parsed.seen if tag == "a"]
    named = {attributes.get("id") for _, attributes in parsed.seen}
    assert addresses
    assert all(address.startswith("#") and address[1:] in named for address in addresses)
    assert "url(http" not in page(facts)


def test_text_of_others_is_text(facts: Facts, parsed: Page) -> None:
    assert "<b>history</b>" in parsed.words
    assert "b" not in {tag for tag, _ in parsed.seen}
    assert "anybit <quantize>" in parsed.words


def test_the_card_has_metadata_and_figures(facts: Facts, tmp_path: Path) -> None:
    import yaml

    text = write_card(facts, tmp_path).read_text(encoding="utf-8")
    head = yaml.safe_load(text.split("---")[1])
    assert head == {"library_name": "transformers", "tags": ["anybit", "bitsandbytes"]}, "a folder is no base_model"
    assert f"| perplexity | {facts.evaluation.perplexity:.3f}" in text  # type: ignore[union-attr]
    write_card(facts, tmp_path)
    (tmp_path / "README.md").write_text("# mine\n")
    with pytest.raises(WriteError, match=r"README\.md exists.*--force"):
        write_card(facts, tmp_path)
    assert "bitsandbytes" in write_card(facts, tmp_path, force=True).read_text(encoding="utf-8")


def test_less_is_shown_where_less_was_given(folder: Path) -> None:
    text = page(gather(folder / "gptq", command="x"))
    assert 'id="summary"' in text
    assert 'id="errors"' not in text
    with pytest.raises(ConfigError, match="not quantized"):
        gather(MODEL, command="x")
    with pytest.raises(ConfigError, match="--text"):
        gather(folder / "gptq", command="x", compare=[folder / "nf4"])


def test_commands(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "page.html"
    assert run(["report", str(folder / "gptq"), "-r", str(MODEL), "-o", str(target), "--json", "-q"]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert told["page"] == str(target)
    assert 'id="errors"' in target.read_text(encoding="utf-8")
    out = tmp_path / "made"
    assert run(["quantize", str(MODEL), "-o", str(out), "--scheme", "int8", "--report", "-q"]) == 0
    assert "bitsandbytes" in (out / "README.md").read_text(encoding="utf-8")
    assert 'id="worst"' in (out / "report.html").read_text(encoding="utf-8")
    assert run(["quantize", str(MODEL), "-o", str(tmp_path / "x"), "-s", "int8", "--report-text", str(TEXT)]) == 2


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
def test_in_a_browser(facts: Facts, tmp_path: Path) -> None:
    """It is drawn at the width of a phone, in the colours the reader prefers."""
    from PIL import Image

    assert BROWSER is not None
    (tmp_path / "page.html").write_text(page(facts), encoding="utf-8")
    corners = {}
    for name, flags in (("light", []), ("dark", ["--blink-settings=preferredColorScheme=0"])):
        shot = tmp_path / f"{name}.png"
        subprocess.run(
            [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=390,900", *flags, f"--screenshot={shot}",
             f"--user-data-dir={tmp_path / name}", (tmp_path / "page.html").as_uri()],
            capture_output=True, timeout=120, check=True,
        )  # fmt: skip
        with Image.open(shot) as image:
            corners[name] = image.convert("RGB").getpixel((2, 2))
            colours = image.convert("RGB").getcolors(1 << 24)
        assert colours is not None
        assert len(colours) > 50, "an empty page"
    assert min(corners["light"]) > 240  # type: ignore[arg-type]
    assert max(corners["dark"]) < 40  # type: ignore[arg-type]
    dumped = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"--user-data-dir={tmp_path / 'dom'}",
         (tmp_path / "page.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    assert len(re.findall(r"<svg", dumped)) == len(facts.histograms) + 2
