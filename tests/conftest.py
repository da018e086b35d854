"""Puts the shared helpers of the tests, `oracle` and `vectors`, on the path."""

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

# Changes Triton for all that imports it; for processes of its own.
collect_ignore = ["gpu/triton_interpreter.py"]

sys.path.insert(0, str(Path(__file__).parent))

settings.register_profile("q4jax", deadline=None, derandomize=True, max_examples=60, database=None)
settings.load_profile("q4jax")


@pytest.fixture
def rng():
    return np.random.default_rng(20261121)
