"""Recipes: one file that says how a checkpoint is to be quantized, module by module, and on which calibration data.

    {
      "recipe": 1,
      "quantization": {"scheme": "gptq-4bit-g64", "options": {"desc_act": false}},
      "modules": {"model.layers.*.mlp.down_proj": {"scheme": "gptq-8bit-g64"}, "model.layers.0.*": "dense"},
      "algorithm": "gptq",
      "algorithm_options": {"mse": 2.4},
      "rotate": "r1+r2",
      "calibration": {"text": "calibration.txt", "samples": 128, "sequence_length": 512, "seed": 0},
      "about": {"anything": "kept, never read"}
    }

`quantization` and what stands for a module name a `scheme`, or a `method`, and `options` of it. A name in `modules` may hold `*`,
which stands for any text; where several names fit a module, the last one counts. All of it but `quantization` may be left out.
JSON, or YAML in a file that ends in .yaml or .yml. Paths are relative to the recipe.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from anybit.engine.calibration import LENGTH, SAMPLES, SEED
from anybit.engine.forecast import Forecast
from anybit.engine.load import prepare
from anybit.engine.plan import Entry, Plan, module_info
from anybit.engine.quantize import quantize
from anybit.engine.rotation import steps
from anybit.errors import ConfigError, InvalidOption, MissingDependency, did_you_mean, near_path
from anybit.quantizers import registry
from anybit.quantizers.config import QuantizationConfigMixin
from anybit.quantizers.named import build, from_scheme

VERSION = 1
FILE_NAME = "anybit_recipe.json"  # beside a checkpoint that was made with a recipe
DENSE = "dense"
LARGEST_FILE = 16 << 20
KEYS = ("recipe", "quantization", "modules", "algorithm", "algorithm_options", "rotate", "calibration", "about")
EXAMPLE = '{"scheme": "nf4"}'


@dataclass(frozen=True)
class Setting:
    """A named scheme, or a method, and options that differ from it."""

    scheme: str | None = None
    method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def config(self) -> QuantizationConfigMixin:
        """The configuration object; InvalidOption or UnknownMethod when there is none."""
        if self.scheme is not None:
            return from_scheme(self.scheme, self.options)
        cls = registry.config_class(str(self.method))
        if cls is None:
            known = sorted({cls.method for cls in registry.config_classes() if cls.method})
            raise InvalidOption(
                f"no method {self.method!r}{did_you_mean(str(self.method), known) or '.'} Methods: {', '.join(known)}"
            )
        return build(cls, self.options)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without what is not set."""
        return {name: value for name, value in asdict(self).items() if value}


@dataclass(frozen=True)
class Calibration:
    """A text (a path) and how much of it is used; the names and defaults of `quantize`."""

    text: str
    samples: int = SAMPLES
    sequence_length: int = LENGTH
    seed: int = SEED


@dataclass(frozen=True)
class Recipe:
    """What a recipe file says. `modules`: name or pattern -> setting, None for dense. `folder`: what paths are relative to."""

    quantization: Setting
    modules: Mapping[str, Setting | None] = field(default_factory=dict)
    algorithm: str | None = None
    calibration: Calibration | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    folder: Path = Path()
    algorithm_options: Mapping[str, Any] = field(default_factory=dict)
    rotate: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as a file holds it."""
        found: dict[str, Any] = {"recipe": VERSION, "quantization": self.quantization.to_dict()}
        if self.modules:
            found["modules"] = {
                name: DENSE if setting is None else setting.to_dict() for name, setting in self.modules.items()
            }
        if self.algorithm is not None:
            found["algorithm"] = self.algorithm
        if self.algorithm_options:
            found["algorithm_options"] = dict(self.algorithm_options)
        if self.rotate is not None:
            found["rotate"] = self.rotate
        if self.calibration is not None:
            found["calibration"] = asdict(self.calibration)
        return {**found, "about": dict(self.about)} if self.about else found

    def to_json(self) -> str:
        """Indented JSON."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def config(self, modules: Iterable[str] = ()) -> QuantizationConfigMixin:
        """One configuration for a model with these modules. ConfigError for a name that fits none of them.

        NotRepresentable where the method's files have one setting for all modules.
        """
        base = self.quantization.config()
        if not self.modules:
            return base
        names = list(modules)
        made: dict[str, QuantizationConfigMixin | None] = {}
        for pattern, setting in self.modules.items():
            matches = re.compile(fnmatch.translate(pattern.replace("[", "[[]").replace("?", "[?]"))).match
            fitting = [name for name in names if matches(name)]
            if not fitting:
                raise ConfigError(
                    f"modules: {pattern!r} fits no module of the model{did_you_mean(pattern, names) or '.'} `*` stands for any "
                    "text; `anybit plan PATH --all` lists the modules"
                )
            config = setting.config() if setting is not None else None
            if config is not None and type(config) is not type(base):
                raise ConfigError(
                    f"modules: {pattern!r} asks for {type(config).__name__}, the rest for {type(base).__name__}; one checkpoint "
                    "is of one method"
                )
            for name in fitting:
                made.pop(name, None)
                made[name] = config
        return base.per_module(made)


def read_recipe(file: str | os.PathLike[str]) -> Recipe:
    """A recipe file. ConfigError names the file, the key, the line where it can be told, and what to write instead."""
    path = Path(file)
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ConfigError(f"{path} has {path.stat().st_size:,} bytes; that is no recipe")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        near = "" if path.exists() else near_path(path)
        raise ConfigError(
            f"the recipe {path} cannot be read: {getattr(error, 'strerror', None) or error}{near}"
        ) from error
    data = _yaml(path, text) if path.suffix in (".yaml", ".yml") else _json(path, text)
    return _Reader(path, text).recipe(data)


def recipe_of(data: Mapping[str, Any]) -> Recipe:
    """A recipe from plain data."""
    return _Reader(Path("recipe"), "").recipe(data)


def module_names(plan: Plan) -> dict[str, Entry]:
    """What a method calls each stored unit of the model's weights -> the weight it belongs to."""
    return {
        module_info(entry.slot, part, entry.parts, plan.dtype).name: entry
        for entry in plan.entries
        for part in entry.parts
    }


def quantize_by_recipe(
    src: str | os.PathLike[str], dst: str | os.PathLike[str], recipe: Recipe, **options: Any
) -> Plan:
    """`quantize` as the recipe says; the recipe is written beside the result. `options`: further ones of `quantize`."""
    names: Iterable[str] = ()
    if recipe.modules:
        ready = prepare(
            src, recipe.quantization.config(), device_map=options.get("device", "cpu"),
            allow_pickle=options.get("allow_pickle", False), hub_options=options.get("hub_options"),
        )  # fmt: skip
        names = module_names(ready.plan)
        ready.checkpoint.release()
    calibration = recipe.calibration
    if calibration is not None:
        text = Path(calibration.text)
        options["calibration"] = text if text.is_absolute() else recipe.folder / text
        options.update(samples=calibration.samples, sequence_length=calibration.sequence_length, seed=calibration.seed)
    if recipe.algorithm is not None:
        options["algorithm"] = recipe.algorithm
    if recipe.algorithm_options:
        options["algorithm_options"] = dict(recipe.algorithm_options)
    if recipe.rotate is not None:
        options["rotate"] = recipe.rotate
    asked, wanted = options.pop("announce", None), True

    def announce(ahead: Forecast) -> bool:
        nonlocal wanted
        wanted = asked is None or asked(ahead)
        return wanted

    plan = quantize(src, dst, recipe.config(names), announce=announce, **options)
    target = Path(dst)
    if wanted and target.is_dir():
        (target / FILE_NAME).write_text(recipe.to_json(), encoding="utf-8")
    return plan


# --- reading ------------------------------------------------------------------------------------------------------------


def _json(path: Path, text: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(f"{path}: the key {twice!r} is there twice; leave one")
        return found

    try:
        return json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {error.lineno}: not JSON: {error.msg} (column {error.colno})") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: nested too deeply for a recipe") from error


def _yaml(path: Path, text: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise MissingDependency("reading a recipe in YAML", package="pyyaml") from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{path}{where}: not YAML: {getattr(error, 'problem', None) or error}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: nested too deeply for a recipe") from error


class _Reader:
    """Checks plain data, and knows where in the file a key is."""

    def __init__(self, path: Path, text: str):
        self.path, self.text = path, text

    def wrong(self, keys: tuple[str, ...], why: str) -> ConfigError:
        line = self.line(keys)
        where = f"{self.path}{f', line {line}' if line else ''}"
        return ConfigError(f"{where}: {'.'.join(keys) or 'the recipe'} {why}")

    def line(self, keys: tuple[str, ...]) -> int | None:
        """The line of the last key, each looked for behind the one before it."""
        place = 0
        for key in keys:
            found = re.compile(rf"""["']?{re.escape(key)}["']?\s*:""").search(self.text, place)
            if found is None:
                return None
            place = found.end()
        return self.text.count("\n", 0, place) + 1 if keys and self.text else None

    def recipe(self, data: Any) -> Recipe:
        if not isinstance(data, Mapping):
            raise self.wrong((), f"is {_shown(data)}; it must be an object with `quantization`")
        self.known(data, KEYS, ())
        if data.get("recipe", VERSION) != VERSION:
            raise self.wrong(
                ("recipe",), f"is {_shown(data['recipe'])}; this anybit reads recipes of version {VERSION}"
            )
        if "quantization" not in data:
            raise self.wrong((), f"has no `quantization`; add it, e.g. {EXAMPLE}")
        quantization = self.setting(data["quantization"], ("quantization",))
        modules = self.object(data.get("modules") or {}, ("modules",))
        settings = {
            name: None if value == DENSE else self.setting(value, ("modules", str(name)))
            for name, value in modules.items()
        }
        return Recipe(
            quantization,
            settings,
            self.typed(data, "algorithm", str, ()),
            self.calibration(data.get("calibration")),
            self.object(data.get("about") or {}, ("about",)),
            self.path.parent,
            self.object(data.get("algorithm_options") or {}, ("algorithm_options",)),
            self.rotations(data),
        )

    def rotations(self, data: Mapping[str, Any]) -> str | None:
        found = self.typed(data, "rotate", str, ())
        try:
            steps(found or False)
        except InvalidOption as error:
            raise self.wrong(("rotate",), f"cannot be meant: {error}") from error
        return found

    def setting(self, data: Any, keys: tuple[str, ...]) -> Setting:
        if isinstance(data, str):
            data = {"scheme": data}
        data = self.object(data, keys)
        self.known(data, ("scheme", "method", "options"), keys)
        if ("scheme" in data) == ("method" in data):
            raise self.wrong(keys, f"must have either `scheme` or `method`, e.g. {EXAMPLE}")
        options = self.object(data.get("options") or {}, (*keys, "options"))
        made = Setting(self.typed(data, "scheme", str, keys), self.typed(data, "method", str, keys), options)
        try:
            made.config()
        except ConfigError as error:
            raise self.wrong(
                (*keys, "scheme" if "scheme" in data else "method"), f"cannot be meant: {error}"
            ) from error
        return made

    def calibration(self, data: Any) -> Calibration | None:
        if data is None:
            return None
        keys = ("calibration",)
        data = self.object(data, keys)
        names = ("text", "samples", "sequence_length", "seed")
        self.known(data, names, keys)
        if not isinstance(data.get("text"), str):
            raise self.wrong(keys, "has no `text`: the path of a .txt, .jsonl or .parquet file")
        for name in names[1:]:
            value = self.typed(data, name, int, keys)
            if value is not None and value < (0 if name == "seed" else 1):
                raise self.wrong((*keys, name), f"is {value}; it must be positive")
        return Calibration(**data)

    def known(self, data: Mapping[str, Any], names: tuple[str, ...], keys: tuple[str, ...]) -> None:
        for key in data:
            if key not in names:
                raise self.wrong(
                    (*keys, str(key)),
                    f"is no key of a recipe{did_you_mean(str(key), names) or '.'} Keys here: {', '.join(names)}",
                )

    def object(self, data: Any, keys: tuple[str, ...]) -> Mapping[str, Any]:
        if not isinstance(data, Mapping):
            raise self.wrong(keys, f"is {_shown(data)}; it must be an object")
        return data

    def typed(self, data: Mapping[str, Any], name: str, kind: type, keys: tuple[str, ...]) -> Any:
        value = data.get(name)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            words = {str: "text", int: "a whole number"}
            raise self.wrong((*keys, name), f"is {_shown(value)}; it must be {words[kind]}")
        return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
