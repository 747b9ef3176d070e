"""mkdocs calls these: the generated pages join the written ones, without lying among them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))
from generate import pages


def on_config(config: Any) -> Any:
    """The pages of the methods in the navigation."""
    for section in config["nav"]:
        if "Methods" in section:
            section["Methods"] = sorted(name for name in pages() if name.startswith("methods/"))
            section["Methods"].sort(key=lambda name: name != "methods/index.md")
    return config


def on_files(files: Files, config: Any) -> Files:
    for name, text in pages().items():
        files.append(File.generated(config, name, content=text))
    return files
