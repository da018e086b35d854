"""What the backward pass computes again, by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from q4jax.models import Llama, LlamaConfig
from tests.support.optimizations import optimizations

CONFIG = LlamaConfig(97, 64, 192, 3, 4, 2, 16, max_position_embeddings=256)
KEPT_MORE_AND_MORE = ("layer", "attention", "projections", None)


@pytest.fixture(scope="module", params=["whole", pytest.param("blocks", marks=pytest.mark.heavy)])
def measured(request):
    """setting -> (gradients, temporary bytes)."""
    ids = jax.random.randint(jax.random.key(0), (2, 256), 0, 97)
    model = Llama(CONFIG, attention=request.param, rngs=nnx.Rngs(0))
    found = {}
    for remat in KEPT_MORE_AND_MORE:
        model.remat = remat
        step = nnx.jit(nnx.grad(lambda model, ids: model.loss(ids)))
        with optimizations(few=False):
            compiled = step.lower(model, ids).compile()
        memory = compiled.memory_analysis().temp_size_in_bytes
        found[remat] = jax.tree.leaves(compiled(model, ids)), memory
    return found


def test_each_setting_has_the_same_gradients_and_its_memory(measured):
    expected, _ = measured[None]
    for remat in KEPT_MORE_AND_MORE:
        for one, other in zip(measured[remat][0], expected, strict=True):
            assert np.abs(one - other).max() <= 2e-6 * np.abs(other).max()
    memory = [measured[remat][1] for remat in KEPT_MORE_AND_MORE]
    assert memory == sorted(memory) and len(set(memory)) == 4, memory


def test_an_unknown_name_is_an_error():
    model = Llama(CONFIG, remat="dots", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="remat must be a bool or one of .*, got 'dots'"):
        model(jnp.ones((1, 3), int))
