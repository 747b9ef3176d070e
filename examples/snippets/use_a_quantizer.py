"""Use a quantizer class directly: ask whether it is available, and let it check the environment."""

from anybit import BitsAndBytesConfig, Bnb4BitHfQuantizer, GPTQConfig, GptqHfQuantizer

quantizer = Bnb4BitHfQuantizer(BitsAndBytesConfig(load_in_4bit=True), pre_quantized=False)
print(quantizer.quant_method, quantizer.is_available(), quantizer.is_serializable(), quantizer.is_trainable)
if quantizer.is_available():
    quantizer.validate_environment(device_map={"": "cpu"})

quantizer = GptqHfQuantizer(GPTQConfig(bits=4))
print(quantizer.quant_method, quantizer.requires_calibration)
