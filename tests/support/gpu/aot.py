"""What tests of compiled GPU code share: the mark of the extra that they need, and the compiler."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

from q4jax.triton import requirements

ROOT = pathlib.Path(__file__).parents[3]


def needs_aot(*others):
    """The marks of tests that need the extra `aot`, and other packages."""
    packages = ("jax_cuda13_plugin", *others, "nvidia")
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    reason = f"needs the extra aot; not installed: {missing}"
    return [pytest.mark.heavy, pytest.mark.skipif(bool(missing), reason=reason)]


def compiles_triton():
    """The mark of tests for which jax-triton compiles kernels."""
    missing = requirements._missing()
    return pytest.mark.skipif(
        bool(missing) or not importlib.util.find_spec("jax_cuda13_plugin"),
        reason=missing or "needs the extra cuda",
    )


def run_compiler(module, *arguments):
    """What a module that compiles for a GPU prints, in a process of its own, as JSON has it."""
    command = [sys.executable, "-m", f"tests.support.gpu.{module}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
