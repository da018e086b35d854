"""`add_lora(dora=True)`: the definition, its gradient, and the layers that have none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import q4jax

HIGHEST = jax.lax.Precision.HIGHEST


def adapted(**settings):
    base = q4jax.quantize_model(nnx.Linear(64, 32, rngs=nnx.Rngs(0)))
    return base, q4jax.add_lora(base, 4, 8, dora=True, rngs=nnx.Rngs(1), **settings)


def by_definition(base, model, x):
    """The direction of the adapted weight's columns, with trained norms, in float32."""
    weight = q4jax.dequantize_model(base).kernel[...].astype(jnp.float32)
    update = jnp.matmul(model.lora_a[...], model.lora_b[...], precision=HIGHEST) * model.scale
    whole = weight + update
    whole = model.magnitude[...] * whole / jnp.linalg.norm(whole, axis=0)
    return jnp.matmul(x, whole, precision=HIGHEST) + base.bias[...]


@pytest.mark.parametrize("settings", [{}, {"rslora": True}])
def test_it_is_dora(settings):
    base, model = adapted(**settings)
    x = jax.random.normal(jax.random.key(2), (5, 64))
    np.testing.assert_allclose(model(x), base(x), atol=2e-6)  # fresh adapters change nothing
    model.lora_b[...] = jax.random.normal(jax.random.key(3), model.lora_b.shape) * 0.1
    model.magnitude[...] = model.magnitude[...] * 1.5
    expected = by_definition(base, model, x)
    np.testing.assert_allclose(model(x), expected, atol=2e-5)
    assert np.abs(base(x) - expected).max() > 0.5
    merged = q4jax.merge_lora(model)
    np.testing.assert_allclose(merged(x), expected, atol=2e-5)


def test_magnitudes_are_trained():
    _, model = adapted()
    x = jax.random.normal(jax.random.key(2), (5, 64))
    wrt = nnx.DiffState(0, nnx.LoRAParam)
    grads = nnx.grad(lambda model: jnp.sum(model(x) ** 2), argnums=wrt)(model)
    names = {path[-1] for path, _ in nnx.to_flat_state(grads)}
    assert names == {"lora_a", "lora_b", "magnitude"}
    assert np.abs(grads.magnitude[...]).min() > 0


def test_an_embedding_has_none():
    model = nnx.Dict(embed=nnx.Embed(16, 64, rngs=nnx.Rngs(0)))
    with pytest.raises(NotImplementedError, match="dora: .* has no DoRA adapter; linear layers"):
        q4jax.add_lora(model, 4, 8, dora=True, targets=("embed",))
