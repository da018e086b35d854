"""Builds the CPU kernels where that is possible; pyproject.toml says the rest.

They are one plain shared library, which no Python version is tied to, on x86-64 and aarch64 Linux.
Without a compiler, or without XLA's headers (jaxlib has them), the package is installed without it.
"""

import importlib.util
import os
import pathlib
import platform
import sys

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = pathlib.Path("q4jax/native/src")


def xla_include_dir():
    """Return the folder of XLA's headers, or None."""
    spec = importlib.util.find_spec("jaxlib")
    found = [pathlib.Path(p, "include") for p in (spec.submodule_search_locations if spec else ())]
    return next((str(p) for p in found if (p / "xla/ffi/api/ffi.h").exists()), None)


def extensions():
    """Return the library, or nothing where it cannot be built."""
    served = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
    if not served or xla_include_dir() is None:
        return []
    return [
        Extension(
            "q4jax.native.libq4jax",
            sources=sorted(map(str, SOURCES.glob("*.cc"))),
            depends=sorted(map(str, SOURCES.glob("*.h"))),
            include_dirs=[xla_include_dir()],
            # Contraction would make one rounding of the two that decoding a scale has.
            extra_compile_args=[
                *("-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden"),
                *os.environ.get("Q4JAX_CXXFLAGS", "").split(),
            ],
            extra_link_args=["-pthread", *os.environ.get("Q4JAX_CXXFLAGS", "").split()],
            language="c++",
            optional=True,
        )
    ]


class BuildLibrary(build_ext):
    """The library is loaded with ctypes: its name has no tag of a Python version."""

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".so"


class PlatformWheel(bdist_wheel):
    """One wheel for every Python 3 on a platform."""

    def get_tag(self):
        tag = super().get_tag()
        return ("py3", "none", tag[2]) if self.distribution.ext_modules else tag


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
