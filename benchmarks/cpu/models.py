"""Models that the benchmarks make: Llama shapes of several sizes, random weights, packed by anybit. Kept in a cache folder.

Numbers have the spread of trained ones (a deviation of 0.02; residual outputs smaller), so that activations stay in range
whatever the depth. The vocabulary has no tokenizer: benchmarks feed token numbers.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

CACHE_VARIABLE = "ANYBIT_BENCHMARK_CACHE"


@dataclass(frozen=True)
class Shape:
    """A Llama. `layers` may be fewer than the family's, for a machine that does not hold all."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int = 32000


SHAPES = {
    "0.3B": Shape(1024, 2816, 16, 16, 4),
    "1.1B": Shape(2048, 5632, 22, 32, 4),  # TinyLlama
    "3B": Shape(3072, 8192, 26, 24, 8),
    "8B": Shape(4096, 14336, 32, 32, 8, 128256),  # Llama 3
}


def cache_folder() -> Path:
    """Where models are kept: $ANYBIT_BENCHMARK_CACHE, else below the user's cache."""
    own = os.environ.get(CACHE_VARIABLE)
    return Path(own) if own else Path.home() / ".cache" / "anybit-benchmarks"


def dense(name: str, layers: int | None = None) -> Path:
    """The folder of a bfloat16 model, made if it is not there. `layers`: only so many of the shape's."""
    shape = SHAPES[name]
    layers = layers or shape.layers
    folder = cache_folder() / f"llama-{name}-{layers}"
    if not folder.exists():
        building = folder.with_name(f"{folder.name}.{os.getpid()}")
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        _write(building, shape, layers)
        building.rename(folder)
    return folder


def packed(name: str, scheme: str, layers: int | None = None) -> Path:
    """The same packed by anybit, from its weights alone; a folder, or for GGUF a file."""
    source = dense(name, layers)
    target = source.with_name(f"{source.name}-{scheme}")
    if not target.exists():
        import anybit
        from anybit.quantizers.named import from_scheme

        anybit.quantize(source, target, from_scheme(scheme))
    files = list(target.glob("*.gguf"))
    if files:
        return files[0]
    if not (target / "tokenizer.json").exists():  # gptqmodel loads no model without one
        words = {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "c": 2}, "unk_token": "a"}
        (target / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
        (target / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": words}))
    return target


def path(name: str, scheme: str, layers: int | None = None) -> Path:
    """Either: `scheme` is "dense" or one of anybit's."""
    return dense(name, layers) if scheme == "dense" else packed(name, scheme, layers)


def _write(folder: Path, shape: Shape, layers: int) -> None:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(1)
    files: dict[str, str] = {}

    def save(tensors: dict[str, torch.Tensor]) -> None:
        file = f"model-{len(set(files.values())) + 1:05d}.safetensors"
        save_file(tensors, str(folder / file), metadata={"format": "pt"})
        files.update(dict.fromkeys(tensors, file))

    def numbers(*size: int, deviation: float = 0.02) -> torch.Tensor:
        return (torch.randn(size, generator=generator) * deviation).bfloat16()

    width = shape.hidden // shape.heads * shape.key_heads
    quiet = 0.02 / (2 * layers) ** 0.5
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        save(
            {
                f"{prefix}.self_attn.q_proj.weight": numbers(shape.hidden, shape.hidden),
                f"{prefix}.self_attn.k_proj.weight": numbers(width, shape.hidden),
                f"{prefix}.self_attn.v_proj.weight": numbers(width, shape.hidden),
                f"{prefix}.self_attn.o_proj.weight": numbers(shape.hidden, shape.hidden, deviation=quiet),
                f"{prefix}.mlp.gate_proj.weight": numbers(shape.intermediate, shape.hidden),
                f"{prefix}.mlp.up_proj.weight": numbers(shape.intermediate, shape.hidden),
                f"{prefix}.mlp.down_proj.weight": numbers(shape.hidden, shape.intermediate, deviation=quiet),
                f"{prefix}.input_layernorm.weight": torch.ones(shape.hidden, dtype=torch.bfloat16),
                f"{prefix}.post_attention_layernorm.weight": torch.ones(shape.hidden, dtype=torch.bfloat16),
            }
        )
    save(
        {
            "model.embed_tokens.weight": numbers(shape.vocabulary, shape.hidden),
            "model.norm.weight": torch.ones(shape.hidden, dtype=torch.bfloat16),
            "lm_head.weight": numbers(shape.vocabulary, shape.hidden),
        }
    )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_act": "silu",
        "hidden_size": shape.hidden, "intermediate_size": shape.intermediate, "num_hidden_layers": layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.key_heads, "vocab_size": shape.vocabulary,
        "head_dim": shape.hidden // shape.heads, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2))
