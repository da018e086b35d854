"""Layers and experts whose weights stay in their stack while a scan runs over the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import q4jax
from q4jax.models import Llama, LlamaConfig, generate
from q4jax.models.decoder.experts_config import ExpertsConfig
from q4jax.models.decoder.scanned import hold_weights
from tests.support.stacks import Stacks

SIZES = (96, 64, 128)
IDS = jax.random.randint(jax.random.key(0), (2, 5), 0, 96)
EXPERTS = ExpertsConfig(3, 2, 64)
SLIDING, FULL = "sliding_attention", "full_attention"
# Layers in one stack; a window in two of three, which run in turn with the third; experts.
CONFIGS = {
    "alike": LlamaConfig(*SIZES, 3, 4, 2, 16),
    "periods": LlamaConfig(
        *SIZES, 6, 4, 2, 16, sliding_window=3, layer_types=(SLIDING, SLIDING, FULL) * 2
    ),
    "experts": LlamaConfig(*SIZES, 2, 4, 2, 16, model_type="mixtral", experts=EXPERTS),
}


@pytest.fixture
def stacks(monkeypatch):
    yield Stacks.register(monkeypatch)
    jax.clear_caches()


def layers_of(model):
    return [m for _, m in nnx.iter_modules(model) if isinstance(m, q4jax.Linear4bit)]


def models(name):
    """A model whose weights a scan cuts, and the same one whose weights stay."""
    dense = Llama(CONFIGS[name], rngs=nnx.Rngs(0))
    cut, kept = q4jax.quantize_model(dense), q4jax.quantize_model(dense)
    for layer in layers_of(kept):
        layer.implementation = "stacks"
    return cut, kept


def adapted(model):
    model = q4jax.add_lora(model, rank=4, alpha=8.0)
    for _, module in nnx.iter_modules(model):
        if hasattr(module, "lora_b"):
            module.lora_b[...] = jax.random.normal(jax.random.key(5), module.lora_b.shape) * 0.1
    return model


@pytest.mark.parametrize(
    "name",
    [
        "alike",
        pytest.param("periods", marks=pytest.mark.heavy),
        pytest.param("experts", marks=pytest.mark.heavy),
    ],
)
def test_logits(stacks, name, forward, relative):
    cut, kept = models(name)
    assert relative(forward(kept, IDS), forward(cut, IDS)) < 1e-5
    leads = {arrays.stack.packed.shape[: len(arrays.indices)] for arrays in stacks.given}
    expected = {"alike": {(3,)}, "periods": {(4,), (2,)}, "experts": {(2,), (2, 3)}}
    assert leads == expected[name]


@pytest.mark.parametrize(
    ("name", "remat"),
    [
        ("alike", True),
        pytest.param("periods", False, marks=pytest.mark.heavy),
        pytest.param("experts", True, marks=pytest.mark.heavy),
    ],
)
def test_adapter_gradients(stacks, name, remat, relative):
    """They are right, and no layer's weights are saved for the backward pass."""

    def grads(model, ids):
        adapters = nnx.DiffState(0, nnx.LoRAParam)
        return nnx.grad(lambda m: jax.nn.logsumexp(m(ids)), argnums=adapters)(model)

    cut, kept = map(adapted, models(name))
    cut.remat = kept.remat = remat
    expected, found = (jax.tree.leaves(nnx.jit(grads)(model, IDS)) for model in (cut, kept))
    assert len(found) == len(expected) > 0
    assert all(jnp.abs(leaf).max() > 0 for leaf in expected)
    assert max(map(relative, found, expected)) < 1e-5
    graphdef, state = nnx.split(kept)
    jaxpr = jax.make_jaxpr(lambda state, ids: grads(nnx.merge(graphdef, state), ids))(state, IDS)
    assert list(scans(jaxpr.jaxpr))
    for scan in scans(jaxpr.jaxpr):
        assert not [v.aval for v in scan.outvars if v.aval.dtype == jnp.uint8], scan.outvars


def scans(jaxpr):
    """The equations of scans, also of those inside of others."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from scans(inner)


@pytest.mark.heavy
def test_generation(stacks):
    """A cache is carried beside the stacks."""
    cut, kept = models("alike")
    np.testing.assert_array_equal(generate(kept, IDS, 3), generate(cut, IDS, 3))


def test_what_is_held(stacks):
    """Only weights of implementations that take stacks; the model itself stays as it is."""
    cut, kept = models("alike")
    assert hold_weights(cut.layers) == (cut.layers, {})
    layers_of(kept)[0].implementation = "xla"
    weights = [layer.weight for layer in layers_of(kept.layers)]
    rest, held = hold_weights(kept.layers)
    assert len(held) == len(weights) - 1
    assert [layer.weight for layer in layers_of(kept.layers)] == weights
    assert sum(layer.weight is None for layer in layers_of(rest)) == len(held)
