"""Unigram and WordPiece tokenizers, trained here on the bundled text, to a GGUF file and back; names of splits."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import anybit
from anybit import GgufConfig
from anybit.containers import Checkpoint
from anybit.errors import ConfigError, CorruptFile
from anybit.methods._gguf_splits import NFC, SPLITS
from anybit.methods._gguf_tokenizer import TokenizerFiles, splitter

DATA = Path(__file__).parents[1] / "examples" / "data" / "calibration.txt"
TEXTS = [
    "Hello world", "the cat  sat on 12345 mats.\n\nIt's THEIR cat's", "naïve café ☕ 日本語", " leading", "trailing ", "",
    "He said: “it is late”, and went down to the river.",
]  # fmt: skip


def lines() -> list[str]:
    return DATA.read_text()[:60_000].split("\n")


def trained_unigram(*, whole: bool, prefix: bool = True) -> Tokenizer:
    """`whole`: with T5's normalizer, spaces merged."""
    made = Tokenizer(models.Unigram())
    if whole:
        made.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")])
    made.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always" if prefix else "never")
    made.decoder = decoders.Metaspace("▁", prepend_scheme="always" if prefix else "never")
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=special, unk_token="<unk>", show_progress=False)
    made.train_from_iterator(lines(), trainer)
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", made.token_to_id("</s>"))]
    )
    return made


def trained_word_pieces(lowercase: bool) -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made.train_from_iterator(
        lines(), trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    ends = [(name, made.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return made


def through_a_file(folder: Path, tokenizer: Tokenizer, **names: str) -> tuple[Any, Any, dict[str, Any]]:
    """transformers' tokenizers: read from the file, and the original; the file's metadata."""
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size() + 3, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    wanted = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    wanted.save_pretrained(folder)
    anybit.quantize(folder, folder / "out", GgufConfig(mix="Q8_0"))
    file = next((folder / "out").iterdir())
    with Checkpoint.open(file) as checkpoint:
        values = {key: value for key, value in checkpoint.values.items() if key.startswith("tokenizer.")}
    return anybit.AutoTokenizer.from_pretrained(file), wanted, values


@pytest.mark.parametrize(("whole", "prefix"), [(True, True), (False, True), (False, False)])
def test_unigram_goes_there_and_back(whole: bool, prefix: bool, tmp_path: Path) -> None:
    tokenizer = trained_unigram(whole=whole, prefix=prefix)
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    ours, wanted, values = through_a_file(tmp_path, tokenizer, **names)
    for text in TEXTS:
        assert ours(text)["input_ids"] == wanted(text)["input_ids"], text
    assert ours.decode(ours("the old man", add_special_tokens=False)["input_ids"]) == "the old man"
    assert values["tokenizer.ggml.model"] == "t5"
    assert (values["tokenizer.ggml.remove_extra_whitespaces"], values["tokenizer.ggml.add_space_prefix"]) == (
        whole,
        prefix,
    )
    assert values["tokenizer.ggml.token_type"][:3].tolist() == [3, 3, 2]
    assert (values["tokenizer.ggml.add_eos_token"], ours.eos_token, ours.unk_token) == (True, "</s>", "<unk>")


@pytest.mark.parametrize("lowercase", [True, False])
def test_word_pieces_go_there_and_back(lowercase: bool, tmp_path: Path) -> None:
    names = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    ours, wanted, values = through_a_file(tmp_path, trained_word_pieces(lowercase), **names)
    for text in TEXTS:
        assert ours(text)["input_ids"] == wanted(text)["input_ids"], text
    assert (ours.cls_token, ours.sep_token, ours.mask_token) == ("[CLS]", "[SEP]", "[MASK]")
    assert values["tokenizer.ggml.model"] == "bert"
    assert values["tokenizer.ggml.normalizer.lowercase"] is lowercase
    # a word begins with "▁", what goes on has no mark, and special tokens stay as they are
    numbers = wanted.get_vocab()
    pieces = {piece: values["tokenizer.ggml.tokens"][number] for piece, number in numbers.items()}
    assert pieces["[CLS]"] == "[CLS]"
    assert all(
        stored == (piece[2:] if piece.startswith("##") else f"▁{piece}")
        for piece, stored in pieces.items()
        if not piece.startswith("[")
    )


def test_rules_that_are_not_berts_are_refused(tmp_path: Path) -> None:
    tokenizer = trained_word_pieces(True)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ConfigError, match="other rules than BERT's"):
        through_a_file(tmp_path, tokenizer, unk_token="[UNK]")


def files(**change: Any) -> TokenizerFiles:
    values = {
        "tokenizer.ggml.model": "t5", "tokenizer.ggml.tokens": ["<pad>", "</s>", "<unk>", "▁a", "b"],
        "tokenizer.ggml.scores": array("f", [0, 0, 0, -1, -2]), "tokenizer.ggml.token_type": array("i", [3, 3, 2, 1, 1]),
        "tokenizer.ggml.unknown_token_id": 2, "tokenizer.ggml.eos_token_id": 1, **change,
    }  # fmt: skip
    return TokenizerFiles.from_values("a.gguf", values, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.scores": ()}, "no tokenizer.ggml.scores"),
        ({"tokenizer.ggml.precompiled_charsmap": array("B", b"\x08\0\0\0abc")}, "charsmap has 7 bytes"),
        ({"tokenizer.ggml.precompiled_charsmap": ["x"]}, "no list of bytes"),
        ({"tokenizer.ggml.token_type": array("i", [1])}, "5 tokens, but 1 values"),
    ],
)
def test_contradictions_are_named(change: dict[str, Any], message: str) -> None:
    assert files()()
    with pytest.raises(CorruptFile, match=message):
        files(**change)()


def test_unknown_names_of_splits_are_refused() -> None:
    change = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "chameleon", "tokenizer.ggml.merges": []}
    with pytest.raises(ConfigError, match=r"tokenizer\.ggml\.pre is 'chameleon'; .*llama-bpe.* are understood"):
        files(**change)()


@pytest.mark.parametrize(
    ("name", "text", "pieces"),
    [  # what the patterns of llama.cpp 0.3.36 (llama-vocab.cpp) say of numbers, marks, capitals, ends of lines
        ("llama-bpe", "a1234 b", ["a", "123", "4", "Ġb"]),
        ("qwen2", "a1234 b", ["a", "1", "2", "3", "4", "Ġb"]),
        ("qwen35", "हि न", ["à¤¹à¤¿", "Ġà¤¨"]),
        ("qwen2", "हि न", ["à¤¹", "à¤¿", "Ġà¤¨"]),
        ("deepseek-v3", "12345.abc DEF", ["123", "45", ".abc", "ĠDEF"]),
        ("gpt-4o", "camelCase HTTPServer", ["camel", "Case", "ĠHTTPServer"]),
        ("falcon", "a`b 12345", ["a", "`", "b", "Ġ", "123", "45"]),
        ("viking", "a,b 12", ["a", ",", "b", "Ġ", "1", "2"]),
        ("seed-coder", "a!\n\nb", ["a", "!", "ĊĊ", "b"]),
        ("qwen2", "a!\n\nb", ["a", "!ĊĊ", "b"]),
        ("bailingmoe", "a!\n\nb", ["a", "!ĊĊ", "b"]),
    ],
)  # fmt: skip
def test_splits_are_as_their_patterns_say(name: str, text: str, pieces: list[str]) -> None:
    assert [piece for piece, _ in splitter(name).pre_tokenize_str(text)] == pieces


def test_every_name_has_patterns_that_work() -> None:
    assert set(NFC) <= set(SPLITS)
    for name in SPLITS:
        found = splitter(name).pre_tokenize_str("Ab 12 \n c'd")
        assert "".join(piece for piece, _ in found) == "AbĠ12ĠĊĠc'd"
