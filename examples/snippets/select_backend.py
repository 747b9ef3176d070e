"""Select a quantization backend from a configuration, before any weight is read."""

from anybit import AwqConfig, BitsAndBytesConfig, GPTQConfig, QuantizationMethod
from anybit.quantizers import AutoHfQuantizer, AutoQuantizationConfig

for config in (
    BitsAndBytesConfig(load_in_4bit=True),
    BitsAndBytesConfig(load_in_8bit=True),
    GPTQConfig(bits=4),
    AwqConfig(bits=4),
    {"quant_method": "gptq", "bits": 4, "group_size": 128},
):
    quantizer = AutoHfQuantizer.from_config(config)
    print(f"{type(quantizer).__name__}: {quantizer.quantization_config.quant_method}")

config = AutoQuantizationConfig.from_dict({"quant_method": "awq", "bits": 4})
assert config.quant_method == QuantizationMethod.AWQ
