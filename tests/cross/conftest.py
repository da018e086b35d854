"""Tests against torch, bitsandbytes, transformers and PEFT; skipped where one does not import."""

import importlib
import warnings

import pytest


def why_not():
    """The reason why the libraries cannot be used, or None."""
    for name in ("torch", "bitsandbytes", "transformers", "peft"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module(name)
        except Exception as error:
            return f"the extra `cross` is not installed: {name}: {error}"
    return None


def pytest_collection_modifyitems(items):
    mine = [item for item in items if "tests/cross" in item.path.as_posix()]
    reason = why_not() if mine else None
    for item in mine:
        item.add_marker(pytest.mark.filterwarnings("ignore"))  # theirs
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))
