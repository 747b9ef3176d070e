"""A tokenizer.json in GGUF's words. What is written is read back and compared with the original on texts of every sort."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from anybit.errors import ConfigError
from anybit.methods._gguf_splits import NFC, OLD, SPLITS, WHOLE_WORDS_FIRST
from anybit.methods._gguf_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    SPECIAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    TokenizerFiles,
    splitter,
)  # fmt: skip
from anybit.methods._gguf_tokenizer_words import unigram_values, word_piece_values

Read = Callable[[str], "bytes | None"]
# tried first: the names whose rules llama.cpp knows best
PREFERRED = ("llama-bpe", "qwen2", "gpt-4o", "tekken", "gpt-2", "smollm", "default")
PROBES = (
    "Hello world", " the cat  sat\ton 1234567 mats.\n\nIt's THEIR cat's, DON'T we'll", "naïve café ☕ 日本語 Ünïcode ǅ",
    "   leading", "trailing   ", "a\r\n\r\n  b\n", "x" * 40, "snake_case camelCase HTTPServer", "3.14 1,000 12:34 #42!!! ...",
    "e\u0301 \u00a0 \u3000", "def f(x):\n\treturn x**2  # ok\n", "🙂🙂 мир العربية हिन्दी",
)  # fmt: skip


def vocabulary(read: Read, rows: int, context: int) -> dict[str, Any]:
    """tokenizer.* metadata for an embedding of `rows`. ConfigError for a tokenizer that GGUF's kinds cannot be."""
    raw = read("tokenizer.json")
    if raw is None:
        if read("tokenizer.model") is not None:
            _refuse(
                "there is a tokenizer.model and no tokenizer.json. Make one: "
                "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            )
        return {"tokenizer.ggml.model": "no_vocab"}
    from tokenizers import Tokenizer

    theirs, state = Tokenizer.from_str(raw.decode()), json.loads(raw)
    config = json.loads(read("tokenizer_config.json") or b"{}")
    model = state["model"]
    kind = model.get("type")
    if kind not in ("BPE", "Unigram", "WordPiece"):
        _refuse(
            f"its model is {kind!r}; BPE is written, of bytes or of SentencePiece's kind, Unigram and BERT's WordPiece"
        )
    tokens = {number: token for token, number in theirs.get_vocab().items()}
    if tokens and max(tokens) >= rows:
        _refuse(
            f"it has the token {max(tokens)}, and the model's embedding only {rows} rows; llama.cpp needs one for each"
        )
    added = {token["id"]: bool(token["special"]) for token in state.get("added_tokens") or ()}
    texts = [tokens.get(number, f"[PAD{number}]") for number in range(rows)]
    kinds = [
        UNUSED
        if number not in tokens
        else NORMAL
        if number not in added
        else CONTROL
        if added[number]
        else USER_DEFINED
        for number in range(rows)
    ]
    values: dict[str, Any] = {}
    forms: list[dict[str, Any]] = [{}]
    if kind == "BPE":
        values["tokenizer.ggml.model"] = "llama" if model.get("byte_fallback") else "gpt2"
        merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    if kind == "Unigram":
        forms = unigram_values(state, texts, kinds, _refuse)
        kinds[model["unk_id"]] = UNKNOWN
    elif kind == "WordPiece":
        unknown = theirs.token_to_id(model.get("unk_token") or "")
        if unknown is None:
            _refuse("its WordPiece model names no unknown token")
        kinds[unknown] = kinds[unknown] if kinds[unknown] == CONTROL else UNKNOWN
        values["tokenizer.ggml.unknown_token_id"] = unknown
        forms = word_piece_values(state, texts, kinds, _refuse)
    elif model.get("byte_fallback"):
        unknown = model.get("unk_token")
        for number, text in enumerate(texts):
            if text == unknown:
                kinds[number] = UNKNOWN
            elif len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
                kinds[number] = BYTE
        values["tokenizer.ggml.pre"] = "default"
        values["tokenizer.ggml.scores"] = _scores(texts, merges)
        values["tokenizer.ggml.add_space_prefix"] = '"Prepend"' in json.dumps(state.get("normalizer"))
    else:
        values["tokenizer.ggml.pre"] = _pre(theirs, state)
        values["tokenizer.ggml.merges"] = [" ".join(merge) for merge in merges]
    values["tokenizer.ggml.tokens"] = texts
    values["tokenizer.ggml.token_type"] = array("i", kinds)
    place = theirs.get_vocab()
    for own, name in SPECIAL.items():
        found = config.get(f"{own}_token")
        content = found.get("content") if isinstance(found, Mapping) else found
        if isinstance(content, str) and content in place:
            values[f"tokenizer.ggml.{name}_token_id"] = place[content]
    bare, whole = theirs.encode("a", add_special_tokens=False).ids, theirs.encode("a").ids
    values["tokenizer.ggml.add_bos_token"] = whole[:1] != bare[:1]
    values["tokenizer.ggml.add_eos_token"] = whole[-1:] != bare[-1:]
    template = read("chat_template.jinja")
    chosen = template.decode(errors="surrogateescape") if template is not None else _template(config)
    if chosen:
        values["tokenizer.chat_template"] = chosen
    if kind == "WordPiece":
        values |= {"tokenizer.ggml.add_bos_token": whole[:1] != bare[:1], "tokenizer.ggml.add_eos_token": False}
    differences = [_difference(theirs, {**values, **form}, context) for form in forms]
    if None not in differences:
        _refuse(str(differences[0]))
    return {**values, **forms[differences.index(None)]}


def _refuse(why: str) -> NoReturn:
    raise ConfigError(f"the tokenizer cannot be put into a GGUF file: {why}")


def _scores(texts: list[str], merges: list[tuple[str, ...]]) -> array[float]:
    """SentencePiece joins the best-scored pair first, a list of merges the first one: a token's score is its place."""
    rank: dict[str, int] = {}
    for number, merge in enumerate(merges):
        rank.setdefault("".join(merge), number)
    return array("f", [-float(rank.get(text, len(merges))) for text in texts])


def _pre(theirs: Any, state: Mapping[str, Any]) -> str:
    """The name of the rule that splits as this tokenizer does."""
    if theirs.pre_tokenizer is None or '"ByteLevel"' not in json.dumps(state.get("pre_tokenizer")):
        _refuse("it is BPE, neither over bytes nor with SentencePiece's byte fallback")
    composed = '"NFC"' in json.dumps(state.get("normalizer"))
    whole = bool(state["model"].get("ignore_merges"))
    wanted = [theirs.pre_tokenizer.pre_tokenize_str(probe) for probe in PROBES]
    for name in (name for name in dict.fromkeys((*PREFERRED, *SPLITS)) if name not in OLD):
        if (name in NFC) == composed and (name in WHOLE_WORDS_FIRST) == whole:
            ours = splitter(name)
            if all(ours.pre_tokenize_str(probe) == pieces for probe, pieces in zip(PROBES, wanted, strict=True)):
                return name
    _refuse(
        f"it splits text before BPE by a rule that has none of the names {', '.join(SPLITS)}; llama.cpp knows rules by name only"
    )


def _template(config: Mapping[str, Any]) -> str | None:
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {item.get("name"): item.get("template") for item in found if isinstance(item, Mapping)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _difference(theirs: Any, values: Mapping[str, Any], context: int) -> str | None:
    """What a reader makes of it that gives other tokens; None when all are the same."""
    from tokenizers import Tokenizer

    files = TokenizerFiles.from_values("the new file", values, context)()
    ours = Tokenizer.from_str(files["tokenizer.json"].decode())
    for probe in PROBES:
        if ours.encode(probe).ids != theirs.encode(probe).ids:
            found, wanted = ours.encode(probe).tokens[:12], theirs.encode(probe).tokens[:12]
            return f"read back, it gives {found} for {probe[:30]!r}, not {wanted}"
    return None
