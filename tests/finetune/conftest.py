"""A tiny model and files of documents."""

import importlib.util
import json

import pytest

# The extra `test` brings these packages; an environment without them leaves the tests out.
NEEDED = ("tokenizers", "jinja2", "grain")
if any(importlib.util.find_spec(package) is None for package in NEEDED):
    collect_ignore_glob = ["test_*.py"]

TEXT = "The quick brown fox jumps over the lazy dog. " * 40


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Return the directory of a random Llama with a tokenizer of bytes."""
    from tests.support import tiny_hub_model

    return tiny_hub_model.write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """Return a file of text."""
    file = tmp_path_factory.mktemp("data") / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture
def lines(tmp_path):
    """Return a function that writes objects as JSON lines."""

    def write(*objects, name="data.jsonl"):
        file = tmp_path / name
        file.write_text("".join(f"{json.dumps(entry)}\n" for entry in objects))
        return str(file)

    return write
