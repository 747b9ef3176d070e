"""From what a user names (a folder, a file, a hub id) to a local folder and the quantizer of its checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anybit.containers import Checkpoint
from anybit.containers.renamed import Renamed
from anybit.errors import CheckpointError, near_path
from anybit.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig
from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.bundle import Bundle

# what a packed load reads; weights of other frameworks and code are never fetched
HUB_PATTERNS = ["*.json", "*.safetensors", "*.gguf", "*.model", "*.txt", "*.jinja"]
PICKLES = ["*.bin", "*.pt", "*.pth"]  # fetched only for who allows them


def locate(path: str | os.PathLike[str], *, allow_pickle: bool = False, **hub_options: Any) -> Path:
    """A local folder or file. Anything that is not one is taken for a hub id and fetched through huggingface_hub."""
    local = Path(path).expanduser()
    if local.exists():
        return local
    name = str(path)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{name!r} is neither a folder or file here nor a hub id (owner/name){near_path(local) if name else ''}"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*HUB_PATTERNS, *PICKLES] if allow_pickle else HUB_PATTERNS
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, **hub_options))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        why, near = str(error).strip().partition("\n")[0].removeprefix("Got: "), near_path(local)
        raise CheckpointError(
            f"{name!r} is no folder here{f'{near} The' if near else ', and the'} hub could not be asked for it: {why}"
        ) from error


def unbundled(checkpoint: Checkpoint, quantizer: HfQuantizer | None) -> tuple[Checkpoint, Bundle | None]:
    """Tensors under names that transformers knows, and what else the files hold if they carry the whole model."""
    bundle = quantizer.unbundle(checkpoint) if quantizer is not None else None
    return (checkpoint if bundle is None else Renamed(checkpoint, bundle.tensors, bundle.ignored)), bundle


def read_tokenizer(path: str | os.PathLike[str], **options: Any) -> Any:
    """transformers' tokenizer of a folder, of a file that carries one, or of a hub id; `options` are its own."""
    import tempfile

    from transformers import AutoTokenizer

    location = locate(path)
    quantizer = read_quantizer(location)
    bundle = None
    if quantizer is not None and quantizer.reads_bundles:
        with Checkpoint.open(location) as checkpoint:
            bundle = quantizer.unbundle(checkpoint)
    files = bundle.files() if bundle is not None else {}
    if not files:
        folder = location if location.is_dir() else location.parent
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, **options)
    with tempfile.TemporaryDirectory(prefix="anybit-tokenizer-") as folder_name:
        for name, content in files.items():
            (Path(folder_name) / name).write_bytes(content)
        tokenizer = AutoTokenizer.from_pretrained(folder_name, trust_remote_code=False, **options)
    tokenizer.name_or_path = str(path)
    return tokenizer


def read_quantizer(path: Path, quantization_config: Any = None) -> HfQuantizer | None:
    """The quantizer of a checkpoint, of the given configuration, or of both merged; None for a dense load."""
    stored = AutoQuantizationConfig.find(path)
    if stored is None and quantization_config is None:
        return None
    if stored is None:
        return AutoHfQuantizer.from_config(quantization_config, pre_quantized=False)
    return _merged(stored, quantization_config)


def recognize_quantizer(path: Path, tensors: Mapping[str, Any], quantization_config: Any = None) -> HfQuantizer | None:
    """The quantizer of tensors that are packed although no file says so; None for dense ones."""
    stored = AutoQuantizationConfig.find_among(tensors, path)
    return None if stored is None else _merged(stored, quantization_config)


def _merged(stored: Any, quantization_config: Any) -> HfQuantizer:
    merged = AutoHfQuantizer.merge_quantization_configs(stored, quantization_config)
    return AutoHfQuantizer.from_config(merged, pre_quantized=True)
