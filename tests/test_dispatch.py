"""From a configuration to its quantizer: look-up, registration, plugins, merging, and what each error says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest

import anybit
from anybit.errors import (
    CalibrationNeeded,
    CheckpointError,
    ConfigError,
    CorruptFile,
    InvalidOption,
    MissingDependency,
    UnknownMethod,
)
from anybit.quantizers import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    AutoHfQuantizer,
    AutoQuantizationConfig,
    HfQuantizer,
    QuantizationConfigMixin,
    QuantizationMethod,
    register_quantization_config,
    register_quantizer,
)

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
BITS_AND_BYTES_KEYS = {"bitsandbytes_4bit", "bitsandbytes_8bit"}


def run(code: str, path: Path | None = None) -> str:
    """Standard output of a fresh interpreter; `path` is searched for modules first."""
    environment = {**os.environ, "PYTHONPATH": str(path)} if path is not None else None
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- from_config ---------------------------------------------------------------------------------------------------------


def test_from_config():
    quantizer = AutoHfQuantizer.from_config(anybit.BitsAndBytesConfig(load_in_4bit=True))
    assert type(quantizer).__name__ == "Bnb4BitHfQuantizer"
    assert quantizer.quant_method == QuantizationMethod.BITS_AND_BYTES
    assert quantizer.pre_quantized
    quantizer = AutoHfQuantizer.from_config({"quant_method": "gptq", "bits": 4}, pre_quantized=False)
    assert type(quantizer).__name__ == "GptqHfQuantizer"
    assert not quantizer.pre_quantized
    assert isinstance(quantizer, HfQuantizer)
    assert isinstance(quantizer.quantization_config, QuantizationConfigMixin)


def test_every_method_dispatches_to_its_own_quantizer():
    for key, cls in AUTO_QUANTIZER_MAPPING.items():
        method = "bitsandbytes" if key in BITS_AND_BYTES_KEYS else key
        config = {"quant_method": method, "bits": 4, "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}
        if key in BITS_AND_BYTES_KEYS:
            config[f"load_in_{key[-4:]}"] = True
        if key == "spqr":
            config["bits"] = 3
        quantizer = AutoHfQuantizer.from_config(config)
        assert type(quantizer) is cls
        assert quantizer.method_name == method
        assert AutoQuantizationConfig.from_dict(config).quant_method == method


@pytest.mark.parametrize("config", [None, 4, "gptq", ["gptq"], object()], ids=["None", "4", "text", "list", "object"])
def test_no_configuration(config):
    with pytest.raises(ConfigError, match=r"pass a configuration such as GPTQConfig"):
        AutoHfQuantizer.from_config(config)


def test_unknown_option_of_a_quantizer():
    with pytest.raises(InvalidOption, match="has no option 'prequantized'; did you mean 'pre_quantized'"):
        AutoHfQuantizer.from_config(GPTQ, prequantized=True)


@pytest.mark.parametrize("flags", [{}, {"load_in_4bit": False}, {"load_in_8bit": None, "load_in_4bit": None}], ids=str)
def test_bitsandbytes_without_a_width(flags):
    with pytest.raises(ValueError, match=r"neither load_in_4bit nor load_in_8bit is true.*Set one of them"):
        AutoHfQuantizer.from_config({"quant_method": "bitsandbytes", **flags})


def test_bitsandbytes_with_both_widths():
    with pytest.raises(ValueError, match=r"load_in_4bit and load_in_8bit are both true.*Set one of them to False"):
        AutoHfQuantizer.from_config({"load_in_4bit": True, "load_in_8bit": True})


def test_unknown_method_names_the_closest_and_lists_all():
    with pytest.raises(UnknownMethod) as caught:
        AutoHfQuantizer.from_config({"quant_method": "gtpq", "bits": 4})
    message = str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert "unknown quantization method 'gtpq'; did you mean 'gptq'?" in message
    assert all(name in message for name in AUTO_QUANTIZER_MAPPING)


def test_no_method_lists_all():
    with pytest.raises(ConfigError) as caught:
        AutoQuantizationConfig.from_dict({"some": 1})
    assert "has no quant_method" in str(caught.value)
    assert "['some']" in str(caught.value)
    assert all(name in str(caught.value) for name in AUTO_QUANTIZER_MAPPING)


@pytest.mark.parametrize("method", [4, True, ["gptq"], {"gptq": 1}], ids=str)
def test_a_method_that_is_no_text(method):
    with pytest.raises(ConfigError, match="it must be the name of a method"):
        AutoQuantizationConfig.from_dict({"quant_method": method})


def test_supports_quant_method():
    supports = AutoHfQuantizer.supports_quant_method
    assert supports(GPTQ)
    assert supports({"load_in_4bit": True})
    assert not supports({"quant_method": "nothing"})
    with pytest.raises(ValueError, match="has no quant_method"):
        supports({"some": 1})


def test_a_key_that_tells_another_method():
    """True flags and objects tell; a false flag does not."""
    assert AutoQuantizationConfig.from_dict({**GPTQ, "load_in_4bit": True}).quant_method == "bitsandbytes"
    assert AutoQuantizationConfig.from_dict({**GPTQ, "load_in_4bit": False}).quant_method == "gptq"
    assert (
        AutoQuantizationConfig.from_dict({"quant_method": "fp8", "export": {"pack_method": "reorder"}}).quant_method
        == "quark"
    )
    assert AutoQuantizationConfig.from_dict({"quant_method": "fp8", "export": None}).quant_method == "fp8"


# --- what a method that cannot be loaded yet, or cannot be created at load, says ------------------------------------------


@pytest.mark.parametrize("key", sorted(AUTO_QUANTIZER_MAPPING))
def test_a_method_whose_tensors_cannot_be_read_refuses_before_it_reads(key, monkeypatch):
    cls = AUTO_QUANTIZER_MAPPING[key]
    monkeypatch.setattr(cls, "layouts_available", False)
    config = anybit.BitsAndBytesConfig(load_in_4bit=True) if key in BITS_AND_BYTES_KEYS else None
    if config is None:
        config = AutoQuantizationConfig.from_dict(
            {"quant_method": key, "bits": 3 if key == "spqr" else 4, "quant_type": {"_type": "Int8WeightOnlyConfig"}}
        )
    quantizer = cls(config)
    with pytest.raises(ConfigError) as caught:
        quantizer.validate_environment(device_map="cpu")
    message = str(caught.value)
    assert repr(quantizer.method_name) in message
    assert type(config).__name__ in message
    assert "never loads a quantized checkpoint as a dense one" in message
    assert not cls.is_available()
    assert not quantizer.is_serializable()


def test_the_environment_is_checked_before_any_weight_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(AUTO_QUANTIZER_MAPPING["gptq"], "layouts_available", False)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": GPTQ}))
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)  # no header: reading it would be a CorruptFile
    with pytest.raises(ConfigError, match="never loads a quantized checkpoint as a dense one"):
        anybit.load(tmp_path)
    monkeypatch.undo()
    with pytest.raises(CorruptFile):
        anybit.load(tmp_path)


def test_methods_fitted_to_data_cannot_be_created_at_load():
    fitted = [cls for cls in AUTO_QUANTIZER_MAPPING.values() if cls.requires_calibration]
    assert "AqlmHfQuantizer" in {cls.__name__ for cls in fitted}

    class Fitted(HfQuantizer):
        requires_calibration = True

    config = anybit.QuarkConfig()
    with pytest.raises(
        CalibrationNeeded, match=r"quark cannot be created from a dense checkpoint at load.*choose a method"
    ):
        Fitted(config, pre_quantized=False)
    spec = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False}
    fitted_to_data = {
        "quant_method": "quark",
        "export": {},
        "global_quant_config": {"weight": spec},
        "algo_config": [{}],
    }
    with pytest.raises(CalibrationNeeded, match=r"algo_config, which needs data"):
        AutoHfQuantizer.from_config(fitted_to_data, pre_quantized=False)
    assert issubclass(CalibrationNeeded, ValueError)


# --- a configuration passed for a checkpoint that has one -----------------------------------------------------------------


def merge(stored, given):
    return AutoHfQuantizer.merge_quantization_configs(stored, given)


def test_only_loading_attributes_are_merged():
    with pytest.warns(UserWarning, match=r"already quantized.*bits, group_size of the passed GPTQConfig is ignored"):
        merged = merge(GPTQ, anybit.GPTQConfig(bits=8, group_size=32, max_input_length=4096))
    assert (merged.bits, merged.group_size, merged.max_input_length) == (4, 128, 4096)


@pytest.mark.parametrize(
    ("stored", "given"),
    [
        ({"quant_method": "fp8"}, anybit.FineGrainedFP8Config(dequantize=True)),
        ({"quant_method": "mxfp4"}, anybit.Mxfp4Config(dequantize=True)),
        ({"quant_method": "metal", "bits": 2}, anybit.MetalConfig(dequantize=True)),
        ({"quant_method": "gguf"}, anybit.GgufConfig(dequantize=True)),
        ({"config_groups": {"FP8": ["Linear"]}}, anybit.CompressedTensorsConfig(dequantize=True)),
        ({"quant_method": "mxfp4"}, {"quant_method": "mxfp4", "dequantize": True}),
    ],
    ids=lambda value: str(value).replace("\n", "")[:50],
)  # fmt: skip
def test_dequantize_is_a_loading_attribute(stored, given):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = merge(stored, given)
    assert merged.dequantize is True
    expected = AutoQuantizationConfig.from_dict(stored)
    expected.dequantize = True
    assert merged == expected


def test_options_nobody_named_overwrite_nothing():
    """transformers sets modules_to_not_convert to None here, and then looks for FP8 tensors in lm_head."""
    stored = {"quant_method": "fp8", "modules_to_not_convert": ["lm_head"], "dequantize": True}
    merged = merge(stored, anybit.FineGrainedFP8Config())
    assert merged.modules_to_not_convert == ["lm_head"]
    assert merged.dequantize
    assert not merge(stored, anybit.FineGrainedFP8Config(dequantize=False)).dequantize
    assert merge(stored, anybit.FineGrainedFP8Config(modules_to_not_convert=[])).modules_to_not_convert == []


def test_merging_leaves_both_sides_alone():
    stored, given = AutoQuantizationConfig.from_dict(GPTQ), anybit.GPTQConfig(bits=4, max_input_length=7)
    assert merge(stored, given) is not stored
    assert stored.max_input_length is None
    assert merge(stored, None) is stored


def test_another_class_is_refused():
    with pytest.raises(ValueError) as caught:
        merge(GPTQ, anybit.BitsAndBytesConfig(load_in_4bit=True))
    message = str(caught.value)
    assert "the checkpoint is quantized with GPTQConfig, but a BitsAndBytesConfig was passed" in message
    assert "Pass a GPTQConfig (its loading options: max_input_length, backend), or no configuration" in message


@pytest.mark.parametrize(
    "stored", [GPTQ, {"quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemm"}], ids=str
)
def test_auto_round_takes_over_gptq_and_awq(stored):
    merged = merge(stored, anybit.AutoRoundConfig(backend="torch"))
    assert type(merged).__name__ == "AutoRoundConfig"
    assert merged.packing_format == f"auto_round:{stored['quant_method']}"
    assert merged.backend == "torch"
    assert type(AutoHfQuantizer.from_config(merged)).__name__ == "AutoRoundQuantizer"


@pytest.mark.parametrize(
    ("stored", "says"),
    [
        ({**GPTQ, "meta": {"quantizer": ["gptqmodel:7.6.0"]}}, "another kind of gptq"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "another kind of awq"),
        ({"load_in_4bit": True}, "not of 'bitsandbytes'"),
    ],
    ids=str,
)
def test_auto_round_takes_over_nothing_else(stored, says):
    with pytest.raises(ValueError, match=says):
        merge(stored, anybit.AutoRoundConfig())


# --- from files ----------------------------------------------------------------------------------------------------------


def folder(path: Path, config: object) -> Path:
    (path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return path


def test_from_pretrained(tmp_path):
    folder(tmp_path, {"model_type": "llama", "quantization_config": GPTQ})
    config = AutoQuantizationConfig.from_pretrained(tmp_path)
    assert config.quant_method == "gptq"
    assert AutoQuantizationConfig.from_pretrained(str(tmp_path), max_input_length=9).max_input_length == 9
    assert type(AutoHfQuantizer.from_pretrained(tmp_path)).__name__ == "GptqHfQuantizer"
    with pytest.raises(InvalidOption, match="has no option 'max_input_lenght'; did you mean 'max_input_length'"):
        AutoQuantizationConfig.from_pretrained(tmp_path, max_input_lenght=9)


def test_subfolder(tmp_path):
    (tmp_path / "text").mkdir()
    folder(tmp_path / "text", {"quantization_config": GPTQ})
    assert AutoQuantizationConfig.from_pretrained(tmp_path, subfolder="text").quant_method == "gptq"


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"quantization_config": {"quant_method": "gtpq"}}, "unknown quantization method 'gtpq'; did you mean 'gptq'?"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 17}}, "bits is 17"),
        ({"quantization_config": {"quant_method": "gptq", "bits": "4"}}, "write the number 4"),
        ({"quantization_config": {"quant_method": "gptq"}}, "lacks 'bits'"),
        ({"quantization_config": {"load_in_4bit": True, "load_in_8bit": True}}, "both true"),
        ({"quantization_config": {}}, "has no quant_method"),
        ({"quantization_config": "gptq"}, "quantization_config is 'gptq'; it must be an object"),
        ({"text_config": {"quantization_config": 3}}, "text_config.quantization_config is 3"),
        ({"a": {"quantization_config": GPTQ}, "b": {"quantization_config": {**GPTQ, "bits": 8}}}, "a, b each have a different"),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_errors_in_a_file_name_the_file(config, says, tmp_path):
    with pytest.raises(ValueError) as caught:
        AutoQuantizationConfig.from_pretrained(folder(tmp_path, config))
    assert isinstance(caught.value, ConfigError)
    assert str(caught.value).startswith(str(tmp_path / "config.json"))
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"quantization_config": {', "is not valid JSON"),
        ("", "is not valid JSON"),
        ("[1]", "holds a JSON list"),
        ('{"a": ' * 70 + "1" + "}" * 70, "nests more than 64 levels"),
        ('{"a": ' + "[" * 5000 + "]" * 5000 + "}", "nests more than 64 levels"),
        ('{"a": ' + "9" * 5000 + "}", "is not valid JSON"),
    ],
    ids=lambda value: value[:20],
)
def test_broken_json_names_the_file(text, says, tmp_path):
    with pytest.raises(CorruptFile) as caught:
        AutoQuantizationConfig.from_pretrained(folder(tmp_path, text))
    assert str(tmp_path / "config.json") in str(caught.value)
    assert says in str(caught.value)


def test_huge_json_is_not_read(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(200 << 20)
    with pytest.raises(CorruptFile, match="has more than 67108864 bytes"):
        AutoQuantizationConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["/no/such/folder", "./no-such", "a/b/c", ""])
def test_neither_a_folder_nor_a_hub_id(name):
    with pytest.raises(CheckpointError, match="neither a folder or file here nor a hub id"):
        AutoQuantizationConfig.from_pretrained(name)


def test_a_hub_id_that_is_not_cached(tmp_path):
    with pytest.raises(CheckpointError, match="'owner/name' is no folder here, and the hub could not be asked for it"):
        AutoQuantizationConfig.from_pretrained("owner/name", local_files_only=True, cache_dir=tmp_path)


def test_a_missing_package_comes_with_its_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="Install it: pip install huggingface_hub") as caught:
        AutoQuantizationConfig.from_pretrained("owner/name")
    assert isinstance(caught.value, MissingDependency)
    assert "reading 'owner/name' from the hub needs the package 'huggingface_hub'" in str(caught.value)


def test_several_gguf_models_in_one_folder(tmp_path):
    for name in ("a-Q4_0.gguf", "a-Q8_0.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"holds 2 models: a-Q4_0.gguf, a-Q8_0.gguf. Name the file"):
        AutoQuantizationConfig.from_pretrained(tmp_path)
    assert AutoQuantizationConfig.from_pretrained(tmp_path / "a-Q8_0.gguf").gguf_file == "a-Q8_0.gguf"


# --- the registries ------------------------------------------------------------------------------------------------------


def test_mappings_are_live_and_read_only():
    assert "gptq" in AUTO_QUANTIZER_MAPPING
    assert "nothing" not in AUTO_QUANTIZER_MAPPING
    assert AUTO_QUANTIZER_MAPPING.get("nothing") is None
    assert 4 not in AUTO_QUANTIZER_MAPPING
    with pytest.raises(KeyError):
        AUTO_QUANTIZATION_CONFIG_MAPPING["nothing"]
    assert len(AUTO_QUANTIZER_MAPPING) == len(list(AUTO_QUANTIZER_MAPPING)) == len(AUTO_QUANTIZATION_CONFIG_MAPPING)
    assert set(AUTO_QUANTIZER_MAPPING) == set(AUTO_QUANTIZATION_CONFIG_MAPPING)
    assert set(AUTO_QUANTIZER_MAPPING) > BITS_AND_BYTES_KEYS
    assert "gptq" in repr(AUTO_QUANTIZER_MAPPING)
    assert not hasattr(AUTO_QUANTIZER_MAPPING, "__setitem__")


def test_registered_names_are_taken():
    for decorate, base, what in (
        (register_quantization_config, QuantizationConfigMixin, "configuration"),
        (register_quantizer, HfQuantizer, "quantizer"),
    ):
        with pytest.raises(ValueError) as caught:
            decorate("gptq")(type("Mine", (base,), {"__module__": "mine"}))
        assert f"the {what} 'gptq' is already registered by anybit.methods.gptq." in str(caught.value)
        assert "mine.Mine needs another name" in str(caught.value)
        for wrong in (object, type("Mine", (), {}), 4):
            with pytest.raises(TypeError, match=f"derived from anybit's {base.__name__}"):
                decorate("another")(wrong)
    assert "another" not in AUTO_QUANTIZER_MAPPING


def test_a_name_is_taken_before_its_file_was_imported():
    out = run("""
        from anybit.quantizers import QuantizationConfigMixin, register_quantization_config
        try:
            register_quantization_config("mxfp8")(type("Mine", (QuantizationConfigMixin,), {}))
        except ValueError as error:
            print(error)
    """)
    assert "'mxfp8' is already registered by anybit.methods.fp8.FineGrainedFP8Config" in out


def test_a_look_up_imports_one_file():
    """Every name leads to its file; no other file, and no plugin, is read for it."""
    names = sorted(AUTO_QUANTIZER_MAPPING)
    out = run(f"""
        import sys
        from anybit.quantizers import registry
        registry.import_methods = registry.import_plugins = lambda *args: sys.exit("more than one file was needed")
        for name in {names}:
            registry.quantizer_class(name), registry.config_class(name)
        print("importlib.metadata" in sys.modules)
    """)
    assert out == "False\n"
    out = run("""
        import sys
        from anybit import GPTQConfig
        from anybit.quantizers import AutoHfQuantizer
        AutoHfQuantizer.from_config(GPTQConfig(bits=4))
        AutoHfQuantizer.from_config({"quant_method": "torchao", "quant_type": {"_type": "Int8WeightOnlyConfig"}})
        print(sorted(name for name in sys.modules if name.startswith("anybit.methods.") and "._" not in name))
    """)
    assert out == "['anybit.methods.gptq', 'anybit.methods.torchao']\n"


# --- plugins -------------------------------------------------------------------------------------------------------------

PLUGIN = """
    from dataclasses import dataclass
    from typing import ClassVar
    from anybit.quantizers import HfQuantizer, QuantizationConfigMixin, register_quantization_config, register_quantizer

    @register_quantization_config("{name}")
    @dataclass(eq=False, repr=False)
    class Config(QuantizationConfigMixin):
        "A plugin's."
        bits: int = 4
        method: ClassVar[str] = "{name}"

    {broken}

    @register_quantizer("{name}")
    class Quantizer(HfQuantizer):
        "A plugin's."
"""


def install(path: Path, name: str, broken: str = "") -> None:
    """A distribution with one entry point, as pip would leave it."""
    (path / f"{name}_module.py").write_text(textwrap.dedent(PLUGIN.format(name=name, broken=broken)))
    info = path / f"{name}_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[anybit.methods]\n{name} = {name}_module\n")


def test_plugins_are_found_after_a_miss(tmp_path):
    install(tmp_path, "toy")
    out = run(
        """
        import sys
        from anybit.quantizers import AUTO_QUANTIZER_MAPPING, AutoHfQuantizer
        AutoHfQuantizer.from_config({"quant_method": "gptq", "bits": 4})
        print("toy_module" in sys.modules, "toy" in list(AUTO_QUANTIZER_MAPPING))
        quantizer = AutoHfQuantizer.from_config({"quant_method": "toy", "bits": 2})
        print(type(quantizer).__module__, quantizer.quantization_config.bits, "toy" in list(AUTO_QUANTIZER_MAPPING))
        """,
        tmp_path,
    )
    assert out == "False False\ntoy_module 2 True\n"


def test_a_broken_plugin_is_named(tmp_path):
    install(tmp_path, "toy", broken="import no_such_package")
    out = run(
        """
        from anybit.errors import PluginError
        from anybit.quantizers import AutoHfQuantizer
        for attempt in range(2):  # the second one must not complain that half of it is registered already
            try:
                AutoHfQuantizer.from_config({"quant_method": "toy"})
            except PluginError as error:
                print(error, type(error.__cause__).__name__)
        print(AutoHfQuantizer.from_config({"quant_method": "marlin", "bits": 4, "desc_act": False}).method_name)
        """,
        tmp_path,
    )
    lines = out.splitlines()
    assert lines[0] == lines[1]
    assert "plugin 'toy' (toy_module, installed by toy-package) failed while 'toy' was looked for" in lines[0]
    assert "ModuleNotFoundError: No module named 'no_such_package'. Repair it or uninstall toy-package" in lines[0]
    assert lines[0].endswith("ModuleNotFoundError")
    assert lines[2] == "gptq", "what is known without plugins needs none"


def test_a_broken_plugin_does_not_hide_another(tmp_path):
    install(tmp_path, "broken", broken="raise RuntimeError('no')")
    install(tmp_path, "toy")
    out = run(
        """
        from anybit.quantizers import AutoHfQuantizer
        print(AutoHfQuantizer.from_config({"quant_method": "toy"}).method_name)
        """,
        tmp_path,
    )
    assert out == "toy\n"


def test_a_plugin_cannot_take_a_built_in_name(tmp_path):
    install(tmp_path, "gptq")
    out = run(
        """
        from anybit.errors import PluginError
        from anybit.quantizers import AutoHfQuantizer
        try:
            AutoHfQuantizer.from_config({"quant_method": "nothing"})
        except PluginError as error:
            print(error)
        print(type(AutoHfQuantizer.from_config({"quant_method": "gptq", "bits": 4})).__module__)
        """,
        tmp_path,
    )
    assert "already registered by anybit.methods.gptq.GPTQConfig" in out
    assert out.splitlines()[-1] == "anybit.methods.gptq"
