"""Fixtures of a tiny Llama, and of how models are compiled."""

import pytest

from tests.support.tiny_llama import config, forward, input_ids, model, relative

__all__ = ["config", "forward", "input_ids", "model", "relative"]


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly(few_optimizations):
    """Most tests here compile much, and compare results."""
