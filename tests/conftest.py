"""Puts the helpers that tests share on the path."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import settings

for folder in ("", "pallas", "gpu", "native", "emulated", "distributed", "../benchmarks"):
    sys.path.insert(0, str(Path(__file__).parent / folder))

# Changes Triton for all that imports it; for processes of its own.
collect_ignore = ["gpu/triton_interpreter.py"]

settings.register_profile("q4jax", deadline=None, derandomize=True, max_examples=60, database=None)
settings.load_profile("q4jax")


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=50, help="how often test_kill.py kills a save")
    parser.addoption(
        "--kernel-calls", type=int, default=256, help="of the Pallas kernels; there are over 1000"
    )


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Compiled programs would add up to several GB over the whole suite."""
    yield
    jax.clear_caches()


@pytest.fixture
def rng():
    return np.random.default_rng(20261121)
