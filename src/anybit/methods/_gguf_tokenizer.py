"""The tokenizer inside a GGUF file as the files `AutoTokenizer` reads: tokenizer.json, tokenizer_config.json, chat template.

Two kinds are common: "llama" (SentencePiece's BPE: the best-scored neighbours are joined first; unknown characters become
bytes) and "gpt2" (BPE over bytes, with merges, after a split that `tokenizer.ggml.pre` names, see `_gguf_splits`); for "t5" and
"bert" see `_gguf_tokenizer_words`. The chat template is text: it is copied, never rendered.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from anybit.errors import ConfigError, CorruptFile
from anybit.methods._gguf_metadata import Metadata
from anybit.methods._gguf_splits import BEGINS, NFC, SPLITS, WHOLE_WORDS_FIRST
from anybit.methods._gguf_tokenizer_words import marked_as_theirs, unigram, word_pieces

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
# transformers' name of a special token -> the file's
SPECIAL = {
    "bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "cls": "cls", "sep": "seperator", "mask": "mask",
}  # fmt: skip


@dataclass(frozen=True)
class TokenizerFiles:
    """Makes the files when they are asked for. `kind` "" : the file holds no tokenizer."""

    path: str
    kind: str
    pre: str
    tokens: Sequence[str]
    types: Sequence[int]
    scores: Sequence[float]
    merges: Sequence[str]
    special: dict[str, int]
    add_bos: bool | None
    add_eos: bool
    add_space_prefix: bool
    template: str | None
    context: int
    merge_spaces: bool = True  # Unigram: spaces at the ends go, others become one
    characters: Sequence[int] = ()  # Unigram: a table of replaced characters
    lowercase: bool = True  # WordPiece
    strip_accents: bool | None = None

    @classmethod
    def of(cls, m: Metadata) -> TokenizerFiles:
        """From metadata; types of its values are checked, what they mean is not yet."""
        kind = m.text("tokenizer.ggml.model", "")
        if not kind or not m.has("tokenizer.ggml.tokens"):
            return cls(str(m.path), "", "", (), (), (), (), {}, None, False, False, None, 0)
        tokens = m.texts("tokenizer.ggml.tokens")
        special = {name: number for name, own in SPECIAL.items() if (number := m.token(own, len(tokens))) is not None}
        return cls(
            str(m.path),
            kind,
            m.text("tokenizer.ggml.pre", "default"),
            tokens,
            m.numbers("tokenizer.ggml.token_type", ()),
            m.numbers("tokenizer.ggml.scores", ()),
            m.texts("tokenizer.ggml.merges") if m.has("tokenizer.ggml.merges") else (),
            special,
            m.flag("tokenizer.ggml.add_bos_token", False) if m.has("tokenizer.ggml.add_bos_token") else None,
            m.flag("tokenizer.ggml.add_eos_token", kind == "t5"),
            m.flag("tokenizer.ggml.add_space_prefix", True),
            m.text("tokenizer.chat_template", "") or None,
            m.whole("context_length"),
            m.flag("tokenizer.ggml.remove_extra_whitespaces", False),
            m.numbers("tokenizer.ggml.precompiled_charsmap", ()),
            m.flag("tokenizer.ggml.normalizer.lowercase", True),
            m.flag("tokenizer.ggml.normalizer.strip_accents", True)
            if m.has("tokenizer.ggml.normalizer.strip_accents")
            else None,
        )

    @classmethod
    def from_values(cls, path: str, values: Mapping[str, Any], context: int) -> TokenizerFiles:
        """From metadata that this library made."""
        special = {
            name: values[f"tokenizer.ggml.{own}_token_id"]
            for name, own in SPECIAL.items()
            if f"tokenizer.ggml.{own}_token_id" in values
        }
        get = {key.removeprefix("tokenizer.").removeprefix("ggml."): value for key, value in values.items()}.get
        return cls(
            path, get("model", ""), get("pre", "default"), get("tokens", ()), get("token_type", ()), get("scores", ()),
            get("merges", ()), special, get("add_bos_token"), get("add_eos_token", False), get("add_space_prefix", True),
            get("chat_template"), context, get("remove_extra_whitespaces", False), get("precompiled_charsmap", ()),
            get("normalizer.lowercase", True), get("normalizer.strip_accents"),
        )  # fmt: skip

    def __call__(self) -> dict[str, bytes]:
        """File name -> content. ConfigError for a kind of tokenizer that is not known, CorruptFile for contradictions."""
        if not self.kind:
            return {}
        for name, values in (("token_type", self.types), ("scores", self.scores)):
            if len(values) not in (0, len(self.tokens)):
                raise CorruptFile(
                    f"{self.path}: {len(self.tokens)} tokens, but {len(values)} values in tokenizer.ggml.{name}"
                )
        made = _MAKERS.get(self.kind)
        if made is None:
            raise ConfigError(
                f"{self.path}: tokenizer.ggml.model is {self.kind!r}; {', '.join(sorted(_MAKERS))} are understood. "
                "Pass a tokenizer of your own"
            )
        own = replace(self, tokens=marked_as_theirs(self.tokens, self.types)) if self.kind == "bert" else self
        tokenizer = made(own)
        own._mark(tokenizer)
        files = {
            "tokenizer.json": tokenizer.to_str().encode(),
            "tokenizer_config.json": (json.dumps(own._config(), indent=2, ensure_ascii=False) + "\n").encode(),
        }
        if self.template is not None:
            files["chat_template.jinja"] = self.template.encode(errors="surrogatepass")
        return files

    def _config(self) -> dict[str, Any]:
        named = {
            f"{name}_token": self.tokens[number] for name, number in self.special.items() if number < len(self.tokens)
        }
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": self.context,
            **named,
        }

    @property
    def begins(self) -> bool:
        """Whether a text begins with the BOS token; llama.cpp's choice where the file says nothing."""
        if self.add_bos is not None:
            return self.add_bos
        return self.kind in ("llama", "bert") or self.pre in BEGINS

    def _mark(self, tokenizer: Any) -> None:
        """Special tokens, and what is put before and after a text."""
        from tokenizers import AddedToken, processors

        control = [t for t, kind in zip(self.tokens, self.types) if kind in (CONTROL, UNKNOWN)]
        control += [self.tokens[n] for n in self.special.values() if n < len(self.tokens)]
        own = [t for t, kind in zip(self.tokens, self.types) if kind == USER_DEFINED and t]
        tokenizer.add_special_tokens([
            AddedToken(token, special=True, normalized=False) for token in dict.fromkeys(control) if token
        ])  # fmt: skip
        tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in own])
        ends = {"bos": self.begins, "eos": self.add_eos}
        if self.kind == "bert":  # with names of their own
            ends = {"cls" if "cls" in self.special else "bos": self.begins, "sep": True}
        around = {
            name: self.tokens[self.special[name]]
            for name, wanted in ends.items()
            if wanted and self.special.get(name, len(self.tokens)) < len(self.tokens)
        }
        if around:
            before, after = around.get("bos") or around.get("cls"), around.get("eos") or around.get("sep")
            single = [*([before] if before else []), "$A", *([after] if after else [])]
            pair = [*single, *([f"{before}:1"] if before else []), "$B:1", *([f"{after}:1"] if after else [])]
            template = processors.TemplateProcessing(
                single=single, pair=pair, special_tokens=[(around[name], self.special[name]) for name in around]
            )
            behind = tokenizer.post_processor
            tokenizer.post_processor = template if behind is None else processors.Sequence([behind, template])

    def vocabulary(self) -> dict[str, int]:
        """Token -> id. A token that appears twice is kept under its first id."""
        found: dict[str, int] = {}
        for number, token in enumerate(self.tokens):
            try:
                token.encode()
            except UnicodeEncodeError as error:
                raise CorruptFile(
                    f"{self.path}: token {number} is not UTF-8, which a tokenizer.json cannot hold"
                ) from error
            found.setdefault(token, number)
        return found


def splitter(pre: str) -> Any:
    """What byte-level BPE does to a text first, by its name in `SPLITS`."""
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence([
        *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS[pre]),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip


def _byte_level(files: TokenizerFiles) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    if files.pre not in SPLITS:
        raise ConfigError(
            f"{files.path}: tokenizer.ggml.pre is {files.pre!r}; {', '.join(sorted(SPLITS))} are understood. Pass a tokenizer of "
            "your own"
        )
    vocabulary = files.vocabulary()
    merges = []
    for number, merge in enumerate(files.merges):
        left, space, right = merge.partition(" ")
        if not space or left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise CorruptFile(
                f"{files.path}: merge {number} is {merge[:60]!r}, which does not join two tokens to a third"
            )
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=files.pre in WHOLE_WORDS_FIRST))
    if files.pre in NFC:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = splitter(files.pre)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _sentencepiece(files: TokenizerFiles) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = files.vocabulary()
    unknown = files.special.get("unk")
    tokenizer = Tokenizer(models.BPE(
        vocab=vocabulary, merges=_merges(files, vocabulary), fuse_unk=True, byte_fallback=True,
        unk_token=files.tokens[unknown] if unknown is not None and unknown < len(files.tokens) else None,
    ))  # fmt: skip
    spaces = normalizers.Replace(" ", "▁")
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if files.add_space_prefix:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        back.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(back)
    return tokenizer


def _merges(files: TokenizerFiles, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to make a token of two, best score first."""
    if not files.scores:
        raise CorruptFile(
            f"{files.path}: the tokenizer has no tokenizer.ggml.scores, and cannot be rebuilt without them"
        )
    found: list[tuple[float, int, int, str, str]] = []
    joined = {
        token: number
        for token, number in vocabulary.items()
        if len(token) > 1 and (not files.types or files.types[number] in (NORMAL, UNUSED))
    }
    longest = 256  # SentencePiece's own limit is 16 characters by default
    for token, number in joined.items():
        for cut in range(1, len(token) if len(token) <= longest else 0):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                found.append((-files.scores[number], vocabulary[left], vocabulary[right], left, right))
    found.sort(key=lambda entry: entry[:3])
    return [entry[3:] for entry in found]


_MAKERS = {"gpt2": _byte_level, "llama": _sentencepiece, "t5": unigram, "bert": word_pieces}
