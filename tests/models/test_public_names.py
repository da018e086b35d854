"""Public names of `q4jax.models`."""

import pickle

import pytest

from q4jax import models


def test_names_do_not_depend_on_files():
    for name in models.__all__:
        public = getattr(models, name)
        assert public.__module__ == "q4jax.models"
        assert pickle.loads(pickle.dumps(public)) is public


def test_the_old_name_warns():
    with pytest.warns(DeprecationWarning, match="from_tensors is now from_state_dict"):
        assert models.from_tensors is models.from_state_dict
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        _ = models.other
