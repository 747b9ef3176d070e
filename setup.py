"""Builds the optional native CPU kernels. Everything else about the package is in pyproject.toml.

The kernels are one plain shared library behind a C ABI: no Python headers, no libtorch, so one build serves every Python.
A machine without a C++ compiler, or with one too old for some instructions, installs and works; it multiplies more slowly.
`anybit doctor` says what is missing. ANYBIT_SKIP_NATIVE=1 skips the build.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("src/anybit/kernels/cpu/csrc")
UNIX_FLAGS = [
    "-O3",
    "-std=c++17",
    "-fno-rtti",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-g0",
]
MSVC_FLAGS = ["/O2", "/std:c++17", "/fp:precise"]
# Gcc warns about its own AVX-512 headers, and about a vector type that no interface of ours passes.
QUIET = ["-Wno-uninitialized", "-Wno-psabi"]

AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
# variant -> its flags; its files are named after it, and left out if the compiler cannot build them
VARIANTS = {
    "x86": {
        "avx2": AVX2,
        "avx512": AVX512,
        "avx512vbmi": [*AVX512, "-mavx512bf16", "-mavx512vbmi", "-mavx512vnni"],
    },
    "arm": {"neon": []},  # every 64-bit processor has it
    "other": {},
}


DRIVERS = ["driver.cpp", "encode_driver.cpp", "sparse.cpp", "threads.cpp"]


def _files(variant: str) -> list[str]:
    """Source files of one variant."""
    return [path.name for path in sorted(SOURCES.glob(f"*_{variant}.cpp"))]


def _machine() -> str:
    """What the code is built for; a universal macOS build gets no variants."""
    architectures = os.environ.get("ARCHFLAGS", "").split()
    known = {"x86_64": "x86", "amd64": "x86", "arm64": "arm", "aarch64": "arm"}
    wanted = {known[name] for name in architectures if name in known}
    if len(wanted) > 1:
        return "other"
    return wanted.pop() if wanted else known.get(platform.machine().lower(), "other")


class OptionalNative(build_ext):
    """Builds what the compiler at hand can build, and never fails the install."""

    def get_ext_filename(self, fullname: str) -> str:
        suffix = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
        return os.path.join(*fullname.split(".")) + suffix

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []  # the functions say themselves that they are exported; there is no PyInit

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        if os.environ.get("ANYBIT_SKIP_NATIVE") == "1":
            self.warn("anybit: native CPU kernels skipped (ANYBIT_SKIP_NATIVE=1)")
            return
        try:
            self._build(target)
        except Exception as error:  # whatever a missing or broken compiler does
            self.warn(f"anybit: native CPU kernels are not built ({error}); everything works, more slowly")

    def _build(self, target: Path) -> None:
        unix = self.compiler.compiler_type == "unix"
        common = [*UNIX_FLAGS, *QUIET] if unix else MSVC_FLAGS
        folder = Path(self.build_temp) / "anybit_cpu"
        objects, found = [], []
        variants = VARIANTS[_machine()] if unix else {}
        if variants:
            with ThreadPoolExecutor(os.cpu_count() or 1) as at_once:
                built = {
                    name: at_once.submit(self._compile, folder, _files(name), [*common, *flags])
                    for name, flags in variants.items()
                }
            for name, result in built.items():
                try:
                    objects += result.result()
                    found.append(name)
                except Exception as error:
                    self.warn(f"anybit: no {name} kernels, the compiler cannot build them ({error})")
        macros = [(f"ANYBIT_WITH_{name.upper()}", "1") for name in found]
        objects += self._compile(folder, [*_files("scalar"), *DRIVERS], common, macros)
        target.parent.mkdir(parents=True, exist_ok=True)
        # linked beside the target and moved over it: a process that has the old library loaded keeps it
        with tempfile.TemporaryDirectory(dir=target.parent) as beside:
            fresh = Path(beside) / target.name
            libraries = ["pthread"] if sys.platform.startswith("linux") else []
            self.compiler.link_shared_object(objects, str(fresh), libraries=libraries, target_lang="c++")
            os.replace(fresh, target)

    def _compile(
        self, folder: Path, names: list[str], flags: list[str], macros: list[tuple[str, str]] | None = None
    ) -> list[str]:
        found: list[str] = self.compiler.compile(
            [str(SOURCES / name) for name in names],
            output_dir=str(folder),
            macros=macros or [],
            include_dirs=[str(SOURCES)],
            extra_postargs=flags,
            depends=[str(path) for path in SOURCES.glob("*")],
        )
        return found


def commands() -> dict[str, type]:
    """The build step, and wheels that say they fit every Python 3 of the platform."""
    found: dict[str, type] = {"build_ext": OptionalNative}
    try:
        from setuptools.command.bdist_wheel import bdist_wheel
    except ImportError:  # setuptools before 70.1
        return found

    class PlatformWheel(bdist_wheel):
        def get_tag(self) -> tuple[str, str, str]:
            return ("py3", "none", super().get_tag()[2])

    return {**found, "bdist_wheel": PlatformWheel}


native = Extension(
    "anybit.kernels.cpu.libanybit_cpu",
    sources=[str(path) for path in sorted(SOURCES.glob("*.cpp"))],
    depends=[str(path) for path in sorted(SOURCES.glob("*.h"))],
    optional=True,
)
setup(ext_modules=[native], cmdclass=commands())
