"""No vendor's package is ever imported: with all of them poisoned, everything imports and every configuration is built."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import anybit

ROOT = Path(anybit.__file__).parent

# what transformers' quantizers import, and the rest of the quantization packages people have
VENDORS = (
    "aqlm", "auto_gptq", "auto_round", "autogptq", "awq", "bitsandbytes", "compressed_tensors", "deep_gemm", "eetq", "exllamav2",
    "fast_hadamard_transform", "fbgemm_gpu", "flash_attn", "flute", "fouroversix", "fp_quant", "gptqmodel", "hqq", "kernels",
    "llama_cpp", "llmcompressor", "mlx", "mlx_lm", "modelopt", "optimum", "quanto", "quark", "qutlass", "sinq", "spqr_quant",
    "tensorrt_llm", "torchao", "vllm", "vptq",
)  # fmt: skip
# needed for single files only; a file that cannot be imported without one of them is not a failure here
OPTIONAL = ("triton", "hypothesis", "pytest", "matplotlib", "ray", "peft", "datasets", "gguf", "sentencepiece")

CHILD = f"""
import builtins, importlib.machinery, importlib.util, pkgutil, sys

VENDORS, OPTIONAL = {VENDORS!r}, {OPTIONAL!r}
sys.modules.update(dict.fromkeys(VENDORS))  # None: for other libraries they are not installed
real_import = builtins.__import__

def poisoned(name, globals=None, locals=None, fromlist=(), level=0):
    importer = str((globals or {{}}).get("__name__"))
    if importer.partition(".")[0] == "anybit" and name.partition(".")[0] in VENDORS:
        raise AssertionError(f"{{importer}} imports the vendor's package {{name}}")
    return real_import(name, globals, locals, fromlist, level)

builtins.__import__ = poisoned
import anybit

imported, absent = [], []
for item in pkgutil.walk_packages(anybit.__path__, "anybit."):
    if item.name.endswith("__main__"):
        continue
    spec = importlib.util.find_spec(item.name)
    if isinstance(spec.loader, importlib.machinery.ExtensionFileLoader):
        continue  # a plain shared library, loaded by ctypes
    try:
        importlib.import_module(item.name)
        imported.append(item.name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in OPTIONAL:
            raise
        absent.append(item.name)

from anybit.quantizers import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoHfQuantizer
required = {{
    "GPTQConfig": {{"bits": 4}}, "TorchAoConfig": {{"quant_type": {{"_type": "Int8WeightOnlyConfig"}}}},
    "BitsAndBytesConfig": {{"load_in_4bit": True}},
}}
for cls in set(AUTO_QUANTIZATION_CONFIG_MAPPING.values()):
    config = cls(**required.get(cls.__name__, {{}}))
    cls.from_dict(config.to_dict())
    quantizer = AutoHfQuantizer.from_config(config)
    quantizer.is_available(), quantizer.is_serializable(), quantizer.is_trainable, quantizer.quant_method
print(len(imported), len(absent))
assert not [name for name in sys.modules if name.partition(".")[0] in VENDORS and sys.modules[name] is not None]
"""


def test_everything_imports_with_the_vendors_poisoned(tmp_path):
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    imported, absent = map(int, done.stdout.split())
    assert imported > 60
    assert absent < imported / 10


def test_the_poison_works():
    code = (
        CHILD.split("import anybit\n")[0]
        + "exec('import torchao.quantization', {'__name__': 'anybit.methods.torchao'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode != 0
    assert "anybit.methods.torchao imports the vendor's package torchao.quantization" in done.stderr


def test_no_file_names_a_vendor_in_an_import():
    """Also inside functions, which the child does not run."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [item.name for item in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
                "import_module", "__import__", "find_spec", "LazyModule",
            ):  # fmt: skip
                names = [
                    item.value for item in node.args if isinstance(item, ast.Constant) and isinstance(item.value, str)
                ]
            found += [f"{path.relative_to(ROOT)}: {name}" for name in names if name.partition(".")[0] in VENDORS]
    assert found == []
