"""The quantization configuration of a folder, from its JSON files alone: no torch, no transformers, bounded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from anybit.errors import CheckpointError, ConfigError, CorruptFile

LIMIT_BYTES = 64 << 20
LIMIT_DEPTH = 64
KEY = "quantization_config"
# transformers' names of the part of a composed model that produces text, most specific first
TEXT_PARTS = ("text_config", "decoder", "generator", "text_encoder")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of at most 64 MiB and 64 levels. CorruptFile names the file and what is wrong with it."""
    try:
        with path.open("rb") as file:
            text = file.read(LIMIT_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(text) > LIMIT_BYTES:
        raise CorruptFile(f"{path} has more than {LIMIT_BYTES} bytes; a configuration of that size is not read")
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise CorruptFile(f"{path} nests more than {LIMIT_DEPTH} levels of JSON; no configuration does") from error
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, integers with too many digits
        raise CorruptFile(
            f"{path} ({len(text)} bytes) is not valid JSON: {error}. Download or write it again"
        ) from error
    if not isinstance(value, dict):
        raise CorruptFile(f"{path} holds a JSON {type(value).__name__}, but a configuration is an object")
    if _depth_exceeds(value, LIMIT_DEPTH):
        raise CorruptFile(f"{path} nests more than {LIMIT_DEPTH} levels of JSON; no configuration does")
    return value


def _depth_exceeds(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [child for item in level for child in _children(item)]
        if not level:
            return False
    return True


def _children(value: Any) -> Iterator[Any]:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (child for child in inside if isinstance(child, (dict, list)))


def model_config_of(path: Path) -> dict[str, Any]:
    """config.json of the folder (or of the folder a file lies in); {} when there is none."""
    folder = path if path.is_dir() else path.parent
    file = folder / "config.json"
    return read_json(file) if file.is_file() else {}


def stored_config(model_config: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """`quantization_config` of config.json or of its text part; None when there is none. ConfigError when parts disagree."""
    if model_config.get(KEY) is not None:
        return _as_dict(model_config[KEY], f"{where}: {KEY}")
    parts = {
        name: _as_dict(part[KEY], f"{where}: {name}.{KEY}")
        for name, part in model_config.items()
        if isinstance(part, dict) and part.get(KEY) is not None
    }
    for name in TEXT_PARTS:
        if name in parts:
            return parts[name]
    distinct = [part for index, part in enumerate(parts.values()) if part not in list(parts.values())[:index]]
    if len(distinct) > 1:
        raise ConfigError(
            f"{where}: {', '.join(parts)} each have a different {KEY}; which one is meant cannot be told. Keep one of them"
        )
    return distinct[0] if distinct else None


def objects_under(model_config: Mapping[str, Any], key: str) -> Iterator[dict[str, Any]]:
    """Objects that config.json holds under another key, its own first, then those of its text parts."""
    for place in (model_config, *(model_config.get(name) for name in TEXT_PARTS)):
        if isinstance(place, Mapping) and isinstance(place.get(key), dict):
            yield place[key]


def _as_dict(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where} is {value!r}; it must be an object with a quant_method")
    return value


def fetch(name: str, **hub_options: Any) -> Path:
    """The JSON files of a hub repository, as a local folder. CheckpointError when it cannot be had."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        from anybit.errors import MissingDependency

        raise MissingDependency(f"reading {name!r} from the hub", package="huggingface_hub") from error
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "**/*.json"], **hub_options))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"{name!r} is no folder here, and the hub could not be asked for it: {error}") from error
