"""Unigram (T5's kind, `tokenizer.ggml.model` = t5) and WordPiece (BERT's, = bert) tokenizers of GGUF files, both ways.

Unigram: pieces with log-likelihoods; a text becomes the likeliest pieces. WordPiece: the longest piece that fits, word by word; a
file marks the pieces that begin a word by "▁", transformers those that go on by "##".
"""

from __future__ import annotations

import base64
import json
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from anybit.errors import CorruptFile

UNKNOWN, CONTROL, BYTE = 2, 3, 6
SPACE = "▁"
Refuse = Callable[[str], NoReturn]


# --- a file -> tokenizers' object --------------------------------------------------------------------------------------------


def unigram(files: Any) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    if len(files.scores) != len(files.tokens):
        raise CorruptFile(
            f"{files.path}: the tokenizer has no tokenizer.ggml.scores, and cannot be rebuilt without them"
        )
    unknown = files.special.get("unk")
    if unknown is None:
        raise CorruptFile(
            f"{files.path}: the tokenizer names no tokenizer.ggml.unknown_token_id, which this kind needs"
        )
    files.vocabulary()  # says which token is not UTF-8
    pieces = list(zip(files.tokens, map(float, files.scores), strict=True))
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=unknown, byte_fallback=BYTE in files.types))
    steps: list[Any] = [normalizers.Precompiled(_character_map(files))] if files.characters else []
    if files.merge_spaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    scheme = "always" if files.add_space_prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
    back = [decoders.Metaspace(SPACE, prepend_scheme=scheme)]
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), *back]) if BYTE in files.types else back[0]
    return tokenizer


def _character_map(files: Any) -> bytes:
    """SentencePiece's table of replaced characters: bytes of a tree as uint32, the tree, texts that end with zero."""
    try:
        table = bytes(byte & 0xFF for byte in files.characters)
    except TypeError as error:
        raise CorruptFile(f"{files.path}: tokenizer.ggml.precompiled_charsmap is no list of bytes") from error
    tree = int.from_bytes(table[:4], "little")
    if len(table) < 4 or tree % 4 or tree + 4 >= len(table):
        raise CorruptFile(
            f"{files.path}: tokenizer.ggml.precompiled_charsmap has {len(table)} bytes and says that {tree} of them are a tree"
        )
    return table


def word_pieces(files: Any) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    unknown = files.special.get("unk")
    if unknown is None:
        raise CorruptFile(
            f"{files.path}: the tokenizer names no tokenizer.ggml.unknown_token_id, which this kind needs"
        )
    tokenizer = Tokenizer(models.WordPiece(files.vocabulary(), unk_token=files.tokens[unknown]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=files.lowercase, strip_accents=files.strip_accents)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def marked_as_theirs(tokens: Sequence[str], types: Sequence[int]) -> list[str]:
    """Pieces of words in transformers' words."""
    kinds = types or [1] * len(tokens)
    return [
        token
        if kind in (UNKNOWN, CONTROL)
        else token[1:]
        if token.startswith(SPACE) and len(token) > 1
        else f"##{token}"
        for token, kind in zip(tokens, kinds, strict=True)
    ]


# --- tokenizer.json -> metadata ----------------------------------------------------------------------------------------------


def unigram_values(
    state: Mapping[str, Any], texts: Sequence[str], kinds: list[int], refuse: Refuse
) -> list[dict[str, Any]]:
    """Metadata beside the tokens, in the forms that may fit, the likeliest first. `kinds` gets the bytes."""
    model = state["model"]
    scores = [min(score for _, score in model["vocab"])] * len(texts)
    for number, (_, score) in enumerate(model["vocab"]):
        scores[number] = score
    if model.get("unk_id") is None:
        refuse("its Unigram model names no unknown token")
    if model.get("byte_fallback"):
        for number, text in enumerate(texts):
            if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
                kinds[number] = BYTE
    common: dict[str, Any] = {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": array("f", scores),
        "tokenizer.ggml.unknown_token_id": model["unk_id"],
    }
    table = _find(state.get("normalizer"), "precompiled_charsmap")
    if table:
        common["tokenizer.ggml.precompiled_charsmap"] = array("B", base64.b64decode(table))
    return [
        {**common, "tokenizer.ggml.remove_extra_whitespaces": merged, "tokenizer.ggml.add_space_prefix": prefix}
        for merged in (True, False)
        for prefix in (True, False)
    ]


def _find(part: Any, name: str) -> Any:
    """The first setting of that name in a tree of JSON."""
    if isinstance(part, Mapping):
        if name in part:
            return part[name]
        part = list(part.values())
    found = (_find(one, name) for one in part) if isinstance(part, list) else ()
    return next((one for one in found if one is not None), None)


def word_piece_values(
    state: Mapping[str, Any], texts: list[str], kinds: list[int], refuse: Refuse
) -> list[dict[str, Any]]:
    """As `unigram_values`; `texts` are put into a file's words."""
    model = state["model"]
    prefix = model.get("continuing_subword_prefix", "##")
    normal = state.get("normalizer") or {}
    if '"BertNormalizer"' not in json.dumps(normal) or '"BertPreTokenizer"' not in json.dumps(
        state.get("pre_tokenizer")
    ):
        refuse("it is WordPiece with other rules than BERT's, which are built into llama.cpp")
    for number, (text, kind) in enumerate(zip(texts, kinds, strict=True)):
        if kind not in (UNKNOWN, CONTROL):
            texts[number] = text.removeprefix(prefix) if text.startswith(prefix) else SPACE + text
    lower = bool(_find(normal, "lowercase"))
    strip = _find(normal, "strip_accents")
    values = {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.normalizer.lowercase": lower,
    }
    if strip is not None:
        values["tokenizer.ggml.normalizer.strip_accents"] = bool(strip)
    return [values]
