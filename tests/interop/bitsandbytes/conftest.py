"""A 4-bit weight and its state dict."""

import jax
import numpy as np
import pytest

from q4jax import Params4bit


@pytest.fixture(scope="module")
def weight():
    w = jax.random.normal(jax.random.key(0), (96, 128))
    return Params4bit.quantize(w, quant_type="nf4", compress_statistics=True)


@pytest.fixture(scope="module")
def state_dict(weight):
    return weight.state_dict("layer.weight") | {"layer.bias": np.ones(96, np.float32)}
