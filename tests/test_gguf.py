"""GGUF: blocks bit for bit, sizes in memory, names and settings, tokenizers, creation, and what is refused."""

from __future__ import annotations

import itertools
import json
import struct
import time
from pathlib import Path
from typing import Any

import gguf_files as g
import gguf_models as m
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_gguf_architectures import CASES, build, logits

import anybit
from anybit import GgufConfig, algorithms
from anybit.containers import Checkpoint
from anybit.errors import AnybitError, ConfigError, CorruptFile, MissingTensor, NotRepresentable, UnexpectedTensor
from anybit.methods._gguf_blocks import PACK, UNPACK
from anybit.methods._gguf_layout import TREES, GgufLayout
from anybit.weight.block_types import BY_NAME
from anybit.weight.weight import same

GOLDENS = Path(__file__).parent / "golden"
BLOCKS = load_file(GOLDENS / "gguf_blocks" / "blocks.safetensors")
TYPES = sorted(name.removesuffix(".bytes") for name in BLOCKS if name.endswith(".bytes") and name != "BF16.bytes")
MODEL = GOLDENS / "gguf" / "llama_q4_k_m" / "model.gguf"


def rows_of(name: str, per_row: int) -> tuple[torch.Tensor, torch.Tensor, GgufLayout]:
    """The vendor's blocks of a type, `per_row` side by side: bytes, numbers, layout."""
    stored, dense = BLOCKS[f"{name}.bytes"], BLOCKS[f"{name}.f32"]
    rows = len(stored) // per_row
    stored = stored[: rows * per_row].reshape(rows, -1)
    dense = dense[: rows * per_row].reshape(rows, -1)
    return stored, dense, GgufLayout(tuple(dense.shape), "float32", name)


# --- blocks ----------------------------------------------------------------------------------------------------------------


def test_every_type_with_blocks_is_read() -> None:
    assert set(TREES) == set(UNPACK) == set(PACK) == {name for name, kind in BY_NAME.items() if kind.dtype == "uint8"}
    assert set(TYPES) == set(TREES) - {"Q8_1"}


@pytest.mark.parametrize("per_row", [1, 3])
@pytest.mark.parametrize("name", TYPES)
def test_blocks_are_llama_cpps_numbers(name: str, per_row: int) -> None:
    stored, dense, layout = rows_of(name, per_row)
    weight = layout.decode({name.lower(): stored})
    assert torch.equal(weight.to_dense(), dense)
    assert torch.equal(layout.encode(weight)[name.lower()], stored)
    stack = GgufLayout((2, *layout.shape), "float32", name)
    both = stack.decode({name.lower(): torch.stack([stored, stored.flip(0)])})
    assert torch.equal(both.to_dense(), torch.stack([dense, dense.flip(0)]))
    assert torch.equal(stack.encode(both)[name.lower()][1], stored.flip(0))
    index = torch.tensor([len(dense) - 1, 0, 0])
    assert torch.equal(weight.tree.take_rows(index), dense[index])


@pytest.mark.parametrize("name", sorted(TREES))
def test_fields_take_the_bytes_of_the_blocks(name: str) -> None:
    kind = BY_NAME[name]
    shape = (64, 8 * kind.elements)
    scheme = GgufLayout(shape, "float32", name).scheme()
    bytes_of_fields = scheme.bytes_in_memory + sum(extra.nbytes for extra in scheme.extras.values())
    order_of_digits = 4 * shape[1] if name == "TQ1_0" else 0
    assert bytes_of_fields - order_of_digits == 64 * 8 * kind.bytes


@pytest.mark.parametrize("name", sorted(TREES))
def test_any_bytes_come_back(name: str) -> None:
    blocks = torch.randint(0, 256, (5, 3, BY_NAME[name].bytes), dtype=torch.uint8)
    before = blocks.clone()
    assert torch.equal(PACK[name](UNPACK[name](blocks)), before)
    assert torch.equal(blocks, before), "the input was written to"


def test_the_second_scale_of_nvfp4() -> None:
    stored, dense, plain = rows_of("NVFP4", 1)
    scale, limit = torch.tensor([0.37]), torch.tensor([2.0])
    layout = GgufLayout(plain.shape, "float32", "NVFP4", (("input_scale", (1,)), ("scale", (1,))))
    tensors = {"nvfp4": stored, "scale": scale, "input_scale": limit}
    weight = layout.decode(tensors)
    assert torch.equal(weight.to_dense(), dense * 0.37)
    encoded = layout.encode(weight)
    assert {name: tensor.tolist() for name, tensor in encoded.items()} == {k: v.tolist() for k, v in tensors.items()}
    assert layout.scheme().structure() == weight.structure()
    with pytest.raises(CorruptFile, match="scale"):
        layout.decode({**tensors, "scale": torch.tensor([float("nan")])})


@pytest.mark.parametrize(("name", "place", "value"), [
    ("Q4_0", 0, b"\x00\x7e"), ("Q4_K", 2, b"\x00\x7c"), ("Q6_K", 208, b"\x00\xfc"), ("IQ1_M", 54, b"\xff\x7f"),
    ("Q8_K", 0, b"\x00\x00\xc0\x7f"), ("MXFP4", 0, b"\xff"),
])  # fmt: skip
def test_scales_that_are_no_numbers(name: str, place: int, value: bytes) -> None:
    stored, _, layout = rows_of(name, 1)
    stored = stored.clone()
    if name == "IQ1_M":  # the number is spread over four words
        stored[2, 48:56] |= 0xF0
        stored[2, [48, 50, 52, 54]] &= 0x0F
    stored[2, place : place + len(value)] = torch.frombuffer(bytearray(value), dtype=torch.uint8)
    if name == "IQ1_M":
        stored[2, [49, 51, 53]] |= 0xF0
    with pytest.raises(CorruptFile, match=rf"'{name.lower()}'.*row 2, block 0"):
        layout.decode({name.lower(): stored})


def test_a_tree_of_another_form_is_not_written() -> None:
    weight = rows_of("Q4_0", 1)[2].decode({"q4_0": rows_of("Q4_0", 1)[0]})
    with pytest.raises(NotRepresentable, match="Q8_0"):
        GgufLayout(tuple(weight.shape), "float32", "Q8_0").encode(weight)


# --- creation --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_creation_is_llama_cpps_byte_for_byte(name: str) -> None:
    made = np.load(GOLDENS / "gguf_blocks" / "created.npz")
    dense = torch.from_numpy(made["dense"])
    layout = GgufLayout((12, 128), "float32", name)
    weight = algorithms.get("ggml")(dense, layout.scheme(), **layout.algorithm_options())
    assert torch.equal(layout.encode(weight)[name.lower()], torch.from_numpy(made[name]))
    assert same(layout.decode(layout.encode(weight)), weight)
    stack = GgufLayout((3, 4, 128), "float32", name)
    filled = algorithms.get("ggml")(dense.view(3, 4, 128), stack.scheme(), **stack.algorithm_options())
    assert torch.equal(stack.encode(filled)[name.lower()].view(12, -1), torch.from_numpy(made[name]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e9])
def test_creation_refuses_what_has_no_scale(value: float) -> None:
    layout = GgufLayout((2, 32), "float32", "Q8_0")
    dense = torch.zeros(2, 32)
    dense[1, 3] = value
    with pytest.raises(NotRepresentable, match="float16"):
        algorithms.get("ggml")(dense, layout.scheme(), kind="Q8_0")


def test_a_dense_model_becomes_blocks(tmp_path: Path) -> None:
    model = build(CASES["qwen3"])
    model.save_pretrained(tmp_path / "dense")
    ours: Any = anybit.load(tmp_path / "dense", GgufConfig(block_type="Q8_0"))
    assert (logits(ours) - logits(model)).abs().max() < 0.05 * logits(model).abs().max()
    ours.save_pretrained(tmp_path / "q8")
    stored = load_file(tmp_path / "q8" / "model.safetensors")
    assert stored["model.layers.0.mlp.up_proj.q8_0"].shape == (128, 2 * 34)
    assert stored["model.embed_tokens.weight"].dtype == torch.float32
    with pytest.raises(ConfigError, match="block_type"):
        GgufConfig(block_type="Q8_K")


# --- whole files -----------------------------------------------------------------------------------------------------------


def write_split(folder: Path, content: Path, parts: int = 3) -> list[Path]:
    """The model of one file in several, as llama.cpp's tool cuts it: the first part has the metadata and no tensor."""
    checkpoint = Checkpoint.open(content)
    kinds = {name: number for number, name in ((0, "F32"), (12, "Q4_K"), (14, "Q6_K"))}
    names, files = list(checkpoint.tensors), []
    for part in range(parts):
        own = names[(part - 1) * len(names) // (parts - 1) : part * len(names) // (parts - 1)] if part else []
        tensors = []
        for name in own:
            info = checkpoint.tensors[name]
            kind = BY_NAME[info.encoding or "F32"]
            dims = (*info.shape[:-1], info.shape[-1] // kind.bytes * kind.elements) if info.encoding else info.shape
            raw = checkpoint.read(name).reshape(-1).view(torch.uint8).numpy().tobytes()
            tensors.append((name, dims[::-1], kinds[info.encoding or "F32"], raw))
        values = (
            {key: v for key, v in checkpoint.values.items() if type(v) in (str, int, float, bool)} if not part else {}
        )
        keys = {"split.no": (g.U16, part), "split.count": (g.U16, parts), "split.tensors.count": (g.I32, len(names))}
        files.append(folder / f"model-{part + 1:05d}-of-{parts:05d}.gguf")
        files[-1].write_bytes(g.build({**values, **keys}, tensors))
    return files


def test_a_split_model_is_the_whole_model(tmp_path: Path) -> None:
    files = write_split(tmp_path, MODEL)
    ids = load_file(MODEL.parent / "reference.safetensors")["input_ids"]
    whole: Any = anybit.load(MODEL)
    for path in (files[0], files[2], tmp_path):
        parts: Any = anybit.load(path)
        assert torch.equal(parts(ids).logits, whole(ids).logits)
    files[1].unlink()
    with pytest.raises(MissingTensor, match=files[1].name):
        anybit.load(files[0])


def test_a_split_model_with_a_part_of_another_one(tmp_path: Path) -> None:
    files = write_split(tmp_path, MODEL)
    files[1].write_bytes(g.build({"split.no": (g.U16, 1), "split.count": (g.U16, 3)}, []))
    with pytest.raises(CorruptFile, match=r"12 tensors together, but hold 6"):
        anybit.load(files[0])


def test_what_can_be_done_with_a_lone_file(tmp_path: Path) -> None:
    seen = anybit.inspect(MODEL)
    assert (seen.method, seen.architecture, seen.problems) == ("gguf", "LlamaForCausalLM", ())
    assert seen.coverage == 1.0
    assert 5 < (seen.bits_per_weight or 0) < 5.5
    assert {module.layout for module in seen.modules if "proj" in module.name} == {"GgufLayout"}
    plan = anybit.plan(MODEL)
    model: Any = anybit.AutoModelForCausalLM.from_pretrained(MODEL.parent, gguf_file=MODEL.name)
    assert plan.bytes_in_memory == model.anybit_plan.bytes_in_memory
    assert model.generation_config.eos_token_id == 2
    wanted = json.loads((MODEL.parent / "expected_config.json").read_text())
    found = model.config.to_dict()
    assert {k: found.get(k) for k in wanted if k not in ("transformers_version", "dtype", "pad_token_id")} == {
        k: v for k, v in wanted.items() if k not in ("transformers_version", "dtype", "pad_token_id")
    }
    model.save_pretrained(tmp_path / "saved")
    names = {file.name for file in (tmp_path / "saved").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= names
    assert not names & {"expected_config.json", "fixture.json"}, "files beside the file are none of its business"
    again: Any = anybit.load(tmp_path / "saved")
    ids = torch.arange(8)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)
    anybit.dequantize(MODEL, tmp_path / "dense")
    dense: Any = anybit.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert (dense(ids).logits - model(ids).logits).abs().max() < 1e-4


# --- tokenizers ------------------------------------------------------------------------------------------------------------

TEXTS = [
    "Hello world", "the cat  sat on 12345 mats.\n\nIt's THEIR cat's", "naïve café ☕ 日本語", " leading", "trailing ", "a\tb\r\nc",
    "x" * 40, "", "don't <s> </s> [INST]",
]  # fmt: skip


def write_tokenizer(tmp_path: Path, tokenizer: dict[str, Any]) -> Path:
    case = CASES["llama"]
    m.write(tmp_path / "t.gguf", case, build(case), tokenizer=tokenizer)
    return tmp_path / "t.gguf"


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "gpt-2", "smollm", "gpt-4o", "tekken"])
def test_byte_level_tokenizers_come_back(pre: str, tmp_path: Path) -> None:
    """A trained one, written as llama.cpp's converter does: tokens, types and merges."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    from anybit.methods._gguf_tokenizer import SPLITS

    theirs = Tokenizer(models.BPE(ignore_merges=pre in ("llama-bpe", "tekken")))
    if pre == "qwen2":
        theirs.normalizer = normalizers.NFC()
    if pre == "gpt-2":
        theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # its own pattern, built in
    elif pre == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        theirs.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    else:
        split = pre_tokenizers.Split(Regex(SPLITS[pre][0]), "isolated")
        theirs.pre_tokenizer = pre_tokenizers.Sequence([
            split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ])  # fmt: skip
    theirs.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    theirs.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    theirs.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    theirs.add_tokens([AddedToken("[INST]", normalized=False)])
    state, size = json.loads(theirs.to_str()), theirs.get_vocab_size()
    tokens = [theirs.id_to_token(number) for number in range(size)]
    begin, end = theirs.token_to_id("<s>"), theirs.token_to_id("</s>")
    types = [3 if token in ("<s>", "</s>") else 4 if token == "[INST]" else 1 for token in tokens]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]]
    ours = anybit.AutoTokenizer.from_pretrained(write_tokenizer(tmp_path, {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": (g.ARRAY, (g.I32, types)), "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": begin, "tokenizer.ggml.eos_token_id": end, "tokenizer.ggml.add_bos_token": True,
    }))  # fmt: skip
    assert len(ours) == size
    assert (ours.bos_token, ours.eos_token) == ("<s>", "</s>")
    for text in TEXTS:
        wanted = theirs.encode(text, add_special_tokens=False).ids
        assert ours(text, add_special_tokens=False)["input_ids"] == wanted, text
        assert ours(text)["input_ids"] == [begin, *wanted]
        assert ours.decode(wanted) == theirs.decode(wanted, skip_special_tokens=False)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokenizers_come_back(prefix: bool, tmp_path: Path) -> None:
    """Scores rank the joins as SentencePiece does; its rule, in ten lines, is the referee."""
    pieces = [
        "▁",
        "t",
        "h",
        "e",
        "c",
        "a",
        "s",
        "o",
        "n",
        "▁t",
        "he",
        "▁the",
        "at",
        "▁c",
        "▁cat",
        "sat",
        "on",
        "▁s",
        "▁sat",
        "▁on",
    ]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    scores = [0.0] * 259 + [-float(len(pieces) - n) if len(p) > 1 else -1000.0 for n, p in enumerate(pieces)]
    types = [2, 3, 3, *[6] * 256, *[1] * len(pieces)]
    ours = anybit.AutoTokenizer.from_pretrained(write_tokenizer(tmp_path, {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.add_space_prefix": prefix,
        "tokenizer.ggml.scores": (g.ARRAY, (g.F32, scores)), "tokenizer.ggml.token_type": (g.ARRAY, (g.I32, types)),
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
    }))  # fmt: skip
    place = {token: number for number, token in enumerate(tokens)}

    def referee(text: str) -> list[int]:
        symbols = list(("▁" if prefix and text else "") + text.replace(" ", "▁"))
        while True:
            joins = [
                (-scores[place[a + b]], n) for n, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in place
            ]
            if not joins:
                break
            n = min(joins)[1]
            symbols[n : n + 2] = [symbols[n] + symbols[n + 1]]
        found: list[int] = []
        for symbol in symbols:
            found += [place[symbol]] if symbol in place else [place[f"<0x{byte:02X}>"] for byte in symbol.encode()]
        return found

    for text in ("the cat sat on the cat", "cat  hé ☕", " the", "aaattthhheee", "x"):
        ids = ours(text)["input_ids"]
        assert ids == [1, *referee(text)], text
        assert ours.decode(ids, skip_special_tokens=True) == text
    assert (ours.bos_token, ours.eos_token, ours.unk_token) == ("<s>", "</s>", "<unk>")


def test_a_template_is_text(tmp_path: Path) -> None:
    bomb = "{% for a in range(10**9) %}{% for b in range(10**9) %}{{ a }}{% endfor %}{% endfor %}{{ ''.__class__.__mro__ }}"
    byte_tokens = [chr(n) for n in range(33, 90)]
    file = write_tokenizer(tmp_path, {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": byte_tokens,
        "tokenizer.ggml.merges": (g.ARRAY, (g.STRING, [])), "tokenizer.chat_template": bomb,
    })  # fmt: skip
    before = time.perf_counter()
    assert anybit.AutoTokenizer.from_pretrained(file).chat_template == bomb
    model: Any = anybit.load(file)
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "chat_template.jinja").read_text() == bomb
    assert time.perf_counter() - before < 20


@pytest.mark.parametrize(("change", "words"), [
    ({"tokenizer.ggml.model": "rwkv"}, "rwkv"),
    ({"tokenizer.ggml.pre": "of-the-future"}, "of-the-future"),
    ({"tokenizer.ggml.merges": ["a b c"]}, "merge 0"),
    ({"tokenizer.ggml.token_type": [1]}, "token_type"),
    ({"tokenizer.ggml.tokens": [1, 2]}, "tokenizer.ggml.tokens"),
    ({"tokenizer.ggml.add_bos_token": "yes"}, "add_bos_token"),
])  # fmt: skip
def test_tokenizers_that_cannot_be_made(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    good = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": ["a", "b", "ab"],
        "tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.token_type": [1, 1, 1],
    }  # fmt: skip
    with pytest.raises(AnybitError, match=words):
        anybit.AutoTokenizer.from_pretrained(write_tokenizer(tmp_path, {**good, **change}))


# --- what is refused -------------------------------------------------------------------------------------------------------


def changed(tmp_path: Path, change: dict[str, Any], extra: list[Any] = [], drop: str = "") -> Path:  # noqa: B006 (read only)
    """The small llama with other metadata; None removes a key."""
    case = CASES["llama"]
    tensors = [
        (name, tuple(tensor.shape)[::-1], 0, tensor.contiguous().numpy().tobytes())
        for name, tensor in case.tensors(build(case))
        if name != drop
    ]
    metadata = {"general.architecture": "llama", **{f"llama.{k}": v for k, v in case.metadata.items()}}
    metadata = {key: value for key, value in {**metadata, **change}.items() if value is not None}
    (tmp_path / "bad.gguf").write_bytes(g.build(metadata, [*tensors, *extra]))
    return tmp_path / "bad.gguf"


NAN = struct.pack("<f", float("nan"))


@pytest.mark.parametrize(("change", "words"), [
    ({"general.architecture": None}, "general.architecture"),
    ({"general.architecture": 7}, "general.architecture"),
    ({"general.architecture": "lama"}, "lama"),
    ({"llama.block_count": 1}, "block_count"),
    ({"llama.block_count": 4_000_000_000}, "block_count"),
    ({"llama.block_count": "2"}, "block_count"),
    ({"llama.block_count": (g.F32, 2.0)}, "block_count"),
    ({"llama.embedding_length": 128}, "embedding_length"),
    ({"llama.embedding_length": None}, "embedding_length"),
    ({"llama.attention.head_count": 0}, "head_count"),
    ({"llama.attention.head_count": 5}, "head"),
    ({"llama.attention.head_count": [4, 2]}, "head_count"),
    ({"llama.attention.head_count": (g.I32, -4)}, "head_count"),
    ({"llama.feed_forward_length": 64}, "feed_forward_length"),
    ({"llama.attention.layer_norm_rms_epsilon": (g.F32, float("nan"))}, "epsilon"),
    ({"llama.attention.layer_norm_rms_epsilon": None}, "epsilon"),
    ({"llama.attention.layer_norm_rms_epsilon": "1e-6"}, "epsilon"),
    ({"llama.attention.key_length": 24}, "."),
    ({"llama.attention.key_length": 16, "llama.attention.value_length": 8}, "head_dim"),
    ({"llama.rope.scaling.type": "of the future"}, "of the future"),
    ({"llama.rope.scaling.type": "linear"}, "rope.scaling.factor"),
    ({"llama.rope.dimension_count": 999}, "dimension_count"),
    ({"llama.context_length": (g.U64, 1 << 60)}, "context_length"),
    ({"llama.expert_count": 4}, "expert"),
    ({"split.tensors.count": (g.I32, 3)}, "3 tensors"),
])  # fmt: skip
def test_metadata_that_contradicts_the_file(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    file = changed(tmp_path, change)
    before = time.perf_counter()
    with pytest.raises(AnybitError, match=words):
        anybit.plan(file)
    assert time.perf_counter() - before < 5
    problems = anybit.inspect(file).problems
    assert problems, "inspect saw nothing wrong"


def test_tensors_that_the_architecture_does_not_have(tmp_path: Path) -> None:
    odd = ("blk.0.attn_extra.weight", (64, 64), 0, bytes(64 * 64 * 4))
    with pytest.raises(UnexpectedTensor, match=r"blk\.0\.attn_extra\.weight"):
        anybit.plan(changed(tmp_path, {}, [odd]))
    with pytest.raises(MissingTensor, match="up_proj"):
        anybit.plan(changed(tmp_path, {}, drop="blk.1.ffn_up.weight"))
    with pytest.raises(CorruptFile, match=r"blk\.7|blocks up to 7"):
        anybit.plan(changed(tmp_path, {}, [("blk.7.attn_q.weight", (64, 64), 0, bytes(64 * 64 * 4))]))
    for bad in (NAN * 8, struct.pack("<8f", *[0.0] * 8)):
        with pytest.raises(CorruptFile, match="rope_freqs"):
            anybit.plan(changed(tmp_path, {}, [("rope_freqs.weight", (8,), 0, bad)]))
    with pytest.raises(CorruptFile, match="rope_freqs"):
        anybit.plan(changed(tmp_path, {}, [("rope_freqs.weight", (9,), 0, bytes(36))]))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzz_whole_models(tmp_path: Path, data: st.DataObject) -> None:
    """A damaged header gives a plan or an error of ours, never another one."""
    content = bytearray(_small(tmp_path))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(24, 1400))
        damage = data.draw(st.one_of(
            st.binary(min_size=1, max_size=4), st.sampled_from([struct.pack("<I", n) for n in (0, 1, 3, 1 << 20, 1 << 31)]),
        ))  # fmt: skip
        content[place : place + len(damage)] = damage
    (tmp_path / "fuzz.gguf").write_bytes(bytes(content))
    seen = anybit.inspect(tmp_path / "fuzz.gguf")
    assert seen.problems or seen.coverage is not None


_KEPT: dict[str, bytes] = {}


def _small(tmp_path: Path) -> bytes:
    if "model" not in _KEPT:
        _KEPT["model"] = changed(tmp_path, {}).read_bytes()
    return _KEPT["model"]
