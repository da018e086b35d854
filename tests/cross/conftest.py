"""Tests against third-party packages, each skipped if a package does not import."""

import functools
import importlib
import warnings

import pytest

DEFAULT = ("torch", "bitsandbytes", "transformers", "peft")
NEEDS = {"test_gemma.py": ("gemma",)}


@functools.cache
def unsupported_reason(names):
    """Return why the packages cannot be used, or None."""
    for name in names:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module(name)
        except Exception as error:
            return f"not installed (extras `cross` and `gemma`): {name}: {error}"
    return None


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/cross" not in item.path.as_posix():
            continue
        reason = unsupported_reason(NEEDS.get(item.path.name, DEFAULT))
        item.add_marker(pytest.mark.filterwarnings("ignore"))  # of the packages
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))
