"""These tests need eight devices: tests/test_distributed.py runs them in processes that have."""

import os
from pathlib import Path

import pytest
from collectives import Collective, collectives  # on the path by tests/conftest.py


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Only where the process was started for them."""
    alone = "Q4JAX_TEST_DEVICES" not in os.environ
    return True if alone and collection_path.name.startswith("test_") else None


@pytest.fixture
def moved():
    """What a compiled program moves between devices."""

    def of(function, *args) -> list[Collective]:
        return collectives(function.lower(*args).compile().as_text())

    return of
