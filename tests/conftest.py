"""Options and fixtures that all tests share."""

import jax
import numpy as np
import pytest
from hypothesis import settings

collect_ignore = ["support"]
pytest.register_assert_rewrite("tests.support")

settings.register_profile("q4jax", deadline=None, derandomize=True, max_examples=60, database=None)
settings.load_profile("q4jax")


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=50, help="how often test_kill.py kills a save")
    parser.addoption(
        "--kernel-calls", type=int, default=160, help="of the contract's matrix of over 1000 cases"
    )


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Compiled programs would add up to several GB over the whole suite."""
    yield
    jax.clear_caches()


@pytest.fixture
def rng():
    return np.random.default_rng(20261121)
