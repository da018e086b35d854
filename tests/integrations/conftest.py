"""Tests with trainers of other packages, each skipped where a package is not installed."""

import importlib.util

import pytest

NEEDS = {"test_tunix.py": ("tunix",), "test_tunix_and_peft.py": ("tunix", "torch", "peft")}


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/integrations" not in item.path.as_posix():
            continue
        item.add_marker(pytest.mark.filterwarnings("ignore"))  # of the packages
        missing = [n for n in NEEDS.get(item.path.name, ()) if importlib.util.find_spec(n) is None]
        if missing:
            reason = f"not installed (extra `trainers`; torch apart): {', '.join(missing)}"
            item.add_marker(pytest.mark.skip(reason=reason))
