"""Programs do not grow with depth: layers are scanned."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import q4jax
from q4jax.models import Llama
from q4jax.models.decoder.config import ExpertsConfig
from q4jax.models.decoder.kv_cache import KVCache

SHALLOW, DEEP = 4, 32


@pytest.fixture(scope="module", params=["dense", "4-bit", "experts"])
def programs(request, config):
    """Return the decoding step and its abstract arguments by number of layers."""
    wide = dataclasses.replace(config, hidden_size=64, intermediate_size=128, head_dim=16)
    if request.param == "experts":
        wide = dataclasses.replace(wide, experts=ExpertsConfig(4, 2, 64), sliding_window=8)
    found = {}
    for layers in (SHALLOW, DEEP):
        deep = dataclasses.replace(wide, num_hidden_layers=layers)

        def make(deep=deep):
            model = Llama(deep, rngs=nnx.Rngs(0))
            return model if request.param == "dense" else q4jax.quantize_model(model)

        abstract = nnx.eval_shape(make)
        graphdef, state = nnx.split(abstract)
        stacks = abstract.stacks
        cache = jax.eval_shape(lambda s=stacks: KVCache.empty(s, 1, 16, jnp.float32))

        def step(state, ids, cache, graphdef=graphdef):
            model = nnx.merge(graphdef, state)
            hidden, cache = model.hidden_states(ids, cache=cache)
            return model.logits(hidden), cache

        ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        found[layers] = step, (state, ids, cache)
    return found


def instructions(compiled):
    return sum(" = " in line for line in compiled.as_text().splitlines())


def test_the_program_does_not_grow_with_depth(programs):
    lowered = {n: jax.jit(step).lower(*shapes) for n, (step, shapes) in programs.items()}
    shallow, deep = (len(lowered[n].as_text().splitlines()) for n in (SHALLOW, DEEP))
    assert deep == shallow
    counts = {layers: instructions(program.compile()) for layers, program in lowered.items()}
    assert counts[DEEP] <= 1.05 * counts[SHALLOW]
