"""What keeps a model's activations split by batch leaves no trace on one device."""

import jax
import jax.numpy as jnp
import numpy as np

from q4jax.sharding.residual import outputs_are_whole, whole_features, whole_outputs


def test_the_identity_and_its_gradient():
    x = jnp.arange(24.0).reshape(2, 3, 4)
    np.testing.assert_array_equal(whole_features(x), x)
    np.testing.assert_array_equal(jax.grad(lambda x: (whole_features(x) ** 2).sum())(x), 2 * x)
    np.testing.assert_array_equal(jax.jit(jax.vmap(whole_features))(x), x)
    text = jax.jit(whole_features).lower(x).as_text()
    assert "custom_call" not in text


def test_the_scope_ends():
    assert not outputs_are_whole()
    with whole_outputs():
        assert outputs_are_whole()
    assert not outputs_are_whole()
