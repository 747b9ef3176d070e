"""Writing GGUF: searches and mixes held against llama.cpp's own files and numbers, names and settings against the reader,
tokenizers, importance matrices, and what is refused."""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import gguf_files as g
import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_gguf_architectures import CASES, build, logits

import anybit
from anybit import GgufConfig, algorithms
from anybit.containers import Checkpoint
from anybit.containers.gguf_writer import GgufWriter
from anybit.errors import ConfigError, CorruptFile, InvalidOption, MissingTensor, ShapeMismatch, UnexpectedTensor
from anybit.methods._gguf_layout import GgufLayout
from anybit.methods._gguf_mixes import MIXES, Facts
from anybit.quantizers.bundle import Bundled, Placed
from anybit.weight.block_types import BY_NAME

GOLDENS = Path(__file__).parent / "golden" / "gguf"
TINY = Path(__file__).parent.parent / "examples" / "tiny-llama"


@pytest.fixture(scope="module")
def matrix() -> torch.Tensor:
    return load_file(TINY / "model.safetensors")["model.layers.0.mlp.gate_proj.weight"][:64].float()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model of random weights with rows of 256."""
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dense")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def the_file(folder: Path) -> Path:
    files = list(folder.iterdir())
    assert len(files) == 1, files
    return files[0]


def types_in(file: Path) -> dict[str, str]:
    with Checkpoint.open(file) as checkpoint:
        return {name: info.encoding or info.dtype for name, info in checkpoint.tensors.items()}


# --- searches --------------------------------------------------------------------------------------------------------------

# relative error of llama.cpp 0.3.36's own codes for these 64 rows, without and with the importance below (ggml_quantize_chunk)
THEIRS = {
    "Q4_0": (0.08594, 0.08027), "Q4_1": (0.07718, 0.06815), "Q5_0": (0.04270, 0.03978), "Q5_1": (0.03774, 0.03303),
    "Q2_K": (0.29484, 0.25572), "Q3_K": (0.14972, 0.14041), "Q4_K": (0.07098, 0.06902), "Q5_K": (0.03603, 0.03467),
    "Q6_K": (0.01764, 0.01687), "IQ4_NL": (0.07611, 0.07372), "IQ4_XS": (0.07679, 0.07443),
}  # fmt: skip
IMPORTANCE = torch.arange(256) % 7 + 1.0
LOW = (
    *(name for name in MIXES if name.startswith(("IQ1", "IQ2", "IQ3"))),
    "Q2_K_S",
    "NVFP4",
    "Q1_0",
    "Q2_0",
)  # test_gguf_points


def made(matrix: torch.Tensor, name: str, **options: Any) -> tuple[torch.Tensor, bytes]:
    layout = GgufLayout(tuple(matrix.shape), "float32", name)
    weight = algorithms.get("ggml")(matrix, layout.scheme(), kind=name, **options)
    return weight.to_dense(torch.float32), layout.encode(weight)[name.lower()].numpy().tobytes()


@pytest.mark.parametrize("name", THEIRS)
def test_errors_are_llama_cpps(name: str, matrix: torch.Tensor) -> None:
    for importance, theirs in zip((None, IMPORTANCE), THEIRS[name], strict=True):
        weight = 1.0 if importance is None else importance
        found = made(matrix, name, importance=importance)[0]
        error = (((found - matrix).square() * weight).sum() / (matrix.square() * weight).sum()).sqrt()
        assert error < theirs * 1.0004


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("TQ1_0", "bf31bed48f4f1778"),
        ("TQ2_0", "f896c3f1adb040d6"),
        ("MXFP4", "3b72df2cd99b0753"),
        ("Q6_K", "098c67c1723aad2e"),
        ("Q3_K", "fb906e6c6b490c82"),
    ],
)
def test_bytes_are_llama_cpps(name: str, digest: str, matrix: torch.Tensor) -> None:
    """The hashes are of ggml_quantize_chunk's output for the same rows."""
    assert hashlib.sha256(made(matrix, name)[1]).hexdigest()[:16] == digest


@pytest.mark.parametrize("name", [name for name in MIXES if name in THEIRS or name.startswith("TQ")])
def test_odd_blocks_have_codes(name: str) -> None:
    """Zeros, one number everywhere, one sign only, a number alone, tiny numbers: finite, and no worse than the block's range."""
    rows = torch.zeros(6, 256)
    rows[1], rows[2] = -0.5, torch.arange(256) / 100 + 1
    rows[3, 17], rows[4] = 3.0, 1e-7
    rows[5, ::2] = -1.0
    found = made(rows, name)[0]
    assert torch.isfinite(found).all()
    assert torch.equal(found[0], rows[0])
    assert ((found - rows).abs().amax(-1) <= rows.abs().amax(-1) + 1e-6).all()


def test_stacks_have_an_importance_for_each_expert(matrix: torch.Tensor) -> None:
    stack, importance = matrix.view(2, 32, 256), torch.stack([IMPORTANCE, IMPORTANCE.flip(0)])
    layout = GgufLayout((2, 32, 256), "float32", "Q4_K")
    whole = algorithms.get("ggml")(stack, layout.scheme(), kind="Q4_K", importance=importance).to_dense(torch.float32)
    for number in range(2):
        assert torch.equal(whole[number], made(stack[number], "Q4_K", importance=importance[number])[0])
    for wrong in (IMPORTANCE[:-1], -IMPORTANCE, IMPORTANCE * float("nan")):
        with pytest.raises(InvalidOption, match="importance"):
            made(matrix, "Q4_K", importance=wrong)
    assert torch.equal(
        made(matrix, "Q4_K", importance=IMPORTANCE * 0)[0], made(matrix, "Q4_K", importance=IMPORTANCE * 0 + 1)[0]
    )
    with pytest.raises(InvalidOption, match="Q4_K"):
        algorithms.get("ggml")(matrix, GgufLayout((64, 256), "float32", "Q4_K").scheme(), kind="Q4_KK")


# --- mixes -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["llama_q4_k_m", "llama_tq2_0", "mixtral_q4_k_s", "qwen2_q5_k_m", "qwen3_q4_k_m_awkward"]
)
def test_mixes_are_llama_cpps(name: str) -> None:
    """Types of every tensor of files that llama.cpp quantized."""
    with Checkpoint.open(GOLDENS / name / "model.gguf") as checkpoint:
        values, infos = checkpoint.values, dict(checkpoint.tensors)
        kind = values["general.architecture"]
        heads = values[f"{kind}.attention.head_count"]
        mix = next(mix for mix, (number, _) in MIXES.items() if number == values["general.file_type"])
        facts = Facts(
            mix, kind, values[f"{kind}.block_count"], heads // values.get(f"{kind}.attention.head_count_kv", heads),
            values.get(f"{kind}.expert_count", 0), "output.weight" not in infos,
        )  # fmt: skip
        for stored, info in infos.items():
            if stored.endswith(".weight") and len(info.shape) > 1:
                block = BY_NAME[info.encoding] if info.encoding else None
                columns = info.shape[-1] // block.bytes * block.elements if block else info.shape[-1]
                assert facts.type_of(stored, columns, len(info.shape) == 3) == (info.encoding or None), stored


def test_patterns_come_before_the_mix(llama: Path, tmp_path: Path) -> None:
    chosen = {r"blk\.1\.ffn_down": "Q8_0", "attn_q": "IQ4_XS", r"^output\.weight": "Q5_K"}
    anybit.quantize(llama, tmp_path / "out", GgufConfig(mix="Q2_K", tensor_types=chosen))
    found = types_in(the_file(tmp_path / "out"))
    assert (found["blk.1.ffn_down.weight"], found["blk.0.ffn_down.weight"]) == ("Q8_0", "Q3_K")
    assert (found["blk.0.attn_q.weight"], found["output.weight"], found["token_embd.weight"]) == (
        "IQ4_XS",
        "Q5_K",
        "Q2_K",
    )
    for wrong in ({"tensor_types": {"x": "Q9_K"}}, {"mix": "Q4_K_X"}, {"mix": "Q4_0", "block_type": "Q4_0"}):
        with pytest.raises(ConfigError, match=r"Q4|Q9"):
            GgufConfig(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("mix", [mix for mix in MIXES if mix not in LOW])
def test_every_mix_makes_a_file_that_loads(mix: str, llama: Path, tmp_path: Path) -> None:
    anybit.quantize(llama, tmp_path / "out", GgufConfig(mix=mix))
    file = the_file(tmp_path / "out")
    assert file.name.endswith(f"-{mix}.gguf")
    with Checkpoint.open(file) as checkpoint:
        assert checkpoint.values["general.file_type"] == MIXES[mix][0]
        assert all(info.offset % 32 == 0 for info in checkpoint.tensors.values())
    model: Any = anybit.load(file)
    ids = torch.arange(12)[None]
    wanted = transformers.LlamaForCausalLM.from_pretrained(llama)(ids).logits
    limit = {"TQ1_0": 2.0, "TQ2_0": 2.0, "Q2_K": 0.6, "Q3_K_S": 0.4}.get(mix, 0.25)
    assert (model(ids).logits - wanted).norm() < limit * wanted.norm()
    model.save_pretrained(tmp_path / "saved")
    with Checkpoint.open(file) as one, Checkpoint.open(tmp_path / "saved") as two:
        kinds = {info.encoding for info in one.tensors.values()} - {""}
        for name in one.tensors:  # blocks of a tensor whose rows keep their order, byte for byte
            if name == "blk.1.ffn_up.weight" and kinds:
                own = one.tensors[name].encoding.lower()
                assert torch.equal(one.read(name), two.read(f"model.layers.1.mlp.up_proj.{own}"))


# --- whole models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_model_goes_to_gguf_and_back(name: str, tmp_path: Path) -> None:
    model = build(CASES[name])
    model.save_pretrained(tmp_path / "dense")
    anybit.quantize(tmp_path / "dense", tmp_path / "out", GgufConfig(mix="F32"))
    back: Any = anybit.load(tmp_path / "out")
    assert type(back) is type(model)
    assert (logits(back) - logits(model)).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["gpt2", "gpt-oss", "phi2"])
def test_stacks_and_fused_matrices_are_cut_and_joined(name: str, tmp_path: Path) -> None:
    """Blocks of what transformers holds in one tensor and llama.cpp in several, or the other way round."""
    model = build(CASES[name])
    model.save_pretrained(tmp_path / "dense")
    anybit.quantize(tmp_path / "dense", tmp_path / "out", GgufConfig(mix="Q8_0"))
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        own = {"gpt2": "attn_qkv", "gpt-oss": "ffn_gate_exps", "phi2": "attn_qkv"}[name]
        assert checkpoint.tensors[f"blk.0.{own}.weight"].encoding == "Q8_0"
    back: Any = anybit.load(tmp_path / "out")
    assert (logits(back) - logits(model)).norm() < 0.06 * logits(model).norm()
    if name == "phi2":  # llama.cpp holds the three in one tensor, which has one type
        with pytest.raises(ConfigError, match=r"parts of 'blk.0.attn_qkv.weight'.*must be alike"):
            anybit.quantize(
                tmp_path / "dense", tmp_path / "odd",
                GgufConfig(mix="Q8_0", module_settings={"model.layers.0.self_attn.q_proj": {"mix": "Q4_0"}}),
            )  # fmt: skip


def test_architectures_that_are_not_written_are_named(tmp_path: Path) -> None:
    config = transformers.OPTConfig(
        vocab_size=96, hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=32
    )
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path / "dense")
    with pytest.raises(
        ConfigError,
        match=r"'opt' model cannot be written as a GGUF file; .*llama.* can\. Keep the blocks in safetensors",
    ):
        anybit.quantize(tmp_path / "dense", tmp_path / "out", GgufConfig(mix="F32"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0, "mscale": 0.7}},
    ],
)
def test_settings_without_a_place_are_refused(change: dict[str, Any], llama: Path, tmp_path: Path) -> None:
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ConfigError, match=r"hidden_act|rope") as caught:
        anybit.quantize(tmp_path, tmp_path / "out", GgufConfig(mix="F16"))
    assert "safetensors" in str(caught.value)


@pytest.mark.parametrize("name", ["llama_q4_k_m", "mixtral_q4_k_s", "qwen2_q5_k_m", "qwen3_q4_k_m_awkward"])
def test_llama_cpps_file_comes_out_with_the_same_tensors(name: str, tmp_path: Path) -> None:
    """Read, and written again in the same mix: names, order of rows and blocks are the vendor's, byte for byte."""
    source = GOLDENS / name / "model.gguf"
    with Checkpoint.open(source) as one:
        mix = next(mix for mix, (number, _) in MIXES.items() if number == one.values["general.file_type"])
        report = anybit.convert(source, tmp_path / "out", GgufConfig(mix=mix))
        assert set(report.counts) <= {"exact"}
        with Checkpoint.open(tmp_path / "out") as two:
            assert set(two.tensors) == set(one.tensors)
            for tensor in one.tensors:
                assert one.tensors[tensor].encoding == two.tensors[tensor].encoding, tensor
                assert torch.equal(one.read(tensor).float(), two.read(tensor).float()), tensor
            prefix = one.values["general.architecture"] + "."
            for key, value in two.values.items():
                if key in one.values and (key.startswith(prefix) or key.endswith("_token_id")):
                    assert one.values[key] == value, key


def test_quantized_checkpoints_become_gguf(llama: Path, tmp_path: Path) -> None:
    anybit.quantize(llama, tmp_path / "nf4", anybit.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))
    anybit.convert(tmp_path / "nf4", tmp_path / "out", GgufConfig(mix="Q8_0"), allow_requantize=True)
    ids = torch.arange(12)[None]
    one, two = (anybit.load(tmp_path / name)(ids).logits for name in ("nf4", "out"))
    assert (one - two).norm() < 0.02 * one.norm()
    anybit.quantize(llama, tmp_path / "out", GgufConfig(mix="Q4_0"), force=True)
    assert the_file(tmp_path / "out").name.endswith("Q4_0.gguf")
    with pytest.raises(FileExistsError):
        anybit.quantize(llama, tmp_path / "out", GgufConfig(mix="Q4_0"))


# --- importance ------------------------------------------------------------------------------------------------------------


def imatrix_gguf(file: Path, entries: dict[str, tuple[torch.Tensor, list[float]]]) -> None:
    """As llama.cpp's tool writes it: sums of squares, and how many."""
    tensors = []
    for name, (sums, counts) in entries.items():
        tensors.append((f"{name}.in_sum2", sums.shape[::-1], 0, sums.numpy().tobytes()))
        tensors.append((f"{name}.counts", (1, len(counts)), 0, struct.pack(f"<{len(counts)}f", *counts)))
    file.write_bytes(g.build({"general.type": "imatrix", "imatrix.chunk_count": 3}, tensors))


def imatrix_dat(file: Path, entries: dict[str, tuple[torch.Tensor, int]]) -> None:
    raw = struct.pack("<i", len(entries))
    for name, (sums, calls) in entries.items():
        raw += (
            struct.pack("<i", len(name))
            + name.encode()
            + struct.pack("<ii", calls, sums.numel())
            + sums.numpy().tobytes()
        )
    file.write_bytes(raw + struct.pack("<ii", 3, 4) + b"text")


def test_importance_is_read_from_both_kinds_of_files(llama: Path, tmp_path: Path) -> None:
    seen = torch.rand(256, generator=torch.Generator().manual_seed(3)) ** 4
    name = "blk.0.attn_k.weight"
    imatrix_gguf(tmp_path / "a.gguf", {name: (seen[None] * 64, [64.0])})
    imatrix_dat(tmp_path / "b.dat", {name: (seen * 8, 8)})
    written = []
    for kind, imatrix in (("none", None), ("new", "a.gguf"), ("old", "b.dat")):
        chosen = str(tmp_path / imatrix) if imatrix else None
        anybit.quantize(llama, tmp_path / kind, GgufConfig(mix="Q4_K_S", imatrix=chosen))
        with Checkpoint.open(tmp_path / kind) as checkpoint:
            written.append({tensor: checkpoint.read(tensor) for tensor in checkpoint.tensors})
    plain, new, old = written
    changed = {tensor for tensor in plain if not torch.equal(plain[tensor], new[tensor])}
    assert changed == {name}
    assert torch.equal(new[name], old[name])
    dense = load_file(llama / "model.safetensors")["model.layers.0.self_attn.k_proj.weight"]
    errors = []
    for folder in ("none", "new"):
        model: Any = anybit.load(tmp_path / folder)
        found = model.model.layers[0].self_attn.k_proj.dequantize(torch.float32)
        errors.append(((found - dense).square() * seen).sum())
    assert errors[1] < 0.9 * errors[0]


def test_damaged_importance_is_named(llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.dat"
    good = torch.ones(256)
    imatrix_dat(file, {"blk.0.attn_k.weight": (good, 2)})
    whole = file.read_bytes()
    cases = {
        "truncated": (whole[:40], "between 1 and|ends before"),
        "negative": (whole.replace(struct.pack("<f", 1.0), struct.pack("<f", -1.0)), "no mean squares"),
        "empty": (b"", "ends before"),
        "other": (b"PK\3\4" + whole, "between 1 and|ends before"),
    }
    for content, message in cases.values():
        file.write_bytes(content)
        with pytest.raises(CorruptFile, match=message):
            anybit.quantize(llama, tmp_path / "out", GgufConfig(mix="Q4_K_S", imatrix=str(file)))
    imatrix_gguf(tmp_path / "a.gguf", {"blk.0.attn_k.weight": (torch.ones(1, 128), [1.0])})
    with pytest.raises(ConfigError, match="another model"):
        anybit.quantize(llama, tmp_path / "out", GgufConfig(imatrix=str(tmp_path / "a.gguf")))
    with pytest.raises(InvalidOption, match="does not exist"):
        anybit.quantize(llama, tmp_path / "out", GgufConfig(imatrix=str(tmp_path / "none.dat")))


def test_calibration_weighs_what_the_inputs_weigh(llama: Path, tmp_path: Path) -> None:
    """Without a matrix, from tokens: the layers of blocks get other codes, which suit their inputs; the head, which no
    calibration covers, keeps its own."""
    tokens = torch.randint(0, 96, (4, 32), generator=torch.Generator().manual_seed(5))
    anybit.quantize(llama, tmp_path / "plain", GgufConfig(mix="Q2_K"))
    anybit.quantize(llama, tmp_path / "seen", GgufConfig(mix="Q2_K"), calibration=tokens)
    with Checkpoint.open(tmp_path / "plain") as one, Checkpoint.open(tmp_path / "seen") as two:
        changed = {name for name in one.tensors if not torch.equal(one.read(name), two.read(name))}
    own = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    assert changed == {f"blk.{block}.{name}.weight" for block in range(2) for name in own}
    dense = transformers.LlamaForCausalLM.from_pretrained(llama)
    kept: list[torch.Tensor] = []
    layer = dense.model.layers[0].mlp.down_proj
    layer.register_forward_pre_hook(lambda _, args: kept.append(args[0].flatten(0, 1)))
    dense(tokens)
    errors = []
    for folder in ("plain", "seen"):
        model: Any = anybit.load(tmp_path / folder)
        found = model.model.layers[0].mlp.down_proj.dequantize(torch.float32)
        errors.append((kept[0] @ (found - layer.weight).T).norm())
    assert errors[1] < errors[0]


def test_mixes_are_schemes() -> None:
    assert GgufConfig.schemes["gguf-q4_k_m"] == {"mix": "Q4_K_M"}
    assert len(GgufConfig.schemes) == len(MIXES)


# --- tokenizers ------------------------------------------------------------------------------------------------------------

TEXTS = [
    "Hello world",
    "the cat  sat on 12345 mats.\n\nIt's THEIR cat's",
    "naïve café ☕ 日本語",
    " leading",
    "trailing ",
    "",
]


def with_tokenizer(llama: Path, folder: Path, tokenizer: Any, **config: Any) -> Any:
    """The model beside a tokenizer, quantized; transformers' tokenizer of both."""
    for file in llama.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **config).save_pretrained(folder)
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(tokenizer.get_vocab_size() + 5)
    model.save_pretrained(folder)
    anybit.quantize(folder, folder / "out", GgufConfig(mix="Q8_0"))
    return (
        anybit.AutoTokenizer.from_pretrained(the_file(folder / "out")),
        transformers.AutoTokenizer.from_pretrained(folder),
    )


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "gpt-2", "gpt-4o", "tekken", "smollm"])
def test_byte_level_tokenizers_are_written(pre: str, llama: Path, tmp_path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    from anybit.methods._gguf_tokenizer import splitter

    theirs = Tokenizer(models.BPE(ignore_merges=pre in ("llama-bpe", "tekken")))
    if pre == "qwen2":
        theirs.normalizer = normalizers.NFC()
    theirs.pre_tokenizer = splitter(pre) if pre != "gpt-2" else pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    theirs.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    theirs.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    theirs.add_tokens([AddedToken("[INST]", normalized=False)])
    theirs.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", theirs.token_to_id("<s>"))]
    )
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    ours, wanted = with_tokenizer(llama, tmp_path, theirs, bos_token="<s>", eos_token="</s>", chat_template=template)
    for text in [*TEXTS, "<s>[INST] don't</s>"]:
        assert ours(text)["input_ids"] == wanted(text)["input_ids"], text
    assert (ours.bos_token, ours.eos_token) == ("<s>", "</s>")
    assert ours.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        assert checkpoint.values["tokenizer.ggml.pre"] == pre
        assert len(checkpoint.values["tokenizer.ggml.tokens"]) == theirs.get_vocab_size() + 5


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokenizers_are_written(prefix: bool, llama: Path, tmp_path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    pieces = ["▁", *"thecasonlw", "▁t", "he", "▁the", "at", "▁c", "▁cat", "sat", "on", "▁s", "▁sat", "▁on"]
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    vocabulary |= {piece: 259 + number for number, piece in enumerate(pieces)}
    merges = [
        (a, b) for whole in pieces if len(whole) > 1 for cut in range(1, len(whole))
        if (a := whole[:cut]) in vocabulary and (b := whole[cut:]) in vocabulary
    ]  # fmt: skip
    theirs = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    theirs.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    theirs.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    theirs.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    ours, wanted = with_tokenizer(llama, tmp_path, theirs, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    for text in ("the cat sat on the cat", "cat  hé ☕", " the", "aaattthhheee"):
        assert ours(text)["input_ids"] == wanted(text)["input_ids"], text


def test_tokenizers_of_other_kinds_are_refused(llama: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ConfigError, match=r"tokenizer cannot be put into a GGUF file: its model is 'WordLevel'"):
        with_tokenizer(llama, tmp_path, words)
    alphabet = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    odd = Tokenizer(models.BPE(alphabet, []))
    odd.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split("a", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    with pytest.raises(ConfigError, match="by a rule that has none of the names"):
        with_tokenizer(llama, tmp_path, odd)


# --- the file writer ---------------------------------------------------------------------------------------------------------


def test_the_writer_wants_every_tensor_once(tmp_path: Path) -> None:
    bundled = Bundled(
        "x.gguf", {"general.architecture": "llama"}, {"a": ("F32", (2, 4)), "b": ("Q8_0", (2, 32))},
        {"one": (Placed("a", 0),), "two": (Placed("a", 1),), "three": (Placed("b"),)},
    )  # fmt: skip
    writer = GgufWriter(tmp_path, bundled)
    with contextlib.ExitStack() as stack:
        stack.enter_context(pytest.raises(MissingTensor, match="'a'"))
        stack.enter_context(writer)
        writer.write("one", torch.zeros(4))
        writer.write("three", torch.zeros(2, 34, dtype=torch.uint8))
    assert not list(tmp_path.iterdir())
    for name, tensor, error in (
        ("four", torch.zeros(4), UnexpectedTensor),
        ("one", torch.zeros(5), ShapeMismatch),
    ):
        with pytest.raises(error), GgufWriter(tmp_path, bundled) as writer:
            writer.write(name, tensor)
        assert not list(tmp_path.iterdir())
    with GgufWriter(tmp_path, bundled) as writer:
        writer.write("two", torch.ones(4))
        writer.write("three", torch.full((2, 34), 7, dtype=torch.uint8))
        writer.write("one", torch.zeros(4))
    with Checkpoint.open(tmp_path / "x.gguf") as checkpoint:
        assert torch.equal(checkpoint.read("a"), torch.tensor([[0.0] * 4, [1.0] * 4]))
        assert torch.equal(checkpoint.read("b"), torch.full((2, 34), 7, dtype=torch.uint8))
    with pytest.raises(ShapeMismatch, match="whole blocks"):
        GgufWriter(tmp_path, Bundled("y.gguf", {}, {"a": ("Q8_0", (2, 33))}, {}))
