"""Against llama.cpp, on the CPU: it loads what is written here and agrees, its own files load here and agree, its blocks and
importance matrices are the referees of ours.

Run it in an environment with llama-cpp-python 0.3.36, torch and this package: python -m pytest -m interop tests/interop/test_gguf.py
"""

import ctypes
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))  # the small models of the tests that always run
import gguf_converted as converted
import transformers
from gguf_converted import CONVERTED
from test_gguf_architectures import CASES, build
from test_gguf_architectures import logits as small_logits

import anybit
from anybit import GgufConfig, algorithms
from anybit.containers import Checkpoint
from anybit.methods._gguf_layout import GgufLayout
from anybit.methods._gguf_mixes import MIXES
from anybit.weight.block_types import TYPES

llama_cpp = pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.interop

TINY = Path(__file__).parents[2] / "examples" / "tiny-llama"
TEXT = (
    "The old man walked slowly to the house, and when he came to the door he stopped and looked back at the river. It is "
    "late, said he, and I have not seen my brother since the morning. The woman who stood at the window did not answer him; "
    "she was thinking of the ship that had gone out with the tide, and of the men who were in it. In the evening the wind "
    "rose, and the rain fell heavily upon the roof, so that nobody in the room could hear the clock upon the stairs."
)
SOME = [
    "F16",
    "Q8_0",
    "Q4_0",
    "Q2_K",
    "Q3_K_M",
    "Q4_K_M",
    "Q5_K_M",
    "Q6_K",
    "NVFP4",
    "Q1_0",
    "Q2_0",
    "IQ3_M",
    "IQ4_NL",
    "IQ4_XS",
    "TQ1_0",
    "TQ2_0",
    "MXFP4_MOE",
]


# mixes that llama.cpp makes only with an importance matrix
WEIGHTED = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """mix -> file, made when it is asked for."""
    folder, made = tmp_path_factory.mktemp("gguf"), {}

    def get(mix):
        if mix not in made:
            anybit.quantize(TINY, folder / mix, GgufConfig(mix=mix))
            made[mix] = next((folder / mix).iterdir())
        return made[mix]

    return get


@pytest.fixture(scope="module")
def tokens():
    return anybit.AutoTokenizer.from_pretrained(TINY)(TEXT)["input_ids"]


# In a process of its own, as every program has it: two libraries with threads of their own do not share one well.
RUN = """
import sys
import numpy as np
from llama_cpp import Llama
file, text, target = sys.argv[1:]
model = Llama(file, n_ctx=256, logits_all=True, verbose=False, n_threads=1)
ids = model.tokenize(text.encode(), add_bos=True, special=False)[:200]
model.eval(ids)
np.savez(target, ids=np.array(ids), logits=np.array(model.scores[: len(ids)]))
"""


def theirs(file):
    """llama.cpp's tokens and logits."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "found.npz"
        subprocess.run([sys.executable, "-c", RUN, str(file), TEXT, str(target)], check=True)
        found = np.load(target)
        return found["ids"].tolist(), torch.from_numpy(found["logits"])


def quantized(source, target, mix):
    """llama.cpp's own quantizer; its processor time in seconds."""
    code = (
        "import ctypes, sys, time; from llama_cpp import llama_cpp as L; o = L.llama_model_quantize_default_params();"
        "o.ftype, o.nthread = int(sys.argv[3]), 1; t = time.process_time();"
        "assert L.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(o)) == 0;"
        "print('seconds', time.process_time() - t)"
    )
    command = [sys.executable, "-c", code, str(source), str(target), str(MIXES[mix][0])]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(output.split()[-1])


def perplexity(logits, ids):
    found = torch.log_softmax(logits.double(), -1)[:-1].gather(-1, torch.tensor(ids)[1:, None])
    return float((-found.mean()).exp())


@pytest.mark.parametrize("mix", SOME)
def test_llama_cpp_runs_what_is_written(mix, files, tokens):
    """Same tokens; logits differ by its 8-bit activations only."""
    ids, logits = theirs(files(mix))
    assert ids == tokens[: len(ids)]
    ours = anybit.load(files(mix), dtype="float32")(torch.tensor([ids])).logits[0]
    print(f"{mix}: perplexity {perplexity(logits, ids):.3f} there, {perplexity(ours, ids):.3f} here")
    coarse = mix.startswith(("TQ", "Q1", "Q2_0"))
    assert (logits - ours).norm() < (0.2 if coarse else 0.03) * ours.norm()
    assert abs(perplexity(logits, ids) / perplexity(ours, ids) - 1) < (0.05 if coarse else 0.01)


@pytest.mark.parametrize(
    "mix",
    [
        mix
        for mix in MIXES
        if mix not in ("F32", "F16", "BF16", "TQ1_0", "TQ2_0", "MXFP4_MOE", "NVFP4", "Q1_0", "Q2_0", *WEIGHTED)
    ],
)
def test_llama_cpps_own_file_loads_and_agrees(mix, files, tmp_path):
    """Quantized by llama.cpp from our F16 file: the same types, and no better than ours."""
    target = tmp_path / "theirs.gguf"
    print(f"{mix}: {quantized(files('F16'), target, mix):.2f} s of their processor time")
    with Checkpoint.open(target) as one, Checkpoint.open(files(mix)) as two:
        assert {name: info.encoding for name, info in one.tensors.items()} == {
            name: info.encoding for name, info in two.tensors.items()
        }
    ids, logits = theirs(target)
    model = anybit.load(target, dtype="float32")
    read = model(torch.tensor([ids])).logits[0]
    assert (logits - read).norm() < 0.03 * read.norm()
    ours = anybit.load(files(mix), dtype="float32")
    dense = load_file(TINY / "model.safetensors")
    errors = [0.0, 0.0]
    for layer in range(6):
        for own in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"):
            name = f"model.layers.{layer}.{own}"
            for place, packed in enumerate((ours, model)):
                found = packed.get_submodule(name).dequantize(torch.float32)
                errors[place] += float((found - dense[f"{name}.weight"].float()).square().sum())
    print(f"{mix}: squared error {errors[0]:.4f} ours, {errors[1]:.4f} theirs")
    assert errors[0] < 1.003 * errors[1]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ1_S", "IQ1_M",
        "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "NVFP4", "Q1_0", "Q2_0",
    ],
)  # fmt: skip
def test_blocks_are_as_good_as_ggmls(name, weighted):
    if not weighted and name in ("IQ1_S", "IQ2_XXS", "IQ2_XS"):
        pytest.skip("ggml makes it with an importance only")
    matrix = torch.cat([t.float() for key, t in load_file(TINY / "model.safetensors").items() if "gate_proj" in key])
    importance = torch.rand(256, generator=torch.Generator().manual_seed(0)) ** 4 * 3 + 1e-3 if weighted else None
    layout = GgufLayout(tuple(matrix.shape), "float32", name)
    ours = algorithms.get("ggml")(matrix, layout.scheme(), kind=name, importance=importance)
    library = ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.so*"))))
    quantize = library.ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    raw = torch.empty_like(layout.encode(ours)[name.lower()])
    number = next(number for number, kind in TYPES.items() if kind.name == name)
    quantize(number, matrix.data_ptr(), raw.data_ptr(), 0, *matrix.shape, importance.data_ptr() if weighted else None)
    weight = importance if weighted else torch.ones(256)
    ours, other = (
        ((found.to_dense(torch.float32) - matrix).square() * weight).sum()
        for found in (ours, layout.decode({name.lower(): raw}))
    )
    print(f"{name}: {ours / other - 1:+.5f} relative to ggml's squared error")
    assert ours < other * 1.001


# Its logits for token ids, of several files: models of random weights have no vocabulary.
BARE = """
import sys
import numpy as np
from llama_cpp import llama_cpp as L
L.llama_backend_init()
for file in sys.argv[1:]:
    model = L.llama_model_load_from_file(file.encode(), L.llama_model_default_params())
    assert model, file
    options = L.llama_context_default_params()
    options.n_ctx = options.n_batch = 64
    options.n_threads = options.n_threads_batch = 1
    context = L.llama_init_from_model(model, options)
    batch = L.llama_batch_init(24, 0, 1)
    batch.n_tokens = 24
    for place in range(24):
        batch.token[place], batch.pos[place], batch.n_seq_id[place], batch.logits[place] = place * 7 % 96, place, 1, 1
        batch.seq_id[place][0] = 0
    assert L.llama_decode(context, batch) == 0
    rows = [np.ctypeslib.as_array(L.llama_get_logits_ith(context, place), shape=(96,)).copy() for place in range(24)]
    np.save(file + ".npy", np.array(rows))
"""


def bare(file):
    subprocess.run([sys.executable, "-c", BARE, str(file)], check=True)
    return torch.from_numpy(np.load(f"{file}.npy"))


@pytest.mark.parametrize("name", CASES)
def test_every_architecture_gives_its_logits_there(name, tmp_path):
    """A model of random weights, written here, computed there; its cache of keys and values is float16."""
    model = build(CASES[name])
    model.save_pretrained(tmp_path / "dense")
    anybit.quantize(tmp_path / "dense", tmp_path / "out", GgufConfig(mix="F32"))
    found, wanted = bare(next((tmp_path / "out").iterdir())), small_logits(model)[0]
    print(f"{name}: logits differ by {float((found - wanted).norm() / wanted.norm()):.1e}")
    assert (found - wanted).norm() < 2e-3 * wanted.norm()


# its cache rounds; Gemma 3n cuts off what is below a limit, and a rounding may put a number on the other side of it
@pytest.mark.parametrize("name", CONVERTED)
def test_what_its_converter_makes_gives_the_same_logits_there(name, tmp_path):
    converted.write(tmp_path / "dense", CONVERTED[name].config)
    anybit.quantize(tmp_path / "dense", tmp_path / "out", GgufConfig(mix="F32"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    found, wanted = bare(next((tmp_path / "out").iterdir())), small_logits(model)[0]
    print(f"{name}: logits differ by {float((found - wanted).norm() / wanted.norm()):.1e}")
    assert (found - wanted).norm() < (3e-2 if name.startswith("gemma3n") else 4e-3) * wanted.norm()


def test_parts_give_the_same_logits_there(tmp_path):
    build(CASES["llama"]).save_pretrained(tmp_path / "dense")
    anybit.quantize(tmp_path / "dense", tmp_path / "one", GgufConfig(mix="Q8_0"))
    anybit.quantize(tmp_path / "dense", tmp_path / "parts", GgufConfig(mix="Q8_0"), max_shard_size="20KB")
    parts = sorted((tmp_path / "parts").iterdir())
    assert len(parts) > 3
    assert torch.equal(bare(parts[0]), bare(next((tmp_path / "one").iterdir())))


def importance_of(file):
    """Made-up importances for every matrix of a file, as a .dat file and by name."""
    with Checkpoint.open(file) as checkpoint:
        names = [name for name, info in checkpoint.tensors.items() if name.startswith("blk") and len(info.shape) == 2]
        widths = {name: checkpoint.tensors[name].shape[-1] for name in names}
    chance = torch.Generator().manual_seed(1)
    return {name: torch.rand(width, generator=chance) + 0.05 for name, width in widths.items()}


@pytest.mark.parametrize("mix", WEIGHTED)
def test_weighted_mixes_are_as_good_as_theirs(mix, files, tmp_path):
    """The same importances for both: the same types, no larger weighted error, and a file that runs there."""
    importance = importance_of(files("F16"))
    raw = struct.pack("<i", len(importance))
    for name, values in importance.items():
        raw += (
            struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 1, len(values)) + values.numpy().tobytes()
        )
    (tmp_path / "x.dat").write_bytes(raw)
    anybit.quantize(TINY, tmp_path / "out", GgufConfig(mix=mix, imatrix=str(tmp_path / "x.dat")))
    ours, other = next((tmp_path / "out").iterdir()), tmp_path / "theirs.gguf"
    np.savez(tmp_path / "x.npz", **{name: values.numpy() for name, values in importance.items()})
    code = (
        "import ctypes, sys, numpy as np; from llama_cpp import llama_cpp as L; o = L.llama_model_quantize_default_params();"
        "own = dict(np.load(sys.argv[4])); o.ftype, o.nthread = int(sys.argv[3]), 1;"
        "rows = (L.llama_model_imatrix_data * (len(own) + 1))();\n"
        "for row, (name, values) in zip(rows, own.items()):\n"
        "    row.name, row.size = name.encode(), values.size\n"
        "    row.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))\n"
        "o.imatrix = rows; assert L.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(o)) == 0"
    )
    command = [sys.executable, "-c", code, files("F16"), other, str(MIXES[mix][0]), tmp_path / "x.npz"]
    subprocess.run(command, check=True, capture_output=True)
    errors = [0.0, 0.0]
    with Checkpoint.open(files("F16")) as dense, Checkpoint.open(ours) as one, Checkpoint.open(other) as two:
        assert {name: info.encoding for name, info in one.tensors.items()} == {
            name: info.encoding for name, info in two.tensors.items()
        }
        for name, weight in importance.items():
            wanted, kind = dense.read(name).float(), one.tensors[name].encoding
            for place, file in enumerate((one, two)):
                layout = GgufLayout(tuple(wanted.shape), "float32", kind)
                found = layout.decode({kind.lower(): file.read(name)}).to_dense(torch.float32)
                errors[place] += float(((found - wanted).square() * weight).sum())
    (ids, mine), (_, yours) = theirs(ours), theirs(other)
    print(
        f"{mix}: error {errors[0] / errors[1] - 1:+.4f}, perplexity {perplexity(mine, ids):.2f} ours, {perplexity(yours, ids):.2f}"
    )
    assert errors[0] < 1.001 * errors[1]
    read = anybit.load(ours, dtype="float32")(torch.tensor([ids])).logits[0]
    assert (mine - read).norm() < 0.06 * read.norm()


def test_weighted_files_run_there(files, tmp_path):
    entries = b""
    names = [f"blk.{layer}.ffn_up.weight" for layer in range(6)]
    for name in names:
        values = torch.rand(256, generator=torch.Generator().manual_seed(1)) + 0.01
        entries += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 4, 256) + values.numpy().tobytes()
    (tmp_path / "x.dat").write_bytes(struct.pack("<i", len(names)) + entries)
    anybit.quantize(TINY, tmp_path / "out", GgufConfig(mix="Q4_K_M", imatrix=str(tmp_path / "x.dat")))
    ids, logits = theirs(next((tmp_path / "out").iterdir()))
    assert perplexity(logits, ids) < 1.05 * perplexity(theirs(files("F16"))[1], ids)


def test_calibrated_files_run_there(files, tmp_path, tokens):
    calibration = torch.tensor(tokens)[None, :96]
    anybit.quantize(TINY, tmp_path / "out", GgufConfig(mix="Q3_K_M"), calibration=calibration)
    ids, logits = theirs(next((tmp_path / "out").iterdir()))
    plain = theirs(files("Q3_K_M"))[1]
    print(f"perplexity {perplexity(logits, ids):.3f} calibrated, {perplexity(plain, ids):.3f} plain")
    assert perplexity(logits, ids) < 1.02 * perplexity(plain, ids)
