"""Everything anybit raises on purpose.

AnybitError
 +-- ConfigError (ValueError)          a configuration that cannot be meant
 |    +-- UnknownMethod                no such quant_method; names the closest and lists all
 |    +-- InvalidOption                an option's value or name is wrong
 +-- CheckpointError (ValueError)      a file or tensor that cannot be right
 |    +-- CorruptFile                  truncated, overlapping, malformed
 |    +-- MissingTensor                a needed tensor is not stored
 |    +-- UnexpectedTensor             a stored tensor that nothing consumes
 |    +-- ShapeMismatch                a tensor's shape or dtype contradicts config or neighbours
 |    +-- UnsafeFile                   code, pickle, or a path that leaves the folder
 +-- NotRepresentable (ValueError)     this weight cannot be written in that layout without loss
 +-- NoKernel (RuntimeError)           nothing here can multiply with this weight; lists every refusal
 +-- MissingDependency (ImportError)   an optional package is absent; carries the pip line
 +-- CalibrationNeeded (ValueError)    the method cannot be created from weights alone
 +-- WriteError (OSError)              the output cannot be written: disk full, no permission; `errno` says which
 +-- PluginError                       a plugin's own import or registration failed

A message says what, where (module, tensor, file), why (the numbers) and what the reader can do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


class AnybitError(Exception):
    """Base of every error raised on purpose by anybit."""


class ConfigError(AnybitError, ValueError):
    """A configuration that cannot be meant."""


class UnknownMethod(ConfigError):
    """No such quantization method."""

    def __init__(self, method: object, known: Iterable[str]):
        names = sorted(known)
        closest = did_you_mean(str(method), names) or "."
        super().__init__(f"unknown quantization method {method!r}{closest} Supported methods: {', '.join(names)}")


class InvalidOption(ConfigError):
    """An option's name or value is wrong."""


class CheckpointError(AnybitError, ValueError):
    """A file or tensor that cannot be right."""


class CorruptFile(CheckpointError):
    """Truncated, overlapping, overflowing or malformed."""


class MissingTensor(CheckpointError):
    """A needed tensor is not stored."""


class UnexpectedTensor(CheckpointError):
    """A stored tensor that nothing consumes."""


class ShapeMismatch(CheckpointError):
    """A tensor's shape or dtype contradicts the configuration or its neighbours."""


class UnsafeFile(CheckpointError):
    """Code, an unrestricted pickle, or a path that leaves the model folder."""


class NotRepresentable(AnybitError, ValueError):
    """This weight cannot be written in that layout without loss."""


class NoKernel(AnybitError, RuntimeError):
    """No kernel accepts this weight on this device."""


class MissingDependency(AnybitError, ImportError):
    """An optional package is absent."""

    def __init__(self, what: str, package: str, extra: str | None = None):
        line = f"pip install 'anybit[{extra}]'" if extra else f"pip install {package}"
        super().__init__(f"{what} needs the package {package!r}, which is not installed. Install it: {line}")
        self.package = package


class CalibrationNeeded(AnybitError, ValueError):
    """The method cannot be created from weights alone."""


class WriteError(AnybitError, OSError):
    """The output cannot be written. `errno` is the system's reason."""

    def __init__(self, message: str, errno: int | None = None):
        super().__init__(message)
        self.errno = errno


class PluginError(AnybitError):
    """A plugin could not be imported or registered."""


def located(error: AnybitError, where: object) -> AnybitError:
    """The same error with a place (a file, a module) in front of its message."""
    error.args = (f"{where}: {error}",)
    return error


def did_you_mean(given: str, names: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the closest of `names`, or an empty string."""
    import difflib

    by_lower = {name.lower(): name for name in names}
    close = difflib.get_close_matches(given.lower(), by_lower, n=1, cutoff=0.6)
    return f"; did you mean {by_lower[close[0]]!r}?" if close else ""


def near_path(path: Path) -> str:
    """`did_you_mean` for a path that does not exist, among what lies beside it."""
    try:
        beside = [str(path.parent / one.name) for one in path.parent.iterdir()]
    except OSError:
        return ""
    return did_you_mean(str(path), beside)
