"""Model classes of many kinds: quantized while loading, run packed, saved, loaded again, made dense.

The referee is transformers: the dense model loaded by transformers with the weights our layers stand for must give the same
logits as the packed model.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import anybit
from anybit import BitsAndBytesConfig, GPTQConfig
from anybit.modules import PackedWeight, QuantExperts

SMALL: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

# model class, its configuration, share of weights that must be packed
FAMILIES: dict[str, tuple[str, dict[str, Any], float]] = {
    "llama": ("LlamaForCausalLM", {}, 0.8),
    "qwen2": ("Qwen2ForCausalLM", {}, 0.8),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 16}, 0.8),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**EXPERTS, "head_dim": 16, "decoder_sparse_step": 1}, 0.7),
    "mixtral": ("MixtralForCausalLM", EXPERTS, 0.8),
    "gemma2": ("Gemma2ForCausalLM", {"head_dim": 16}, 0.8),
    "gemma3_text": ("Gemma3ForCausalLM", {"head_dim": 16}, 0.8),
    "phi3": ("Phi3ForCausalLM", {}, 0.8),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}, 0.8),
    "gpt_oss": ("GptOssForCausalLM", {**EXPERTS, "head_dim": 16, "sliding_window": 32}, 0.1),
    "opt": ("OPTForCausalLM", {"ffn_dim": 96, "word_embed_proj_dim": 64}, 0.7),
    "bert": ("BertForMaskedLM", {}, 0.6),
    "gpt_neox": ("GPTNeoXForCausalLM", {}, 0.8),
    "bloom": ("BloomForCausalLM", {"n_layer": 2, "n_head": 4}, 0.8),
    "falcon": ("FalconForCausalLM", {"alibi": False}, 0.8),
    "t5": ("T5ForConditionalGeneration", {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}, 0.6),
}
CONFIGS: dict[str, Any] = {
    "nf4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "gptq": lambda: GPTQConfig(bits=4, group_size=32),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """family -> folder of a dense checkpoint with random weights, written by transformers."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            name, options, _ = FAMILIES[family]
            cls = getattr(transformers, name)
            torch.manual_seed(1)
            model = cls(cls.config_class(**SMALL | options, dtype="float32")).eval()
            for parameter in model.parameters():
                if parameter.dim() == 1:  # biases that are zero and norms that are one hide mistakes
                    parameter.data += 0.1 * torch.randn_like(parameter)
            made[family] = tmp_path_factory.mktemp(family)
            model.save_pretrained(made[family])
        return made[family]

    return make


def inputs_of(model: Any) -> dict[str, torch.Tensor]:
    ids = torch.arange(3, 27).view(2, 12) * 7 % 90 + 3
    return {"input_ids": ids, "decoder_input_ids": ids} if model.config.is_encoder_decoder else {"input_ids": ids}


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(**inputs_of(model)).logits
    return logits


# transformers' bitsandbytes leaves subclasses of nn.Linear dense, and what we write for it must load there
LEFT_DENSE = {("falcon", "nf4"), ("falcon", "int8")}
PAIRS = [(family, scheme) for family in FAMILIES for scheme in CONFIGS if (family, scheme) not in LEFT_DENSE]


@pytest.mark.parametrize(("family", "scheme"), sorted(LEFT_DENSE))
def test_what_stays_dense_is_said(family: str, scheme: str, checkpoints: Any) -> None:
    entries = anybit.plan(checkpoints(family), CONFIGS[scheme]()).entries
    assert {entry.action for entry in entries} == {"dense"}
    assert any("FalconLinear" in entry.reason for entry in entries)


@pytest.mark.parametrize(("family", "scheme"), PAIRS)
def test_a_packed_model_is_the_dense_model_of_its_weights(
    family: str, scheme: str, checkpoints: Any, tmp_path: Path
) -> None:
    source = checkpoints(family)
    model: Any = anybit.load(source, CONFIGS[scheme](), dtype=torch.float32)
    assert model.anybit_plan.coverage >= FAMILIES[family][2], [
        (entry.slot.module, entry.reason) for entry in model.anybit_plan.entries if entry.action == "dense"
    ]
    packed = [name for name, module in model.named_modules() if isinstance(module, PackedWeight)]
    assert packed
    logits = logits_of(model)
    assert torch.isfinite(logits).all()

    anybit.quantize(source, tmp_path / "streamed", CONFIGS[scheme](), dtype="float32")
    model.save_pretrained(tmp_path / "saved")
    streamed, saved = (load_file(tmp_path / name / "model.safetensors") for name in ("streamed", "saved"))
    tied = set(model.anybit_plan.tied)  # a tied weight that transformers wrote twice is copied, but saved once
    assert set(saved) <= set(streamed) <= set(saved) | tied
    for name, tensor in saved.items():
        assert tensor.dtype == streamed[name].dtype, name
        assert torch.equal(tensor.view(-1).view(torch.uint8), streamed[name].view(-1).view(torch.uint8)), name

    again: Any = anybit.load(tmp_path / "saved")
    assert torch.equal(logits_of(again), logits)
    assert again.anybit_plan.coverage == model.anybit_plan.coverage

    anybit.dequantize(tmp_path / "saved", tmp_path / "dense", dtype="float32")
    referee = type(model).from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    exact = scheme != "int8"  # LLM.int8 also quantizes the inputs
    wanted = logits_of(referee)
    assert (logits - wanted).abs().max() <= (2e-5 if exact else 0.1) * wanted.abs().max()

    dense = again.dequantize()
    assert not any(isinstance(module, PackedWeight) for module in dense.modules())
    assert (logits_of(dense) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert [name for name, _ in dense.named_parameters()] == [name for name, _ in referee.named_parameters()]


def test_experts_stay_packed_and_three_dimensional(checkpoints: Any) -> None:
    model: Any = anybit.load(checkpoints("mixtral"), CONFIGS["nf4"](), dtype=torch.float32)
    stack = model.model.layers[0].mlp.experts.gate_up_proj
    assert isinstance(stack, QuantExperts)
    assert tuple(stack.shape) == (4, 192, 64)
    assert stack.dequantize().shape == (4, 192, 64)
    names = set(model.state_dict())
    assert any("experts" in name and "quant_state" in name for name in names)
