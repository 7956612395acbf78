"""Runs CMake and packs the C libraries; everything else is in pyproject.toml.

Environment: SPO_FAST_BUILD_CUDA=0 builds the CPU library only, =1 makes a missing nvcc an error (default: CUDA if nvcc
is found); SPO_FAST_CUDA_ARCHS="90" builds for fewer cards, quicker; CMAKE_ARGS is passed on.
"""

from __future__ import annotations

import atexit
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools < 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).parent.resolve()
CUDA_SWITCH = {"": "AUTO", "0": "OFF", "1": "ON"}


def cmake_executable() -> str:
    """The pip package's cmake (a build requirement), else the one on PATH."""
    try:
        import cmake

        return str(Path(cmake.CMAKE_BIN_DIR) / "cmake")
    except ImportError:
        found = shutil.which("cmake")
    if found is None:
        raise RuntimeError("no cmake found: `pip install cmake`, or build without --no-build-isolation")
    return found


def cmake_options() -> list[str]:
    """-D options from the environment."""
    switch = os.environ.get("SPO_FAST_BUILD_CUDA", "")
    if switch not in CUDA_SWITCH:
        raise SystemExit(
            f"SPO_FAST_BUILD_CUDA={switch!r} is unknown: use 0 (CPU only), 1 (nvcc required) or leave it unset"
        )
    options = [f"-DSPO_FAST_BUILD_CUDA={CUDA_SWITCH[switch]}"]
    architectures = os.environ.get("SPO_FAST_CUDA_ARCHS")
    if architectures:
        options.append(f"-DSPO_FAST_CUDA_ARCHS={';'.join(architectures.replace(',', ';').split())}")
    return options + shlex.split(os.environ.get("CMAKE_ARGS", ""))


def run(what: str, command: list[str]) -> None:
    """A failed CUDA compile ends the installation: falling back to the CPU library would show only much later."""
    if subprocess.run(command, check=False).returncode != 0:
        way_out = "" if what == "the CPU library" else "; SPO_FAST_BUILD_CUDA=0 builds without CUDA"
        raise SystemExit(f"spo_fast: {what} failed, the reason stands above{way_out}")


def build_libraries(target: Path) -> None:
    """Build csrc/ and put libspo_fast_*.so into `target`, in place of what was there."""
    # A fresh folder each time: a CMake cache remembers the cmake of a build environment that pip has deleted.
    with tempfile.TemporaryDirectory(prefix="spo_fast-build-") as build:
        cmake = cmake_executable()
        parallel = ["--parallel", str(os.cpu_count() or 1)]
        run("configuring", [cmake, "-S", str(ROOT), "-B", build, *cmake_options()])
        run("the CPU library", [cmake, "--build", build, *parallel, "--target", "spo_fast_cpu"])
        run("the CUDA library", [cmake, "--build", build, *parallel])
        target.mkdir(parents=True, exist_ok=True)
        for old in target.glob("libspo_fast_*.so"):
            old.unlink()
        for library in sorted((Path(build) / "lib").glob("libspo_fast_*.so")):
            # Renamed into place: a process that has the old file mapped keeps it whole.
            shutil.copy2(library, target / f".{library.name}")
            (target / f".{library.name}").replace(target / library.name)


class BuildWithCMake(build_py):
    """build_py, then the C libraries: in the source tree for `pip install -e .`, else in the build folder."""

    def run(self) -> None:
        super().run()
        build_libraries((ROOT if self.editable_mode else Path(self.build_lib).resolve()) / "spo_fast" / "lib")


class PlatformWheel(bdist_wheel):
    """py3-none-<platform>: machine code inside, but no Python ABI."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class PlatformDistribution(Distribution):
    """Machine code inside: installed as platlib, tagged with a platform."""

    def has_ext_modules(self) -> bool:
        return True


def outside_the_source() -> dict[str, dict[str, str]]:
    """Where setuptools keeps its files while it builds: not in the source tree, which may be read-only."""
    if "sdist" in sys.argv:  # packs what egg_info leaves in the tree
        return {}
    scratch = tempfile.mkdtemp(prefix="spo_fast-setup-")
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    return {"egg_info": {"egg_base": scratch}, "build": {"build_base": scratch}}


setup(
    distclass=PlatformDistribution,
    cmdclass={"build_py": BuildWithCMake, "bdist_wheel": PlatformWheel},
    options=outside_the_source(),
)
