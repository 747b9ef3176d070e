"""anybit: load, run, create, convert, train on and save every quantized checkpoint of the Hugging Face ecosystem.

    from anybit import AutoModelForCausalLM, BitsAndBytesConfig
    model = AutoModelForCausalLM.from_pretrained("path", quantization_config=BitsAndBytesConfig(load_in_4bit=True))

Names resolve at first access: importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

from typing import Any

from anybit._names import lazy

__version__ = "0.1.0.dev0"

_NAMES = {
    "QuantizationMethod": "anybit.quantizers.config",
    "AutoHfQuantizer": "anybit.quantizers.auto",
    "AutoQuantizationConfig": "anybit.quantizers.auto",
    "AutoTokenizer": "anybit.huggingface.tokenizers",
    "load": "anybit.engine.load",
    "plan": "anybit.engine.load",
    "quantize": "anybit.engine.quantize",
    "dequantize": "anybit.engine.dequantize",
    "convert": "anybit.engine.convert",
    "merge": "anybit.engine.merge",
    "rotate": "anybit.engine.rotate",
    "lora_init": "anybit.engine.loftq",
    "importance_matrix": "anybit.engine.importance",
    "evaluate": "anybit.engine.evaluate",
    "inspect": "anybit.engine.inspection",
    "recommend": "anybit.engine.recommend",
    "sensitivity": "anybit.engine.sensitivity",
    "allocate": "anybit.engine.allocate",
    "read_recipe": "anybit.engine.recipe",
    "quantize_by_recipe": "anybit.engine.recipe",
    "explain": "anybit.engine.explaining",
}


def _miss(name: str) -> Any:
    """Configuration and quantizer classes live in their method files; auto classes mirror transformers'."""
    if name.startswith("AutoModel"):
        from anybit.huggingface import auto_class

        return auto_class(name)
    if name.endswith(("Config", "Quantizer")):
        from anybit.quantizers.registry import class_named

        return class_named(name)
    return None


__getattr__, __dir__ = lazy(__name__, _NAMES, _miss)
