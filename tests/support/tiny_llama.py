"""Fixtures of the model tests: a tiny random Llama and ways to call and compare it."""

import jax
import numpy as np
import pytest
from flax import nnx

from q4jax.models import Llama, LlamaConfig

TINY = LlamaConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)


@pytest.fixture(scope="session")
def config():
    return TINY


@pytest.fixture(scope="session")
def model():
    return Llama(TINY, rngs=nnx.Rngs(1))


@pytest.fixture(scope="session")
def input_ids():
    return jax.random.randint(jax.random.key(0), (2, 11), 0, TINY.vocab_size)


@pytest.fixture(scope="session")
def forward():
    """The model's logits, compiled once per structure and shape."""
    return nnx.jit(lambda model, *args, **kwargs: model(*args, **kwargs))


@pytest.fixture(scope="session")
def relative():
    """max |a - b| over the largest |b|."""

    def measure(a, b):
        return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())

    return measure
