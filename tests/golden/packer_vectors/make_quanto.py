"""What optimum-quanto makes of a small weight, and of a small OPT whose layer norms round their outputs.

    python3 -m venv venv && venv/bin/pip install torch==2.13.0 transformers==5.23.0 accelerate safetensors numpy
    venv/bin/pip install --no-deps optimum-quanto==0.2.7
    venv/bin/python make_quanto.py

Writes quanto.safetensors: weight float32, x, and <case>.<tensor> as quanto's state dict has them, <case>.dense as quanto
dequantizes it, <case>.y for x where the layer rounds inputs and outputs; the cases are in its metadata. And the folder
../quanto/opt-act-int8, in the form of a golden, with the logits of the reloaded model.
"""

import json
from pathlib import Path

import torch
import transformers
from optimum.quanto import Calibration, HqqOptimizer, QLinear, freeze, qtypes, quantization_map, quantize, requantize
from safetensors.torch import save_file

HERE = Path(__file__).parent
generator = torch.Generator().manual_seed(0)
tensors, cases = {"x": torch.randn(5, 512, generator=generator)}, {}


def add(name, weights, shape, dtype, activations=None, optimizer="max"):
    weight = (torch.randn(shape, generator=generator) * 0.05).to(dtype)
    if qtypes[weights].bits < 8 and len(weight) > 3:
        weight[1] = 0.02  # all weights alike
    linear = torch.nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)
    linear.weight.data = weight.clone()
    layer = QLinear.from_module(
        linear, weights=qtypes[weights], activations=activations and qtypes[activations],
        optimizer=HqqOptimizer() if optimizer == "hqq" else None,
    )  # fmt: skip
    if activations is not None:
        layer.input_scale, layer.output_scale = torch.tensor(0.03, dtype=dtype), torch.tensor(0.02, dtype=dtype)
    layer.freeze()
    stored = {own: tensor.detach() for own, tensor in layer.state_dict().items()}
    tensors[f"{name}.source"] = weight
    for own, tensor in stored.items():
        tensors[f"{name}.{own}"] = tensor.contiguous().clone()
    with torch.no_grad():
        if activations is None:
            tensors[f"{name}.dense"] = layer.weight.dequantize().contiguous()
        else:
            tensors[f"{name}.y"] = layer(tensors["x"][:, : shape[1]].to(dtype)).dequantize().contiguous()
    cases[name] = {"weights": weights, "activations": activations or "none", "shape": shape, "optimizer": optimizer}


for dtype in (torch.float32, torch.bfloat16, torch.float16):
    kind = str(dtype).removeprefix("torch.")
    for weights in ("qint2", "qint4"):
        for shape in ((6, 256), (5, 160), (9, 100)):  # groups of 128 and 32, and whole rows; padding rows
            for optimizer in ("max", "hqq"):
                if not (weights == "qint4" and dtype == torch.bfloat16 and shape[1] == 256):  # its kernel wants 16 rows
                    add(f"{weights}-{kind}-{shape[1]}-{optimizer}", weights, shape, dtype, None, optimizer)
    for weights in ("qint8", "qfloat8_e4m3fn", "qfloat8_e5m2", "qfloat8_e4m3fnuz"):
        add(f"{weights}-{kind}", weights, (6, 40), dtype)
    add(f"qint8-{kind}-one-row", "qint8", (1, 40), dtype)
    add(f"qint8-qint8-{kind}", "qint8", (24, 40), dtype, "qint8")
add("qint8-qfloat8-float32", "qint8", (24, 40), torch.float32, "qfloat8_e4m3fn")
add("qfloat8-qint8-float32", "qfloat8_e4m3fn", (24, 40), torch.float32, "qint8")
add("qint4-qint8-float32", "qint4", (24, 160), torch.float32, "qint8")
add("qint2-qfloat8_e5m2-float32", "qint2", (24, 100), torch.float32, "qfloat8_e5m2")
made_by = f"optimum-quanto 0.2.7, torch {torch.__version__}"
save_file(tensors, HERE / "quanto.safetensors", {"made_by": made_by, "cases": json.dumps(cases)})

# --- a model whose layer norms round their outputs -----------------------------------------------------------------------

folder = HERE.parent / "quanto" / "opt-act-int8"
folder.mkdir(parents=True, exist_ok=True)
config = transformers.OPTConfig(
    hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64, max_position_embeddings=64,
    word_embed_proj_dim=32, tie_word_embeddings=False, activation_function="gelu",
)  # fmt: skip
torch.manual_seed(0)
model = transformers.OPTForCausalLM(config).eval()
for parameter in model.parameters():
    parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
ids = torch.randint(0, 64, (4, 16), generator=generator)
quantize(model, weights=qtypes["qint8"], activations=qtypes["qint8"])
with Calibration(), torch.no_grad():
    for row in ids:
        model(row[None])
freeze(model)
stored, qmap = dict(model.state_dict()), quantization_map(model)
stored = {name: tensor.detach().contiguous().clone() for name, tensor in stored.items()}
config.dtype = "float32"
config.architectures = ["OPTForCausalLM"]
config.save_pretrained(folder)
save_file(stored, folder / "model.safetensors", {"format": "pt"})
(folder / "quanto_qmap.json").write_text(json.dumps(qmap, indent=4))
reloaded = transformers.OPTForCausalLM(config).eval()
requantize(reloaded, dict(stored), qmap)
name = "model.decoder.layers.0.fc1"
with torch.no_grad():
    logits = reloaded(ids[:1]).logits.dequantize()
    dense = reloaded.get_submodule(name).weight.dequantize()
save_file({"input_ids": ids[:1], "logits": logits, f"dense.{name}": dense}, folder / "reference.safetensors")
fixture = {
    "method": "quanto", "variant": "opt-act-int8", "peer": f"{made_by}, transformers {transformers.__version__}",
    "made_by": "make_quanto.py", "logits_from": "peer", "activation_quant": True, "logits_atol": 0.001, "dense_rtol": 1e-5,
}  # fmt: skip
(folder / "fixture.json").write_text(json.dumps(fixture, indent=1) + "\n")
