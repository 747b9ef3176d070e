"""The report and the model card: what they show is what was measured, and the page needs nothing but itself."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import BROWSER, Browser

import anybit
from anybit import BitsAndBytesConfig, GPTQConfig
from anybit.cli.app import run
from anybit.engine.sensitivity import Cost, read_costs
from anybit.errors import ConfigError, WriteError
from anybit.reporting import Facts, gather, write_card
from anybit.reporting.card import card
from anybit.reporting.charts import sensitivity
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
    from huggingface_hub import ModelCard
    from huggingface_hub.repocard_data import model_index_to_eval_results

    text = write_card(facts, tmp_path).read_text(encoding="utf-8")
    head = yaml.safe_load(text.split("---")[1])
    results = head.pop("model-index")
    assert head == {"library_name": "transformers", "tags": ["anybit", "bitsandbytes"]}, "a folder is no base_model"
    (result,) = model_index_to_eval_results(results)[1][:1]
    assert (result.metric_type, result.dataset_name) == ("perplexity", "evaluation.txt")
    assert result.metric_value == pytest.approx(facts.evaluation.perplexity, rel=1e-5)  # type: ignore[union-attr]
    card = ModelCard(text)
    assert card.data.library_name == "transformers"
    assert [one.metric_type for one in card.data.eval_results] == ["perplexity", "kl", "top1_agreement"]
    assert f"| perplexity | {facts.evaluation.perplexity:.3f}" in text  # type: ignore[union-attr]
    write_card(facts, tmp_path)
    (tmp_path / "README.md").write_text("# mine\n")
    with pytest.raises(WriteError, match=r"README\.md exists.*--force"):
        write_card(facts, tmp_path)
    assert "bitsandbytes" in write_card(facts, tmp_path, force=True).read_text(encoding="utf-8")


def test_a_hub_id_is_the_base_model(facts: Facts) -> None:
    from huggingface_hub import ModelCard

    data = ModelCard(card(replace(facts, reference="owner/name"))).data
    assert (data.base_model, data.to_dict()["base_model_relation"]) == ("owner/name", "quantized")


def test_less_is_shown_where_less_was_given(folder: Path) -> None:
    text = page(gather(folder / "gptq", command="x"))
    assert 'id="summary"' in text
    assert 'id="recipe"' not in text
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


def test_costs_of_modules_become_a_curve(facts: Facts, tmp_path: Path) -> None:
    costs = [
        Cost(f"model.layers.{layer}.mlp.up_proj", scheme, 1, 0.1, 0.1, 10.0**-layer * size)
        for layer in range(3)
        for scheme, size in (("gptq-3bit-g64", 0.1), ("gptq-4bit-g64", 0.01))
    ]
    file = tmp_path / "costs.json"
    file.write_text(
        json.dumps({"fingerprint": "x", "costs": {f"{one.module} {one.scheme}": vars(one) for one in costs}})
    )
    assert read_costs(file) == tuple(costs)
    found = Page()
    found.feed(page(replace(facts, costs=costs)))
    assert {"sensitivity"} <= {attributes.get("id") for tag, attributes in found.seen if tag == "section"}
    assert "1.00e-01" in found.words, "the dearest module in 3 bits"
    drawn = sensitivity(costs, "kl")
    assert all(scheme in drawn for scheme in ("gptq-3bit-g64", "gptq-4bit-g64"))
    with pytest.raises(ConfigError, match=r"costs .*cots\.json cannot be read.*did you mean .*costs\.json"):
        read_costs(tmp_path / "cots.json")


@pytest.fixture(scope="module")
def browser(facts: Facts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Browser, Path]]:
    if BROWSER is None:
        pytest.skip("no chromium here")
    folder = tmp_path_factory.mktemp("browser")
    file = folder / "page.html"
    file.write_text(page(replace(facts, recipe={"recipe": 1, "quantization": {"scheme": "nf4"}})), encoding="utf-8")
    with Browser(folder / "profile") as opened:
        yield opened, file


class TestInABrowser:
    def test_in_the_colours_the_reader_prefers(self, browser: tuple[Browser, Path]) -> None:
        opened, file = browser
        shades = {}
        for scheme in ("light", "dark"):
            opened.show(file, 1000, scheme)
            for part in ("backgroundColor", "color"):
                colour = opened.value(f"getComputedStyle(document.body).{part}")
                shades[scheme, part] = sum(map(int, re.findall(r"\d+", colour)[:3])) / 3
        assert shades["light", "backgroundColor"] > 240 > 60 > shades["light", "color"]
        assert shades["dark", "backgroundColor"] < 40 < 200 < shades["dark", "color"]

    @pytest.mark.parametrize("width", [320, 390, 1000])
    def test_nothing_is_wider_than_the_screen(self, browser: tuple[Browser, Path], width: int) -> None:
        opened, file = browser
        opened.show(file, width)
        assert opened.value("document.documentElement.scrollWidth") <= width
        assert opened.value("document.querySelectorAll('svg').length") >= 13
        smallest = opened.value(
            "Math.min(...[...document.querySelectorAll('svg')].map(one => one.getBoundingClientRect().width))"
        )
        assert smallest > 0.7 * min(width, 400) - 40, "a chart that nobody can read"

    def test_with_the_keyboard_alone(self, browser: tuple[Browser, Path]) -> None:
        opened, file = browser
        opened.show(file, 1000)
        seen: list[str] = []
        while seen.count(seen[0] if seen else "") < 2 and len(seen) < 80:
            opened.press("Tab")
            seen.append(
                opened.value(
                    "(e => e.tagName + ' ' + (e.getAttribute('href') || e.textContent.slice(0, 20)))(document.activeElement)"
                )
            )
            outline = opened.value("getComputedStyle(document.activeElement).outlineStyle")
            assert outline == "solid" or seen[-1].startswith("BODY"), f"the focus is not seen on {seen[-1]}"
            if seen[-1].startswith("SUMMARY"):
                before = opened.value("document.activeElement.parentElement.open")
                opened.press("Enter")
                assert opened.value("document.activeElement.parentElement.open") is not before
        seen.pop()  # the first one again
        links = [name.removeprefix("A #") for name in seen if name.startswith("A #")]
        assert links == opened.value("[...document.querySelectorAll('section')].map(one => one.id)")
        assert sum(name.startswith("SUMMARY") for name in seen) == 2
        wide = opened.value("document.querySelectorAll('.wide').length")
        assert sum(name.startswith("DIV") for name in seen) == wide, "what scrolls sideways can be reached"

    def test_nothing_is_complained_about(self, browser: tuple[Browser, Path]) -> None:
        opened, file = browser
        opened.show(file, 390)
        assert opened.value("performance.getEntriesByType('resource').length") == 0, "nothing is fetched"
        assert opened.value("[...document.querySelectorAll('svg')].every(one => one.getAttribute('aria-label'))")
