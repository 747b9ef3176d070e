"""The tokenizer inside a GGUF file as the files `AutoTokenizer` reads: tokenizer.json, tokenizer_config.json, chat template.

Two kinds are common: "llama" (SentencePiece's BPE: the best-scored neighbours are joined first; unknown characters become
bytes) and "gpt2" (BPE over bytes, with merges, after a split that `tokenizer.ggml.pre` names). The chat template is text: it is
copied, never rendered.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from anybit.errors import ConfigError, CorruptFile
from anybit.methods._gguf_metadata import Metadata

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_END = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{_END}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_CASED = rf"{_BEFORE}{_UPPER}*{_LOWER}+%s|{_BEFORE}{_UPPER}+{_LOWER}*%s|%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_END}"
_LLAMA3 = (_WORDS % r"\p{N}{1,3}",)
_QWEN2 = (_WORDS % r"\p{N}",)
_GPT4O = (_CASED % (f"{_CONTRACTIONS}?", f"{_CONTRACTIONS}?", r"\p{N}{1,3}"),)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SINGLE_DIGITS = (r"\p{N}", _GPT2)

# tokenizer.ggml.pre -> patterns, each splitting what the one before left
SPLITS: dict[str, tuple[str, ...]] = {
    "default": (
        r"[\p{P}\$\+<=>\^~\|]+",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
        r"\p{N}+",
        r"[0-9][0-9][0-9]",
    ),
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt", "jais", "trillion", "granite-docling", "dolma"), (_GPT2,)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "dbrx", "smaug-bpe", "chatglm-bpe", "glm4"), _LLAMA3),
    "pixtral": _LLAMA3,
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez", "seed-coder"), _QWEN2),
    **dict.fromkeys(("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b"), _SINGLE_DIGITS),
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O),
    "tekken": (_CASED % ("", "", r"\p{N}"),),
}  # fmt: skip
NFC = ("qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan")
WHOLE_WORDS_FIRST = ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken", "pixtral")
_BEGINS = ("llama-bpe", "llama3", "llama-v3", "tekken", "chatglm-bpe")


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

    @classmethod
    def of(cls, m: Metadata) -> TokenizerFiles:
        """From metadata; types of its values are checked, what they mean is not yet."""
        kind = m.text("tokenizer.ggml.model", "")
        if not kind or not m.has("tokenizer.ggml.tokens"):
            return cls(str(m.path), "", "", (), (), (), (), {}, None, False, False, None, 0)
        tokens = m.texts("tokenizer.ggml.tokens")
        special = {
            name: number
            for name, own in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
            if (number := m.token(own, len(tokens))) is not None
        }
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
            m.flag("tokenizer.ggml.add_eos_token", False),
            m.flag("tokenizer.ggml.add_space_prefix", True),
            m.text("tokenizer.chat_template", "") or None,
            m.whole("context_length"),
        )

    @classmethod
    def from_values(cls, path: str, values: Mapping[str, Any], context: int) -> TokenizerFiles:
        """From metadata that this library made."""
        special = {
            name: values[f"tokenizer.ggml.{own}_token_id"]
            for name, own in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
            if f"tokenizer.ggml.{own}_token_id" in values
        }
        get = {key.removeprefix("tokenizer.").removeprefix("ggml."): value for key, value in values.items()}.get
        return cls(
            path, get("model", ""), get("pre", "default"), get("tokens", ()), get("token_type", ()), get("scores", ()),
            get("merges", ()), special, get("add_bos_token"), get("add_eos_token", False), get("add_space_prefix", True),
            get("chat_template"), context,
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
        tokenizer = made(self)
        self._mark(tokenizer)
        files = {
            "tokenizer.json": tokenizer.to_str().encode(),
            "tokenizer_config.json": (json.dumps(self._config(), indent=2, ensure_ascii=False) + "\n").encode(),
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
        return self.kind == "llama" or self.pre in _BEGINS

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
        around = {
            name: self.tokens[self.special[name]]
            for name, wanted in (("bos", self.begins), ("eos", self.add_eos))
            if wanted and self.special.get(name, len(self.tokens)) < len(self.tokens)
        }
        if around:
            before, after = around.get("bos"), around.get("eos")
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


_MAKERS = {"gpt2": _byte_level, "llama": _sentencepiece}
