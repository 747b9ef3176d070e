"""Recipes: what a file may say, what its errors say, and that methods carry settings of single modules."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import anybit
from anybit.cli.app import run
from anybit.containers import Checkpoint
from anybit.engine.load import prepare as real
from anybit.engine.recipe import FILE_NAME, Recipe, Setting, quantize_by_recipe, read_recipe, recipe_of
from anybit.errors import ConfigError, NotRepresentable
from anybit.quantizers.auto import AutoQuantizationConfig
from anybit.quantizers.named import from_scheme

MODEL = Path(__file__).parents[1] / "examples" / "tiny-llama"
DOWN, UP, QUERY, OTHER = (
    "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "model.layers.2.self_attn.q_proj",
    "model.layers.3.mlp.down_proj",
)  # fmt: skip
# a scheme for all modules, another for some of them
CARRIERS = [
    ("gptq-4bit-g64", "gptq-8bit-g32"),
    ("auto-round-4bit-g64", "auto-round-2bit-g32"),
    ("awq-4bit-g64", "awq-4bit-g32"),
    ("mlx-4bit-g64", "mlx-8bit-g32"),
    ("ct-w4a16", "ct-fp8-dynamic"),
    ("torchao-int4-g64", "torchao-int8"),
    ("quark-uint4-g32", "quark-int8"),
    ("quark-mxfp4", "quark-fp8-ptpc"),
    ("gguf-q4_0", "gguf-q8_0"),
]


def layouts(config):
    """Module -> layout of the example model in a configuration that went through JSON."""
    config = AutoQuantizationConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    return {entry.slot.module: entry.parts[0].layout for entry in anybit.plan(MODEL, config).entries}


@pytest.mark.parametrize(("usual", "special"), CARRIERS)
def test_modules_get_the_layouts_of_their_own_schemes(usual, special):
    mixed = layouts(from_scheme(usual).per_module({DOWN: from_scheme(special), UP: from_scheme(special), QUERY: None}))
    everywhere, alone = layouts(from_scheme(usual)), layouts(from_scheme(special))
    assert mixed[DOWN] == alone[DOWN] != everywhere[DOWN]
    assert mixed[UP] == alone[UP]
    assert mixed[QUERY] is None
    assert everywhere[QUERY] is not None
    rest = [name for name in everywhere if name not in (DOWN, UP, QUERY)]
    assert [mixed[name] for name in rest] == [everywhere[name] for name in rest]


def test_the_original_configuration_is_not_changed():
    for usual, special in CARRIERS:
        config = from_scheme(usual)
        config.per_module({DOWN: from_scheme(special)})
        assert config == from_scheme(usual)


def test_a_method_with_one_setting_says_which_have_more():
    with pytest.raises(NotRepresentable, match=r"BitsAndBytesConfig has one setting.*gptq"):
        from_scheme("nf4").per_module({DOWN: None})
    with pytest.raises(NotRepresentable, match="mlx-4bit-g64"):
        from_scheme("metal-4bit-g64").per_module({DOWN: None})


YAML = """recipe: 1
quantization:
  scheme: gptq-4bit-g64
modules:
  model.layers.*.mlp.down_proj: {scheme: gptq-8bit-g32}
  model.layers.0.mlp.down_proj: dense
about: {who: me}
"""


class TestFiles:
    def test_yaml_and_json_say_the_same(self, tmp_path):
        (tmp_path / "a.yaml").write_text(YAML)
        recipe = read_recipe(tmp_path / "a.yaml")
        (tmp_path / "a.json").write_text(recipe.to_json())
        assert read_recipe(tmp_path / "a.json") == recipe
        assert recipe.modules == {"model.layers.*.mlp.down_proj": Setting("gptq-8bit-g32"), DOWN: None}

    def test_the_last_name_that_fits_counts(self):
        names = [f"model.layers.{number}.mlp.down_proj" for number in range(3)]
        own = recipe_of(
            {"quantization": "gptq-4bit-g64", "modules": {names[0]: "dense", "*.down_proj": "gptq-8bit-g32"}}
        )
        assert all(key.startswith("+:") for key in own.config(names).dynamic)
        own = recipe_of(
            {"quantization": "gptq-4bit-g64", "modules": {"*.down_proj": "gptq-8bit-g32", names[0]: "dense"}}
        )
        assert [key[:2] for key in own.config(names).dynamic] == ["+:", "+:", "-:"]

    def test_options(self):
        made = recipe_of({"quantization": {"method": "gptq", "options": {"bits": 3}}}).config()
        assert (made.bits, made.group_size) == (3, 128)

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (("gptq-8bit-g32", "gptq-9bit-g32"), r"line 5: modules\..*down_proj\.scheme .*did you mean 'gptq-.bit-g32'"),
            (("about:", "abuot:"), r"line 7: abuot is no key of a recipe; did you mean 'about'"),
            (("recipe: 1", "recipe: 2"), r"line 1: recipe is 2; .* version 1"),
            (("scheme: gptq-4bit-g64", "schema: gptq-4bit-g64"), r"line 3: quantization\.schema is no key.*'scheme'"),
            (("about: {who: me}", "algorithm: 3"), r"line 7: algorithm is 3; it must be text"),
            (("about: {who: me}", "calibration: {samples: 4}"), r"line 7: calibration has no `text`"),
            (("about: {who: me}", "calibration: {text: a, samples: -1}"), r"calibration\.samples is -1"),
            (("modules:", "modules: [1]\nmodule:"), "modul"),
            (("quantization:", "quantisation:"), "did you mean 'quantization'"),
            (("  scheme: gptq-4bit-g64", "  {"), r"line \d+: not YAML"),
        ],
    )  # fmt: skip
    def test_errors_name_file_line_key_and_cure(self, tmp_path, change, says):
        file = tmp_path / "wrong.yaml"
        file.write_text(YAML.replace(*change))
        with pytest.raises(ConfigError, match=says) as error:
            read_recipe(file)
        assert str(error.value).startswith(str(file))

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ('{"recipe": 1,\n "quantization" 3}', "line 2: not JSON"),
            ('{"recipe": 1, "recipe": 1}', "'recipe' is there twice"),
            ("[]", "must be an object"),
            ("{}", "has no `quantization`"),
            ('{"quantization": {"scheme": "nf4", "method": "gptq"}}', "either `scheme` or `method`"),
            ('{"quantization": {"method": "gptqq"}}', "did you mean 'gptq'"),
            ("[" * 100_000, "nested too deeply"),
        ],
    )
    def test_json_errors(self, tmp_path, text, says):
        file = tmp_path / "wrong.json"
        file.write_text(text)
        with pytest.raises(ConfigError, match=re.escape(says)):
            read_recipe(file)

    def test_a_file_that_is_not_there(self, tmp_path):
        with pytest.raises(ConfigError, match="No such file"):
            read_recipe(tmp_path / "none.json")

    def test_names_that_fit_nothing_and_other_methods(self):
        wrong = Recipe(Setting("gptq-4bit-g64"), {"model.layers.*.mlp.dwn_proj": None})
        with pytest.raises(ConfigError, match=r"fits no module.*did you mean 'model.layers.0.mlp.down_proj'"):
            wrong.config([DOWN])
        with pytest.raises(ConfigError, match="one checkpoint is of one method"):
            Recipe(Setting("gptq-4bit-g64"), {DOWN: Setting("nf4")}).config([DOWN])


def test_a_recipe_is_followed_and_written_beside_the_result(tmp_path, capsys):
    file = tmp_path / "own.yaml"
    file.write_text(YAML)
    out = tmp_path / "out"
    assert run(["quantize", str(MODEL), "-o", str(out), "--recipe", str(file), "--quiet"]) == 0
    with Checkpoint.open(out) as checkpoint:
        bits = {
            name: 32 * checkpoint.tensors[f"{name}.qweight"].shape[0] // 768 for name in (UP, OTHER) if name != DOWN
        }
        assert bits == {UP: 8, OTHER: 8}
        assert f"{DOWN}.weight" in checkpoint.tensors
        assert 32 * checkpoint.tensors[f"{QUERY}.qweight"].shape[0] // 256 == 4
    assert read_recipe(out / FILE_NAME).to_dict() == read_recipe(file).to_dict()
    capsys.readouterr()
    assert run(["quantize", str(MODEL), "-o", str(out), "--recipe", str(file), "--scheme", "nf4"]) == 2
    assert "exclude each other" in capsys.readouterr().err


def test_what_is_said_of_the_hub_and_of_pickles_is_passed_on(monkeypatch):
    from anybit.engine import recipe as module

    asked = []
    monkeypatch.setattr(module, "prepare", lambda *args, **options: asked.append(options) or real(MODEL, args[1]))
    monkeypatch.setattr(module, "quantize", lambda *args, **options: asked.append(options))
    given = {"hub_options": {"revision": "abc"}, "allow_pickle": True}
    quantize_by_recipe("owner/name", "out", Recipe(Setting("gptq-4bit-g64"), {DOWN: None}), **given)
    assert len(asked) == 2
    assert all(given.items() <= options.items() for options in asked)


def test_calibration_and_algorithm_are_the_recipes(tmp_path):
    (tmp_path / "text.txt").write_text("The cat sat on the mat and looked at the moon. " * 40)
    (tmp_path / "own.json").write_text(
        json.dumps({"quantization": "gptq-4bit-g64", "algorithm": "gptq", "algorithm_options": {"damp": 0.1},
                    "calibration": {"text": "text.txt", "samples": 2, "sequence_length": 32}})
    )  # fmt: skip
    plan = quantize_by_recipe(MODEL, tmp_path / "out", read_recipe(tmp_path / "own.json"))
    reasons = {entry.reason for entry in plan.entries if entry.action == "quantize"}
    assert reasons == {"calibrated with 64 tokens"}
