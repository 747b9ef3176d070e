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
    "IQ4_NL",
    "IQ4_XS",
    "TQ1_0",
    "TQ2_0",
    "MXFP4_MOE",
]


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
    assert (logits - ours).norm() < (0.2 if mix.startswith("TQ") else 0.03) * ours.norm()
    assert abs(perplexity(logits, ids) / perplexity(ours, ids) - 1) < (0.05 if mix.startswith("TQ") else 0.01)


@pytest.mark.parametrize(
    "mix", [mix for mix in MIXES if mix not in ("F32", "F16", "BF16", "TQ1_0", "TQ2_0", "MXFP4_MOE")]
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
    "name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]
)
def test_blocks_are_as_good_as_ggmls(name, weighted):
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
