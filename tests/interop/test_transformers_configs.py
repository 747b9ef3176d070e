"""Our configuration classes beside transformers': the same arguments, defaults, refusals, fields, dictionaries and JSON.

transformers is a dependency, so this runs always. Four of its classes cannot be built without a vendor's package; what they
write is committed in tests/data/vendor_configs.json, and compared live where the package is installed (marker interop).
"""

from __future__ import annotations

import enum
import importlib.util
import inspect
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import anybit
from anybit.quantizers import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    AutoHfQuantizer,
    AutoQuantizationConfig,
    QuantizationMethod,
)

transformers = pytest.importorskip("transformers", minversion="5.23.0")
from transformers.quantizers import auto as theirs_auto  # noqa: E402
from transformers.utils import quantization_config as theirs_configs  # noqa: E402

VENDOR_ROWS = json.loads((Path(__file__).parents[1] / "data" / "vendor_configs.json").read_text(encoding="utf-8"))[
    "rows"
]
VENDOR = {
    "HqqConfig": "hqq",
    "CompressedTensorsConfig": "compressed_tensors",
    "TorchAoConfig": "torchao",
    "QuarkConfig": "quark",
}
NAMES = sorted({cls.__name__ for cls in theirs_auto.AUTO_QUANTIZATION_CONFIG_MAPPING.values()})
BUILT = [name for name in NAMES if name not in VENDOR]

SKIPS = {"modules_to_not_convert": [None, [], ["lm_head", "model.layers.0"]]}
FOUR_OVER_SIX_RULES = [None, "mse", "mae", "abs_max", "static_6", "static_4"]
# class -> option -> values; the first of each is not the default where there is a choice. Wrong values are in it on purpose.
OPTIONS: dict[str, dict[str, list[Any]]] = {
    "AqlmConfig": {
        "in_group_size": [16, "8", 8.0], "out_group_size": [2, None], "num_codebooks": [2], "nbits_per_codebook": [8],
        "linear_weights_not_to_quantize": [["lm_head.weight"], [], None, "lm_head"],
    },
    "AutoRoundConfig": {"bits": [2, 3, 8, 1, 9, "4"], "group_size": [32, -1, 0, -2], "sym": [False], "backend": ["torch"]},
    "AwqConfig": {
        "bits": [4], "group_size": [32], "zero_point": [False], **SKIPS,  # other widths: we refuse what no format can hold
        "backend": ["autoawq", "llm-awq", "gemm_triton", "nothing"], "version": ["GEMV", "gemv_fast", "exllama", None],
        "format": ["gemv", "llm-awq"],
    },
    "BitNetQuantConfig": {
        **SKIPS, "linear_class": ["autobitlinear", "linear"], "quantization_mode": ["online", "later"], "use_rms_norm": [True],
        "rms_norm_eps": [1e-5, None],
    },
    "BitsAndBytesConfig": {
        "load_in_8bit": [True, 1, None], "load_in_4bit": [True, "yes"], "llm_int8_threshold": [0.0, 5, "6"],
        "llm_int8_skip_modules": [["lm_head"], "lm_head"], "llm_int8_enable_fp32_cpu_offload": [True, 0],
        "llm_int8_has_fp16_weight": [True, 0], "bnb_4bit_compute_dtype": ["bfloat16", torch.float16, None, 16],
        "bnb_4bit_quant_type": ["nf4", 4], "bnb_4bit_use_double_quant": [True, 1],
        "bnb_4bit_quant_storage": ["bfloat16", torch.float32, "int4", 8],
    },
    "EetqConfig": {"weights": ["int8", "int4"], **SKIPS},
    "FPQuantConfig": {
        "forward_dtype": ["mxfp4", "fp8"], "forward_method": ["quest", "max"], "backward_dtype": ["mxfp8", "mxfp4", "fp8"],
        "store_master_weights": [True], "hadamard_group_size": [16, 32, 64, 128, 48], "pseudoquantization": [True],
        "transform_init": ["identity", "gsr", "random"], **SKIPS,
    },
    "FbgemmFp8Config": {"activation_scale_ub": [900.0], **SKIPS},
    "FineGrainedFP8Config": {
        "activation_scheme": ["static", "STATIC", "none"],
        "weight_block_size": [None, (1, 32), [64, 128], (128,), (0, 128), (128, -1)],
        "dequantize": [True], **SKIPS, "modules_to_convert": [["embed_tokens"]], "scale_fmt": ["ue8m0", "e8m0"],
        "expert_dtype": ["fp4", "fp6"], "ignored_layers": [["gate"], None], "quant_method": ["mxfp8"],
    },
    "FourOverSixConfig": {
        "activation_dtype": ["mxfp4"], "activation_scale_rule": FOUR_OVER_SIX_RULES, "dtype": ["mxfp4", "if4"],
        "gradient_dtype": ["nvfp4"], "gradient_scale_rule": ["mae"], "keep_master_weights": [True],
        "matmul_backend": ["pytorch"], "output_dtype": ["float16", None], "quantize_backend": ["triton"],
        "scale_rule": ["static_6"], "weight_dtype": ["mxfp4"], "weight_scale_2d": [True], "weight_scale_rule": ["abs_max"],
        "module_config_overrides": [{"model.layers.0.mlp.up_proj": {"scale_rule": "mae"}}], **SKIPS,
    },
    "GPTQConfig": {
        "bits": [2, 3, 8, 1, 16, "4"], "tokenizer": ["some/model"], "dataset": ["c4", "c4-new", ["one", "two"], "ptb", 4],
        "group_size": [32, -1, 0], "damp_percent": [0.01, 0, 1, 1.5], "desc_act": [True], "act_group_aware": [False],
        "sym": [False], "true_sequential": [False], "format": ["GPTQ_V2"], "meta": [{"quantizer": ["gptqmodel:7.6.0"]}],
        "backend": ["MARLIN", None], "model_seqlen": [2048], "block_name_to_quantize": ["model.layers"],
        "module_name_preceding_first_block": [["model.embed_tokens"]], "batch_size": [2], "pad_token_id": [0],
        "max_input_length": [4096], "cache_block_outputs": [False], "checkpoint_format": ["gptq_v2", None],
    },
    "GemmaQuantizationConfig": {
        "num_bits": [2, 8], "quantize_embeddings": [True], "module_quant_configs": [{"mlp": {"num_bits": 2}}], **SKIPS,
    },
    "GgufConfig": {"gguf_file": ["model.gguf"], "dequantize": [True]},
    "HiggsConfig": {
        "bits": [2, 3, 5, "4"], "p": [1, 3], **SKIPS, "hadamard_size": [256, 1024, 100], "group_size": [64, 128, 512],
        "tune_metadata": [{"model.layers.0.mlp.up_proj": {"template_id": 1}}, {}],
    },
    "MetalConfig": {"bits": [2, 8, 3, 6], "group_size": [32, 128, 0, -1], **SKIPS, "dequantize": [True]},
    "Mxfp4Config": {**SKIPS, "dequantize": [True]},
    "NVFP4Config": SKIPS,
    "QuantoConfig": {"weights": ["float8", "int4", "int2", "int3", None], "activations": ["int8", "float8", "int4"], **SKIPS},
    "SinqConfig": {
        "nbits": [3, "8", "four"], "group_size": [128, "64"], "tiling_mode": ["2D"], "method": ["ASINQ", "awq"], **SKIPS,
    },
    "SpQRConfig": {
        "bits": [3, 4, "3"], "beta1": [16, 32, "16"], "beta2": [16, 8], "shapes": [{"a.row_offsets.shape": 4}, [], "x"], **SKIPS,
    },
    "VptqConfig": {
        "enable_proxy_error": [False, True], "shared_layer_config": [{"q_proj": {"group_num": 2}}], **SKIPS,
        "config_for_layers": [{"a.q_proj": {"vector_lens": [-1, 8], "bias": False}}, {"a": {"is_indice_packed": False}}],
    },
}  # fmt: skip
REQUIRED = {"GPTQConfig": {"bits": 4}}


def cases(name: str) -> list[dict[str, Any]]:
    """Defaults, every value alone, and every pair of values of two options."""
    options, base = OPTIONS[name], REQUIRED.get(name, {})
    single = [{option: value} for option, values in options.items() for value in values]
    pairs = [{**one, **other} for one, other in itertools.combinations(single, 2) if one.keys() != other.keys()]
    return [{**base, **given} for given in ({}, *single, *pairs)]


def built(make: Any) -> tuple[Any, Exception | None]:
    try:
        return make(), None
    except (ValueError, TypeError, AttributeError) as error:
        return None, error


def same(ours: Any, theirs: Any) -> bool:
    """Enum members equal their values, numbers of another type do not equal each other."""
    ours, theirs = (getattr(side, "value", side) if isinstance(side, enum.Enum) else side for side in (ours, theirs))
    return type(ours) is type(theirs) and ours == theirs


def differences(ours: Any, theirs: Any) -> dict[str, tuple[Any, Any]]:
    """Everything a user could read that is not the same."""
    found = {
        f"field {name}": (getattr(ours, name, "absent"), value)
        for name, value in vars(theirs).items()
        if not name.startswith("_load") and not same(getattr(ours, name, "absent"), value)
    }
    for method in ("to_dict", "to_diff_dict", "get_loading_attributes"):
        if hasattr(theirs, method):
            left, right = getattr(ours, method)(), getattr(theirs, method)()
            if left != right:
                found[method] = (left, right)
    left, right = ours.to_json_string(use_diff=False), theirs.to_json_string(use_diff=False)
    if left != right:
        found["to_json_string"] = (left, right)
    if dict(ours) != {**theirs.to_dict()}:
        found["iteration"] = (dict(ours), theirs.to_dict())
    return found


def test_every_class_has_a_row():
    assert list(OPTIONS) == BUILT


@pytest.mark.parametrize("name", BUILT)
def test_side_by_side(name):
    """What transformers builds, we build equal; what it refuses with ValueError or TypeError, we refuse with the same."""
    ours_class, theirs_class = getattr(anybit, name), getattr(theirs_configs, name)
    agreed = refused = 0
    for given in cases(name):
        theirs, their_error = built(lambda given=given: theirs_class(**given))
        ours, our_error = built(lambda given=given: ours_class(**given))
        if their_error is None:
            assert our_error is None, f"{given}: {our_error}"
            assert not differences(ours, theirs), given
            agreed += 1
        elif not isinstance(their_error, AttributeError):  # an accident of theirs, not a check
            kind = ValueError if isinstance(their_error, ValueError) else TypeError
            assert isinstance(our_error, kind), f"{given}: theirs {their_error!r}, ours {our_error!r}"
            refused += 1
    assert agreed > 3
    wrong = {
        "AqlmConfig",
        "AutoRoundConfig",
        "BitsAndBytesConfig",
        "GPTQConfig",
        "HiggsConfig",
        "SpQRConfig",
        "QuantoConfig",
    }
    assert refused or name not in wrong


@pytest.mark.parametrize("name", BUILT)
def test_positional_arguments(name):
    """Every argument by its position, too."""
    theirs_class = getattr(theirs_configs, name)
    order = [
        item.name
        for item in inspect.signature(theirs_class).parameters.values()
        if item.kind is item.POSITIONAL_OR_KEYWORD
    ]
    first = {
        **REQUIRED.get(name, {}),
        **{option: values[0] for option, values in OPTIONS[name].items() if option in order},
    }
    defaults = {item.name: item.default for item in inspect.signature(theirs_class).parameters.values()}
    if name == "BitsAndBytesConfig":
        first["load_in_8bit"] = False
    if name == "FPQuantConfig":
        first["hadamard_group_size"] = 64
    values = [first.get(option, defaults[option]) for option in order]
    assert not differences(getattr(anybit, name)(*values), theirs_class(*values))


@pytest.mark.parametrize("name", BUILT)
def test_dictionaries_cross_over(name):
    """Each library reads what the other wrote, and writes the same again."""
    ours_class, theirs_class = getattr(anybit, name), getattr(theirs_configs, name)
    crossed = 0
    for given in cases(name)[:40]:
        theirs, their_error = built(lambda given=given: theirs_class(**given))
        if (
            their_error is not None or given.get("quant_method") == "mxfp8"
        ):  # ours reads a missing block size as [1, 32]
            continue
        written = json.loads(theirs.to_json_string(use_diff=False))
        ours = ours_class.from_dict(written)
        assert json.loads(ours.to_json_string(use_diff=False)) == written, given
        if name != "SinqConfig":  # theirs nests its own dictionary in `_extra_kwargs` again
            again = theirs_class.from_dict(json.loads(ours.to_json_string(use_diff=False)))
            assert json.loads(again.to_json_string(use_diff=False)) == written, given
        crossed += 1
    assert crossed > 2


@pytest.mark.parametrize("name", NAMES)
def test_arguments_and_defaults(name):
    """Names, order and defaults, read from the signatures: no vendor's package is needed for this."""
    ours_class = getattr(anybit, name)
    theirs = [
        item
        for item in inspect.signature(getattr(theirs_configs, name)).parameters.values()
        if item.kind is item.POSITIONAL_OR_KEYWORD
    ]
    ours = [
        item
        for item in inspect.signature(ours_class.__init__).parameters.values()
        if item.kind is item.POSITIONAL_OR_KEYWORD
    ]
    ours = ours[1:]  # without self
    assert [item.name for item in ours[: len(theirs)]] == [item.name for item in theirs]
    required = {item.name for item in theirs if item.default is item.empty}
    assert required == {item.name for item in ours if item.default is item.empty}
    base = (
        {"bits": 4} if name == "GPTQConfig" else {"quant_type": {"_type": "Int8WeightOnlyConfig"}} if required else {}
    )
    for item in theirs:
        if item.default is not item.empty:
            assert ours_class(**base, **{item.name: item.default}) == ours_class(**base), item.name


@pytest.mark.parametrize("row", VENDOR_ROWS, ids=lambda row: f"{row['class']} {json.dumps(row['arguments'])[:80]}")
def test_what_a_vendor_package_makes_of_it(row):
    config = getattr(anybit, row["class"])(**row["arguments"])
    assert config.to_dict() == row["to_dict"]
    assert config.to_diff_dict() == row["to_diff_dict"]
    assert config.get_loading_attributes() == row.get("loading_attributes", {})
    for name, value in row.get("properties", {}).items():
        assert getattr(config, name) == value, name
    assert type(config).from_dict(row["to_dict"]).to_dict() == row["to_dict"]


@pytest.mark.interop
@pytest.mark.parametrize("row", VENDOR_ROWS, ids=lambda row: f"{row['class']} {json.dumps(row['arguments'])[:80]}")
def test_vendor_expectations_are_current(row):
    if importlib.util.find_spec(VENDOR[row["class"]]) is None:
        pytest.skip(f"needs {VENDOR[row['class']]}")
    theirs_class = getattr(theirs_configs, row["class"])
    if row["class"] == "TorchAoConfig":
        theirs = theirs_class.from_dict({**row["arguments"], "quant_type": {"default": row["arguments"]["quant_type"]}})
    else:
        theirs = theirs_class(**row["arguments"])
    assert json.loads(json.dumps(theirs.to_dict())) == row["to_dict"]
    assert json.loads(json.dumps(theirs.to_diff_dict())) == row["to_diff_dict"]


# --- dispatch ------------------------------------------------------------------------------------------------------------

DIALECTS = {"modelopt"}  # found on the hub, unknown to transformers


def test_method_names():
    assert {item.name: item.value for item in QuantizationMethod} == {
        item.name: item.value for item in theirs_configs.QuantizationMethod
    }


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (AUTO_QUANTIZATION_CONFIG_MAPPING, theirs_auto.AUTO_QUANTIZATION_CONFIG_MAPPING),
        (AUTO_QUANTIZER_MAPPING, theirs_auto.AUTO_QUANTIZER_MAPPING),
    ],
    ids=["configurations", "quantizers"],
)
def test_mappings(ours, theirs):
    expected = {name: cls.__name__ for name, cls in theirs.items()}
    assert {name: cls.__name__ for name, cls in ours.items() if name not in DIALECTS} == expected
    assert set(ours) - set(theirs) == DIALECTS


def test_we_never_demand_calibration_where_transformers_does_not():
    for name, cls in theirs_auto.AUTO_QUANTIZER_MAPPING.items():
        assert AUTO_QUANTIZER_MAPPING[name].requires_calibration <= bool(getattr(cls, "requires_calibration", False)), (
            name
        )


@pytest.mark.parametrize("name", BUILT)
def test_their_objects_are_taken(name):
    given = {**REQUIRED.get(name, {}), **({"load_in_4bit": True} if name == "BitsAndBytesConfig" else {})}
    theirs = getattr(theirs_configs, name)(**given)
    quantizer = AutoHfQuantizer.from_config(theirs)
    assert type(quantizer.quantization_config).__name__ == name
    assert quantizer.quantization_config.to_dict() == theirs.to_dict()


def test_their_loading_options_are_taken():
    """They are not in the dictionary, so they must come from the object."""
    for theirs in (theirs_configs.Mxfp4Config(dequantize=True), theirs_configs.MetalConfig(dequantize=True)):
        assert AutoHfQuantizer.from_config(theirs).quantization_config.dequantize is True


DISPATCHED: list[dict[str, Any]] = [
    {"quant_method": "gptq", "bits": 4},
    {"quant_method": "awq", "bits": 4, "version": "GEMM"},
    {"load_in_8bit": True},
    {"load_in_4bit": True, "quant_method": "gptq"},
    {"quant_method": "bitsandbytes", "load_in_4bit": True},
    {"quant_method": "fp8"},
    {"quant_method": "mxfp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"},
    {"quant_method": "auto-round", "bits": 3},
    {"quant_method": "mxfp4"},
    {"bits": 4},
    {"quant_method": "nothing"},
    {"quant_method": "gptq", "bits": 17},
]


@pytest.mark.parametrize("config", DISPATCHED, ids=str)
def test_dispatch_of_dictionaries(config):
    theirs, their_error = built(lambda: theirs_auto.AutoQuantizationConfig.from_dict(dict(config)))
    ours, our_error = built(lambda: AutoQuantizationConfig.from_dict(config))
    assert (our_error is None) == (their_error is None)
    if their_error is not None:
        assert isinstance(our_error, ValueError)
    else:
        assert type(ours).__name__ == type(theirs).__name__
        assert not differences(ours, theirs)
    supported, unsupported = built(lambda: theirs_auto.AutoHfQuantizer.supports_quant_method(config))
    assert built(lambda: AutoHfQuantizer.supports_quant_method(config))[0] == supported
    assert unsupported is None or "quant_method" in str(unsupported)
