"""What every configuration class promises, one by one and all alike."""

from __future__ import annotations

import copy
import json
import pickle

import pytest

import anybit
from anybit.errors import ConfigError, InvalidOption
from anybit.quantizers import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING, QuantizationConfigMixin
from anybit.quantizers.config import parameters_of

CLASSES = sorted(set(AUTO_QUANTIZATION_CONFIG_MAPPING.values()), key=lambda cls: cls.__name__)
REQUIRED = {
    "GPTQConfig": {"bits": 4},
    "TorchAoConfig": {"quant_type": {"_type": "Int8WeightOnlyConfig"}},
    "BitsAndBytesConfig": {"load_in_4bit": True},
}
each_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)


def example(cls: type, **more: object):
    return cls(**REQUIRED.get(cls.__name__, {}), **more)


def test_all_names_come_from_the_root():
    names = {cls.__name__ for cls in (*AUTO_QUANTIZATION_CONFIG_MAPPING.values(), *AUTO_QUANTIZER_MAPPING.values())}
    assert len(CLASSES) >= 26
    assert len(names) >= 52
    for name in names:
        assert getattr(anybit, name).__name__ == name
    from anybit import Bnb8BitHfQuantizer, FineGrainedFP8Config, TorchAoConfig

    assert TorchAoConfig.method == "torchao"
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["mxfp8"] is FineGrainedFP8Config
    assert AUTO_QUANTIZER_MAPPING["bitsandbytes_8bit"] is Bnb8BitHfQuantizer
    with pytest.raises(ImportError):
        from anybit import NoSuchConfig  # noqa: F401


def test_the_dispatch_names_come_from_quantizers():
    import anybit.quantizers as quantizers

    assert set(quantizers.__all__) <= set(dir(quantizers))
    for name in quantizers.__all__:
        assert getattr(quantizers, name) is not None
    with pytest.raises(AttributeError, match="did you mean 'AutoHfQuantizer'"):
        quantizers.AutoHFQuantiser  # noqa: B018


@each_class
def test_unknown_arguments_name_the_closest(cls):
    known = parameters_of(cls)
    typo = known[0] + "s" if not known[0].endswith("s") else known[0] + "es"
    with pytest.raises(InvalidOption) as caught:
        example(cls, **{typo: 1})
    message = str(caught.value)
    assert f"{cls.__name__} has no option {typo!r}; did you mean " in message
    assert f"? Options: {', '.join(known)}" in message
    with pytest.raises(ValueError, match=r"has no option 'zzzz'\. Options: "):
        example(cls, zzzz=1)


@each_class
def test_survives_json_copy_and_pickle(cls, tmp_path):
    config = example(cls)
    written = config.to_json_string(use_diff=False)
    again = cls.from_dict(json.loads(written))
    assert again == config
    assert again.to_json_string(use_diff=False) == written
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))
    config.to_json_file(tmp_path / "config.json")
    assert (tmp_path / "config.json").read_text() == written
    assert dict(config) == config.to_dict()
    assert repr(config) == f"{cls.__name__} {written}"
    assert config.to_diff_dict().items() <= config.to_dict().items()
    assert json.loads(config.to_json_string()) == json.loads(json.dumps(config.to_diff_dict()))


@each_class
def test_the_dictionary_is_a_copy(cls):
    config = example(cls)
    before = config.to_json_string(use_diff=False)
    for value in config.to_dict().values():
        if isinstance(value, dict):
            value["changed"] = True
        elif isinstance(value, list):
            value.append("changed")
    assert config.to_json_string(use_diff=False) == before
    assert example(cls).to_json_string(use_diff=False) == before, "a default value is shared"


@each_class
def test_update_sets_checks_and_hands_back(cls):
    config = example(cls)
    assert config.update(nobody=1) == {"nobody": 1}
    assert config == example(cls)
    name = next(name for name in config.__dict__ if name not in ("extra_fields", "quant_method"))
    value = config.__dict__[name]
    assert config.update(**{name: value}, nobody=1) == {"nobody": 1}
    assert config == example(cls)


@each_class
def test_other_keywords_of_from_dict(cls):
    written = example(cls).to_dict()
    config, unused = cls.from_dict(written, return_unused_kwargs=True, nobody=1)
    assert unused == {"nobody": 1}
    assert config == example(cls)
    with pytest.raises(InvalidOption, match="has no option 'nobody'"):
        cls.from_dict(written, nobody=1)


@each_class
def test_from_dict_wants_a_dictionary(cls):
    for wrong in (None, 4, "gptq", ["gptq"]):
        with pytest.raises(ConfigError, match="built from a dictionary"):
            cls.from_dict(wrong)


@each_class
def test_unknown_keys_stay_beside_the_options(cls):
    config = cls.from_dict({**example(cls).to_dict(), "tomorrow": {"a": [1]}, "nothing": None})
    assert config.extra_fields["tomorrow"] == {"a": [1]}
    assert not hasattr(config, "tomorrow")
    assert config.to_dict()["tomorrow"] == {"a": [1]}
    assert config.to_dict()["nothing"] is None
    assert config != example(cls)


# --- what each refuses: (class, arguments, what the message says) ---------------------------------------------------------

INT8 = {"_type": "Int8WeightOnlyConfig"}


def one_group(**weights: object) -> dict[str, object]:
    return {"config_groups": {"g": {"targets": ["Linear"], "weights": weights}}}


REFUSED = [
    ("AqlmConfig", {"nbits_per_codebook": "16"}, "nbits_per_codebook is '16' (str); it must be of type int"),
    ("AqlmConfig", {"num_codebooks": 0}, "num_codebooks is 0; it must be a positive whole number"),
    ("AutoRoundConfig", {"bits": 9}, "bits is 9; it must be 2, 3, 4, 5, 6, 7 or 8"),
    ("AutoRoundConfig", {"group_size": 0}, "group_size is 0"),
    ("BitNetQuantConfig", {"linear_class": "bitliner"}, "it must be 'bitlinear' or 'autobitlinear'; did you mean 'bitlinear'?"),
    ("BitsAndBytesConfig", {"load_in_4bit": True, "load_in_8bit": True}, "both true"),
    ("BitsAndBytesConfig", {"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat15"}, "did you mean 'bfloat16'?"),
    ("BitsAndBytesConfig", {"load_in_4bit": True, "bnb_4bit_quant_storage": "int4"}, "bnb_4bit_quant_storage"),
    ("CompressedTensorsConfig", {"config_groups": {"W4A61": ["Linear"]}}, "did you mean 'W4A16'?"),
    ("CompressedTensorsConfig", one_group(num_bits="4"), "num_bits is '4'"),
    ("CompressedTensorsConfig", one_group(strategy="rows"), "strategy"),
    ("CompressedTensorsConfig", one_group(group_size=0), "group_size is 0"),
    ("CompressedTensorsConfig", one_group(strategy="block"), "rows and columns"),
    ("CompressedTensorsConfig", {"config_groups": {"g": {"weights": None}}}, "`targets`"),
    ("CompressedTensorsConfig", {"config_groups": ["g"]}, "config_groups"),
    ("CompressedTensorsConfig", {"kv_cache_scheme": {"type": "complex"}}, "kv_cache_scheme.type is 'complex'"),
    ("EetqConfig", {"weights": "int4"}, "weights is 'int4'; it must be 'int8'"),
    ("FPQuantConfig", {"forward_dtype": "nvfp4", "forward_method": "quest"}, "forward_method is 'quest'; it must be 'abs_max'"),
    ("FPQuantConfig", {"backward_dtype": "mxfp8"}, "with forward_dtype 'nvfp4' it must be 'bf16'"),
    ("FbgemmFp8Config", {"activation_scale_ub": "1200"}, "activation_scale_ub is '1200'"),
    ("FineGrainedFP8Config", {"weight_block_size": (128, 0)}, "two positive whole numbers"),
    ("FineGrainedFP8Config", {"scale_fmt": "e8m0"}, "did you mean 'ue8m0'?"),
    ("FourOverSixConfig", {"scale_rule": "static6"}, "did you mean 'static_6'?"),
    ("GPTQConfig", {"bits": 17}, "bits is 17"),
    ("GPTQConfig", {"bits": "4"}, "that is text, write the number 4"),
    ("GPTQConfig", {"bits": 4, "group_size": 0}, "group_size is 0"),
    ("GPTQConfig", {"bits": 4, "damp_percent": 2}, "damp_percent is 2"),
    ("GemmaQuantizationConfig", {"num_bits": 3}, "num_bits is 3; it must be 2, 4 or 8"),
    ("GgufConfig", {"gguf_file": 4}, "gguf_file is 4"),
    ("HiggsConfig", {"hadamard_size": 100}, "it must be a multiple of group_size, 256"),
    ("HqqConfig", {"nbits": 7}, "nbits is 7; it must be 8, 6, 5, 4, 3, 2, 1.58 or 1"),
    ("HqqConfig", {"axis": 2}, "axis is 2"),
    ("HqqConfig", {"group_size": 12}, "positive multiple of 8"),
    ("HqqConfig", {"dynamic_config": {"self_attn.q_proj": {"bits": 4}}}, "self_attn.q_proj"),
    ("MetalConfig", {"bits": 3}, "bits is 3; it must be 2, 4 or 8"),
    ("MetalConfig", {"bits": 7, "mode": "affine"}, "bits is 7; it must be 2, 3, 4, 5, 6 or 8"),
    ("ModelOptConfig", {"quant_algo": 4}, "quant_algo is 4"),
    ("Mxfp4Config", {"dequantize": "yes"}, "dequantize is 'yes'"),
    ("NVFP4Config", {"modules_to_not_convert": "lm_head"}, "modules_to_not_convert is 'lm_head'"),
    ("NVFP4Config", {"modules_to_not_convert": ["lm_head", 3]}, "modules_to_not_convert holds 3"),
    ("QuantoConfig", {"weights": "int3"}, "weights is 'int3'"),
    ("QuarkConfig", {"exclude": "lm_head"}, "exclude is 'lm_head'"),
    ("SinqConfig", {"method": "sinc"}, "did you mean 'sinq'?"),
    ("SinqConfig", {"nbits": "four"}, "nbits is 'four'; it must be a whole number"),
    ("SpQRConfig", {"bits": 4}, "bits is 4; it must be 3"),
    ("SpQRConfig", {"shapes": [1]}, "shapes is [1]"),
    ("TorchAoConfig", {"quant_type": "int4_weight_only"}, "write {'_type': 'Int4WeightOnlyConfig'"),
    ("TorchAoConfig", {"quant_type": {"_type": "Int4WeightsOnlyConfig"}}, "did you mean 'Int4WeightOnlyConfig'?"),
    ("TorchAoConfig", {"quant_type": {"group_size": 32}}, "it must be like {'_type'"),
    ("TorchAoConfig", {"quant_type": None}, "quant_type is None"),
    ("TorchAoConfig", {"quant_type": INT8, "untie_embedding_weights": 1}, "untie_embedding_weights is 1"),
    ("VptqConfig", {"config_for_layers": {"a.b": {"is_indice_packed": False}}}, "config_for_layers['a.b']: VptqLayerConfig"),
    ("VptqConfig", {"enable_proxy_error": True}, "it belongs to training"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "says"), REFUSED, ids=lambda value: str(value)[:60])
def test_refusals_name_option_value_and_cure(name, options, says):
    with pytest.raises(ValueError) as caught:
        getattr(anybit, name)(**options)
    assert isinstance(caught.value, InvalidOption)
    assert says in str(caught.value)
    assert name in str(caught.value)


def test_every_class_refuses_something():
    assert {name for name, _, _ in REFUSED} | {"AwqConfig"} == {cls.__name__ for cls in CLASSES}


def test_a_refused_update_changes_nothing():
    config = anybit.HiggsConfig(bits=2)
    with pytest.raises(InvalidOption, match="bits is 5"):
        config.update(p=1, bits=5)
    assert (config.bits, config.p) == (2, 2)


# --- particular classes --------------------------------------------------------------------------------------------------


def test_bitsandbytes_widths_exclude_each_other_also_later():
    config = anybit.BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(ValueError, match="both true"):
        config.load_in_4bit = True
    assert config.load_in_8bit
    assert not config.load_in_4bit
    with pytest.raises(ValueError, match="neither load_in_4bit nor load_in_8bit"):
        anybit.BitsAndBytesConfig().dispatch_key()


def test_dtypes_as_objects_and_names():
    import torch

    ours = anybit.BitsAndBytesConfig
    by_name = ours(load_in_4bit=True, bnb_4bit_compute_dtype="bfloat16")
    by_object = ours(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    by_full_name = ours(load_in_4bit=True, bnb_4bit_compute_dtype="torch.bfloat16")
    assert by_name == by_object == by_full_name
    assert by_name.bnb_4bit_compute_dtype is torch.bfloat16
    assert by_name.to_dict()["bnb_4bit_compute_dtype"] == "bfloat16"
    by_name.bnb_4bit_compute_dtype = torch.float16
    assert by_name.to_dict()["bnb_4bit_compute_dtype"] == "float16"


def test_torchao_from_plain_data():
    bare = anybit.TorchAoConfig({"_type": "Int4WeightOnlyConfig", "_data": {"group_size": 32}})
    assert bare.quant_type == {"_type": "Int4WeightOnlyConfig", "_version": 2, "_data": {"group_size": 32}}
    assert bare == anybit.TorchAoConfig({"default": bare.quant_type})
    assert bare.get_apply_tensor_subclass() is bare.quant_type
    assert bare.to_dict()["quant_type"] == {"default": bare.quant_type}


def test_torchao_turns_vendor_objects_into_data():
    """Objects of torchao's are known by their module's name; torchao itself is never imported."""
    import enum

    import torch

    PerGroup = type("PerGroup", (), {"__module__": "torchao.quantization.granularity"})
    Packing = enum.Enum("Packing", {"PLAIN": "plain"})
    Int4WeightOnlyConfig = type(
        "Int4WeightOnlyConfig", (), {"__module__": "torchao.quantization.quant_api", "version": 2}
    )
    granularity, config = PerGroup(), Int4WeightOnlyConfig()
    granularity.group_size = 32
    config.granularity, config.packing, config.weight_dtype, config._private = granularity, Packing.PLAIN, torch.int8, 1
    assert anybit.TorchAoConfig(config).quant_type == {
        "_type": "Int4WeightOnlyConfig",
        "_version": 2,
        "_data": {
            "granularity": {"_type": "PerGroup", "_version": 1, "_data": {"group_size": 32}},
            "packing": {"_type": "Packing", "_data": "PLAIN"},
            "weight_dtype": {"_type": "torch.dtype", "_data": "int8"},
        },
    }


def test_vptq_settings_of_a_module():
    config = anybit.VptqConfig(
        config_for_layers={"model.layers.0.self_attn.q_proj": {"group_num": 2, "norm_dim": 1}},
        shared_layer_config={"down_proj": {"outlier_size": 8}},
    )
    assert config.layer("model.layers.0.self_attn.q_proj").group_num == 2
    assert config.layer("model.layers.7.mlp.down_proj").outlier_size == 8
    assert config.layer("model.layers.7.mlp.up_proj") is None


def test_parameter_names_are_module_names_to_the_quantizer():
    """AQLM and SpQR files list parameters; a skip that is not understood would make a random lm_head."""
    for config in (
        anybit.AqlmConfig(linear_weights_not_to_quantize=["lm_head.weight", "model.norm.weight"]),
        anybit.SpQRConfig(modules_to_not_convert=["lm_head.weight", "model.norm.weight"]),
    ):
        quantizer = AUTO_QUANTIZER_MAPPING[config.dispatch_key()](config)
        assert list(quantizer.skipped_modules()) == ["lm_head", "model.norm"]
    assert AUTO_QUANTIZER_MAPPING["spqr"](anybit.SpQRConfig()).skipped_modules() is None


def test_mlx_keeps_its_own_form():
    given = {"group_size": 32, "bits": 4, "mode": "mxfp4", "model.layers.0.mlp.router": {"group_size": 64, "bits": 8}}
    config = anybit.MetalConfig.from_dict(given)
    assert config.to_dict() == given
    assert config.extra_fields == {"model.layers.0.mlp.router": {"group_size": 64, "bits": 8}}
    assert config.quant_method == "metal"


def test_load_options_are_not_written():
    for name in ("Mxfp4Config", "MetalConfig", "CompressedTensorsConfig"):
        config = getattr(anybit, name)(dequantize=True)
        assert "dequantize" not in config.to_dict()
        assert config.get_loading_attributes()["dequantize"] is True


def test_a_class_without_dataclass_or_checks():
    class Simple(QuantizationConfigMixin):
        method = "simple"

        def __init__(self, bits: int = 4, names: list[str] | None = None):
            self.bits, self.names = bits, names
            self.__post_init__()

    config = Simple.from_dict({"quant_method": "simple", "bits": 3, "more": 1})
    assert config.to_dict() == {"more": 1, "bits": 3, "names": None, "quant_method": "simple"}
    assert config.changed_options() == {"bits"}
    with pytest.raises(InvalidOption, match="did you mean 'bits'"):
        Simple(bit=3)


def test_changed_options():
    assert anybit.HiggsConfig().changed_options() == set()
    assert anybit.HiggsConfig(bits=4).changed_options() == {"bits"}, "named, although it is the default"
    assert anybit.HiggsConfig(2, p=2).changed_options() == {"bits", "p"}
    assert anybit.FPQuantConfig().changed_options() == set(), "a value worked out from defaults is not the caller's"
    config = anybit.FineGrainedFP8Config()
    config.dequantize = True
    assert config.changed_options() == {"dequantize"}
