"""Module patterns mean what they mean to transformers, and none of them takes long."""

from __future__ import annotations

import contextlib
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anybit.errors import InvalidOption
from anybit.quantizers import HfQuantizer, should_convert_module
from anybit.quantizers.matching import LIMIT_PATTERN, SafePattern, matching_pattern

NAMES = [
    "lm_head", "model.layers.1", "model.layers.11", "model.layers.11.mlp.gate", "model.layers.11.mlp.gate_proj",
    "model.embed_tokens", "model.decoder.layers.23.fc1", "vision_tower.blocks.0.attn.qkv", "a", "",
]  # fmt: skip
PATTERNS = [
    "lm_head", "model.layers.1", "layers.1", "model.layers.*.mlp.gate", "mlp.gate", "fc1", "head", "model.layers.1|lm_head",
    r"model\.layers\.\d+\.mlp", "model.layers.(1|11)", "vision_tower", "(?:model|vision_tower)\\..*", "^model", ".*gate$",
    "model.", "model.*.*.*gate", "(model|vision_tower|lm_head)+.(layers|blocks)",
    "(model.)+layers", "[a-z_]+\\.blocks", "", "(?i:LM_HEAD)", "(?i:(MODEL.)+)LAYERS", "(?i:(MODEL.)+)layers",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_as_in_transformers(pattern):
    theirs = pytest.importorskip("transformers.quantizers.quantizers_utils").should_convert_module
    for name in NAMES:
        assert should_convert_module(name, [pattern]) == theirs(name, [pattern]), name
        assert should_convert_module(name, None) is theirs(name, None) is True
    assert [should_convert_module(name, PATTERNS[:5]) for name in NAMES] == [
        theirs(name, PATTERNS[:5]) for name in NAMES
    ]


def test_the_first_matching_pattern_is_named():
    assert matching_pattern("model.layers.1.mlp", ["lm_head", "mlp", "model"]) == "mlp"
    assert matching_pattern("model.layers.1.mlp", ["lm_head"]) is None


ATOMS = st.sampled_from(["a", "b", ".", r"\.", r"\d", r"\w", "[ab]", "[^a.]", "[a-c1]", "1"])
REPEATS = st.sampled_from(["", "", "*", "+", "?", "{2}", "{1,2}", "*?", "{0,3}"])


def combined(inner):
    piece = st.builds("{}{}".format, inner, REPEATS)
    return st.one_of(
        st.builds("(?:{}|{})".format, piece, piece),
        st.builds("({})".format, st.lists(piece, min_size=1, max_size=3).map("".join)),
        st.builds("(?:(?={}){})".format, piece, piece),
        st.builds("(?:(?!{}){})".format, piece, piece),
        st.builds("(?:(?<=a){})".format, piece),
    )


EXPRESSIONS = st.lists(
    st.builds("{}{}".format, st.recursive(ATOMS, combined, max_leaves=5), REPEATS), min_size=1, max_size=3
).map("".join)


@settings(max_examples=300, deadline=None)
@given(EXPRESSIONS, st.text("ab.1c", max_size=8))
def test_the_bounded_matcher_agrees_with_re(pattern, text):
    bounded = SafePattern(pattern)
    bounded._re = bounded._re_boundary = None  # as for a pattern that would be dangerous for `re`
    assert bounded.starts(text) == bool(re.match(f"(?:{pattern})", text))
    assert bounded.covers(text) == bool(re.fullmatch(pattern, text))
    assert bounded.searches(text) == bool(re.search(pattern, text))
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    assert bounded.starts(text, boundary=True) == bool(re.match(f"(?:{pattern}){boundary}", text))


SLOW = [
    "(a+)+$", "(a|a)*$", "(a*)*b", "(.*)(.*)(.*)(.*)(.*)x", "((a{0,50}){0,50}){0,50}b", "(?=(a+)+b)a*", "(a|aa)+$", "(aa?)+$",
    "(a?){60}a{60}b", "a?" * 60 + "a" * 60 + "b", "(a|aa)" * 40 + "b", ".*.*b", ".*a?a?a?a?.*b", "(?=.*(a|aa)+b).*", "(?<!ab)(a|b|ab)+c",
]  # fmt: skip


@pytest.mark.parametrize("pattern", SLOW)
def test_no_pattern_takes_long(pattern):
    started = time.process_time()
    for text in ("a" * 60, "a" * 60 + "!", "a" * 1000 + "!"):
        with contextlib.suppress(InvalidOption):  # "takes too long" is an answer, too
            should_convert_module(text, [pattern])
    assert time.process_time() - started < 5


def test_too_many_steps_name_pattern_and_module():
    with pytest.raises(InvalidOption, match="takes too long") as caught:
        should_convert_module("a" * 1000, ["(" * 40 + "a*" + ")*" * 40 + "b"])
    assert "'" + "a" * 1000 + "'" in str(caught.value)


def test_leading_flags():
    assert not should_convert_module("LM_head", ["(?i)lm_HEAD"])
    assert not should_convert_module("LM_head.x", ["(?i)(lm|x)+_HEAD"])
    assert should_convert_module("LM_head", ["lm_HEAD"])


def test_a_very_long_name_is_refused():
    for pattern in (".*b", "(a|b)*c"):
        with pytest.raises(InvalidOption, match="a module name has 2000 characters"):
            should_convert_module("a" * 2000, [pattern])


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("*.mlp", "is not a valid regular expression"),
        ("(", "is not a valid"),
        ("a" * (LIMIT_PATTERN + 1), "more than 2048"),
    ],
    ids=lambda value: value[:20],
)
def test_broken_patterns_are_named(pattern, says):
    with pytest.raises(InvalidOption, match=says) as caught:
        should_convert_module("model.layers.0", [pattern])
    assert pattern[:50] in str(caught.value)


def test_back_references_are_refused_where_they_could_be_slow():
    with pytest.raises(InvalidOption, match="not allowed in a file"):
        should_convert_module("a" * 30, [r"(a+)+\1"])


def tiny(tied: bool):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=16,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("tied", [False, True])
def test_default_skips_as_in_transformers(tied):
    theirs = pytest.importorskip("transformers.quantizers.base").HfQuantizer.get_modules_to_not_convert
    model = tiny(tied)
    for skips in (None, [], ["q_proj"]):
        for kept in (None, ["norm"]):
            for more in (False, True):
                ours = HfQuantizer.get_modules_to_not_convert(model, skips, kept, more)
                assert sorted(ours) == sorted(set(theirs(model, skips, kept, more)))
