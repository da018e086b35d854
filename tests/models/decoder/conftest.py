"""Models with the weights of transformers' vectors."""

import pytest

from q4jax.models import from_pretrained
from tests.support.random_weights import write_directory


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """case -> (folder, model, vectors), each read once."""
    found = {}

    def load(case):
        if case not in found:
            folder = tmp_path_factory.mktemp(case)
            vectors = write_directory(case, folder)
            found[case] = folder, from_pretrained(folder), vectors
        return found[case]

    return load
