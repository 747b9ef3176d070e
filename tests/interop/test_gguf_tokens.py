"""Against llama.cpp: the tokens it makes of texts with vocabularies that are written here.

Run it in an environment with llama-cpp-python 0.3.36, torch and this package:
python -m pytest -m interop tests/interop/test_gguf_tokens.py
"""

import json
import subprocess
import sys
from array import array
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_gguf_tokenizers import lines, through_a_file, trained_unigram, trained_word_pieces

from anybit.containers.gguf_writer import GgufWriter
from anybit.methods._gguf_splits import NFC, OLD, SPLITS, WHOLE_WORDS_FIRST
from anybit.methods._gguf_tokenizer import splitter
from anybit.quantizers.bundle import Bundled

pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.interop

TEXTS = [
    "Hello world", "the cat sat on 1234567 mats, and 12 rats.", "It's THEIR cat's; we'll see", "naïve café", "a  b   c",
    "snake_case camelCase HTTPServer", "3.14 1,000 #42!!! ...", "He said: it is late, and went down to the river.",
    "def f(x):\n\treturn x**2\n\n\nend",
]  # fmt: skip
# tokens of several files and texts
THEIRS = """
import json, sys
from llama_cpp import llama_cpp as L
L.llama_backend_init()
texts, found = json.loads(sys.argv[1]), {}
for file in sys.argv[2:]:
    options = L.llama_model_default_params()
    options.vocab_only = True
    model = L.llama_model_load_from_file(file.encode(), options)
    if not model:
        found[file] = None
        continue
    vocabulary, rows = L.llama_model_get_vocab(model), []
    for text in texts:
        raw, room = text.encode(), (L.llama_token * 512)()
        count = L.llama_tokenize(vocabulary, raw, len(raw), room, 512, True, True)
        rows.append(list(room[:count]))
    found[file] = rows
print("found " + json.dumps(found))
"""


def theirs(*files):
    command = [sys.executable, "-c", THEIRS, json.dumps(TEXTS), *map(str, files)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(next(line for line in output.splitlines() if line.startswith("found "))[6:])


@pytest.mark.parametrize("kind", ["t5", "bert, lower case", "bert"])
def test_tokens_are_the_same_there(kind, tmp_path):
    if kind == "t5":
        tokenizer = trained_unigram(whole=True)
        names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    else:
        tokenizer = trained_word_pieces(kind != "bert")
        names = {
            "pad_token": "[PAD]",
            "unk_token": "[UNK]",
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "mask_token": "[MASK]",
        }
        names["bos_token"] = "[CLS]"  # its name there
    ours, _, _ = through_a_file(tmp_path, tokenizer, **names)
    file = next((tmp_path / "out").iterdir())
    for text, tokens in zip(TEXTS, theirs(file)[str(file)], strict=True):
        assert ours(text)["input_ids"] == tokens, text


def test_every_name_of_a_split_is_known_and_means_the_same_there(tmp_path):
    """One vocabulary, trained without any split, so that its merges go over every border that a split does not draw."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*lines(), *TEXTS * 200], trainer)
    tokenizer.decoder = decoders.ByteLevel()
    model = json.loads(tokenizer.to_str())["model"]
    texts = [text for text, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]]
    wanted, files = {}, []
    for name in SPLITS:
        if name in OLD:
            continue
        values = {
            "general.architecture": "llama", "llama.block_count": 1, "llama.context_length": 8, "llama.embedding_length": 32,
            "llama.feed_forward_length": 32, "llama.attention.head_count": 1, "llama.attention.layer_norm_rms_epsilon": 1e-5,
            "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name, "tokenizer.ggml.tokens": texts,
            "tokenizer.ggml.merges": merges, "tokenizer.ggml.add_bos_token": False,
            "tokenizer.ggml.token_type": array("i", [1] * len(texts)),
        }  # fmt: skip
        with GgufWriter(tmp_path, Bundled(f"{name}.gguf", values, {}, {})):
            pass
        files.append(tmp_path / f"{name}.gguf")
        one = Tokenizer(
            models.BPE(model["vocab"], [tuple(m.split(" ")) for m in merges], ignore_merges=name in WHOLE_WORDS_FIRST)
        )
        one.normalizer = normalizers.NFC() if name in NFC else None
        one.pre_tokenizer = splitter(name)
        wanted[name] = [one.encode(text).ids for text in TEXTS]
    found = theirs(*files)
    unknown = [name for name in wanted if found[str(tmp_path / f"{name}.gguf")] is None]
    assert unknown == []
    differ = {
        name: [
            text
            for text, one, two in zip(TEXTS, rows, found[str(tmp_path / f"{name}.gguf")], strict=True)
            if one != two
        ]
        for name, rows in wanted.items()
    }
    assert {name: texts for name, texts in differ.items() if texts} == {}
