"""Configurations as they are found on disk resolve to the right classes, keep what they say, and come back from JSON."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from anybit.quantizers import AUTO_QUANTIZER_MAPPING, AutoHfQuantizer, AutoQuantizationConfig, QuantizationConfigMixin

DATA = json.loads((Path(__file__).parent / "data" / "real_world_configs.json").read_text(encoding="utf-8"))
CONFIGS, FOLDERS = DATA["configs"], DATA["folders"]


def source(row: dict[str, Any]) -> str:
    return row["source"]


def plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def check(config: QuantizationConfigMixin, row: dict[str, Any]) -> None:
    assert type(config).__name__ == row["class"]
    assert config.quant_method == row["method"]
    assert type(AutoHfQuantizer.from_config(config)).__name__ == row["quantizer"]
    for name, value in row.get("expect", {}).items():
        assert plain(getattr(config, name)) == value, name
    again = AutoQuantizationConfig.from_dict(json.loads(config.to_json_string(use_diff=False)))
    assert again == config


@pytest.mark.parametrize("row", CONFIGS, ids=source)
def test_dictionary(row):
    given = row["config"]
    before = plain(given)
    config = AutoQuantizationConfig.from_dict(given)
    assert given == before, "the caller's dictionary was changed"
    check(config, row)
    written = plain(config.to_dict())
    lost = {name for name, value in given.items() if name not in written or written[name] != value}
    assert lost <= set(row.get("changed", ())), f"lost or changed: {lost}"


@pytest.mark.parametrize("row", FOLDERS, ids=source)
def test_folder(row, tmp_path):
    for name, content in row["files"].items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    path = tmp_path / row.get("load", "")
    check(AutoQuantizationConfig.from_pretrained(path), row)
    assert type(AutoHfQuantizer.from_pretrained(path)).__name__ == row["quantizer"]


@pytest.mark.parametrize("row", CONFIGS, ids=source)
def test_unknown_keys_are_kept_and_written_back(row):
    added = {"a_key_of_tomorrow": {"deep": [1, None]}, "another": None}
    config = AutoQuantizationConfig.from_dict({**row["config"], **added})
    assert type(config).__name__ == row["class"]
    assert {name: config.to_dict()[name] for name in added} == added
    assert {name: json.loads(config.to_json_string(use_diff=False))[name] for name in added} == added


def test_the_table_is_wide_enough():
    """At least 60 rows, and every quantizer class but nothing else."""
    assert len(CONFIGS) + len(FOLDERS) >= 60
    seen = Counter(row["quantizer"] for row in [*CONFIGS, *FOLDERS])
    assert set(seen) == {cls.__name__ for cls in AUTO_QUANTIZER_MAPPING.values()}


DENSE = {
    "no configuration at all": {"config.json": {"model_type": "llama"}},
    "null": {"config.json": {"model_type": "llama", "quantization_config": None}},
    "another meaning of the word": {"config.json": {"model_type": "encodec", "quantization": "none"}},
    "a side file of another kind": {"config.json": {"model_type": "llama"}, "quantization_config.json": {"dtype": "int8"}},
    "a GGUF beside dense weights": {"config.json": {"model_type": "llama"}, "model.safetensors": "", "model.gguf": ""},
    "no file": {},
}  # fmt: skip


@pytest.mark.parametrize("files", DENSE.values(), ids=DENSE.keys())
def test_dense_checkpoints_have_none(files, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    assert AutoQuantizationConfig.find(tmp_path) is None
    with pytest.raises(ValueError, match="no quantization configuration"):
        AutoQuantizationConfig.from_pretrained(tmp_path)
