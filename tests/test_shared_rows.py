"""Checkpoints that keep one packed matrix where the model class has several layers (nomic-bert's Wqkv, gte's up_gate_proj)."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import anybit
from anybit import algorithms
from anybit.errors import NotRepresentable, UnexpectedTensor
from anybit.quantizers import AutoHfQuantizer
from anybit.weight import ModuleInfo

IDS = torch.arange(3, 19)[None]
CONFIGS: dict[str, Any] = {
    "int8": {"load_in_8bit": True, "quant_method": "bitsandbytes", "llm_int8_threshold": 0.0},
    "nf4": {"load_in_4bit": True, "quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"},
    "hqq": anybit.HqqConfig(nbits=4, group_size=32).to_dict(),
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "checkpoint_format": "gptq_v2"},
}


def dense_model(kind: str, folder: Path) -> Any:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 128,
    }
    config: Any = {"nomic_bert": transformers.NomicBertConfig, "gte": transformers.GteConfig}[kind](**sizes)
    model = transformers.AutoModel.from_config(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name.lower() else 0.0, 0.1)
    model.save_pretrained(folder)
    return model.eval()


def pack(folder: Path, config: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Pack every linear of the checkpoint under its own name; returns what is stored, and what packed matrices stand for."""
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    stored, dense = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        own = name.removesuffix(".weight")
        if tensor.dim() != 2 or "embeddings" in name or own == name:
            stored[name] = tensor
            continue
        layout = quantizer.layout_for(ModuleInfo(f"layers.0.{own}", "linear", tuple(tensor.shape), "float32"))
        assert layout is not None
        assert layout.algorithm is not None
        weight = algorithms.get(layout.algorithm)(tensor, layout.scheme(), **layout.algorithm_options())
        stored |= {f"{own}.{part}": data.contiguous() for part, data in layout.encode(weight).items()}
        dense[own] = weight.to_dense(torch.float32)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    file = json.loads((folder / "config.json").read_text())
    written = quantizer.quantization_config.to_dict()
    (folder / "config.json").write_text(json.dumps({**file, "quantization_config": written}))
    return stored, dense


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def output(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).last_hidden_state
    return found


@pytest.mark.parametrize("kind", ["nomic_bert", "gte"])
@pytest.mark.parametrize("method", sorted(CONFIGS))
def test_layers_have_their_rows_and_the_unit_is_saved_as_it_came(kind: str, method: str, tmp_path: Path) -> None:
    source = dense_model(kind, tmp_path / "packed")
    stored, dense = pack(tmp_path / "packed", CONFIGS[method])
    model: Any = anybit.load(tmp_path / "packed")
    unit = next(name for name in dense if "qkv" in name.lower())
    attention = model.get_submodule("layers.0.self_attn") if kind == "nomic_bert" else None
    if attention is None:
        attention = next(module for name, module in model.named_modules() if name.endswith("self_attn"))
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    assert torch.equal(torch.cat([part.dequantize(torch.float32) for part in parts]), dense[unit])
    assert model.anybit_plan.bytes_on_disk == sum(tensor.nbytes for tensor in stored.values())
    wanted = output(source)
    assert (output(model) - wanted).abs().max() < 0.5 * wanted.abs().max()  # four bits and random weights

    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == stored.keys()
    assert all(raw(saved[name]) == raw(data) for name, data in stored.items())

    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(output(twin), output(model))
    if method != "int8":  # whose products round inputs, too
        anybit.dequantize(tmp_path / "packed", tmp_path / "dense")
        assert torch.allclose(output(anybit.load(tmp_path / "dense")), output(model), atol=1e-4)
    model.dequantize()
    for name, part in zip("qkv", dense[unit].chunk(3), strict=True):
        assert torch.equal(getattr(attention, f"{name}_proj").weight, part)


def test_a_block_that_spans_two_layers_is_refused(tmp_path: Path) -> None:
    """Groups of HQQ's axis 0 have a row of the matrix in each of them."""
    dense_model("nomic_bert", tmp_path)
    pack(tmp_path, anybit.HqqConfig(nbits=4, group_size=64, axis=0).to_dict())
    with pytest.raises(
        NotRepresentable, match=r"encoder\.layers\.0\.attn\.Wqkv belongs to several layers of the model"
    ):
        anybit.load(tmp_path)


def test_what_operations_on_dense_tensors_cannot_do_is_refused(tmp_path: Path) -> None:
    """Also where the tensors beside the codes are lost: int8 is not taken for numbers."""
    dense_model("nomic_bert", tmp_path)
    stored, _ = pack(tmp_path, CONFIGS["int8"])
    kept = {name: tensor for name, tensor in stored.items() if "Wqkv" not in name or name.endswith(".weight")}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnexpectedTensor, match=r"Wqkv\.weight' in .* is int8: bitsandbytes has it packed, .* by Chunk"):
        anybit.load(tmp_path, strict=False)


@pytest.mark.parametrize("method", sorted(CONFIGS))
def test_the_parts_of_a_fused_layer_are_joined_and_saved_as_they_came(method: str, tmp_path: Path) -> None:
    """gptqmodel 7.6 takes Phi-3's gate_up_proj apart and writes the two parts."""
    torch.manual_seed(0)
    config = transformers.Phi3Config(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=128,
        pad_token_id=0,
    )
    transformers.Phi3Model(config).save_pretrained(tmp_path / "packed")
    file = tmp_path / "packed" / "model.safetensors"
    fused = "layers.0.mlp.gate_up_proj.weight"
    tensors = load_file(file)
    gate, up = tensors.pop(fused).chunk(2)
    kept = {name: tensor for name, tensor in tensors.items() if "embed" not in name}
    parts = {"layers.0.mlp.gate_proj.weight": gate.contiguous(), "layers.0.mlp.up_proj.weight": up.contiguous()}
    save_file({**kept, **parts}, file, {"format": "pt"})
    stored, dense = pack(tmp_path / "packed", CONFIGS[method])
    stored["embed_tokens.weight"] = tensors["embed_tokens.weight"]
    save_file(stored, file, {"format": "pt"})

    model: Any = anybit.load(tmp_path / "packed")
    joined = model.get_submodule("layers.0.mlp.gate_up_proj").dequantize(torch.float32)
    assert torch.equal(joined, torch.cat([dense["layers.0.mlp.gate_proj"], dense["layers.0.mlp.up_proj"]]))
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == stored.keys()
    assert all(raw(saved[name]) == raw(data) for name, data in stored.items())
