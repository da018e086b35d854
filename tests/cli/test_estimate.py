"""`python -m q4jax estimate` against what arrays and the compiled step take."""

import json
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import q4jax
from q4jax.finetune.memory import estimate
from q4jax.finetune.optimizer import make_optimizer
from q4jax.finetune.placement import Placement
from q4jax.finetune.settings import Settings
from q4jax.finetune.step import compile_step
from q4jax.models import Llama, LlamaConfig
from q4jax.models.decoder.kv_cache import KVCache

ENTRIES = {
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "dtype": "bfloat16",
}
SETTINGS = Settings(model=None, length=128, batch=2, rank=8)


def nbytes(tree):
    leaves = jax.tree.leaves(tree)
    return sum(a.nbytes for a in leaves if not jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key))


@pytest.mark.heavy
def test_the_parts_are_those_of_arrays_and_of_the_compiled_step():
    found = estimate(ENTRIES, SETTINGS)
    dtypes = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    model = Llama(LlamaConfig.from_hf(ENTRIES), rngs=nnx.Rngs(0), remat="layer", **dtypes)
    model = q4jax.add_lora(q4jax.quantize_model(model), 8, 16.0)
    optimizer = make_optimizer(model, SETTINGS)
    _, adapters, weights = nnx.split(model, nnx.LoRAParam, ...)
    assert found.training["weights"] == pytest.approx(nbytes(weights), rel=1e-4)
    assert found.training["adapters"] == nbytes(adapters)
    moments = nbytes(nnx.state(optimizer))
    assert found.training["moments of the optimizer"] == pytest.approx(moments, rel=1e-4)
    cache = KVCache.empty(model.stacks, 1, 128, jnp.bfloat16)
    assert found.generating["cache of one text"] == nbytes(cache)

    shape = (1, 2, 128)
    batch = {name: jnp.zeros(shape, jnp.int32) for name in ("inputs", "targets", "segments")}
    batch["weights"] = jnp.ones(shape)
    memory = compile_step(model, optimizer, batch, Placement(None)).memory_analysis()
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    total += memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert sum(found.training.values()) == pytest.approx(total, rel=0.05)
    # Frozen weights are no result of the step.
    assert memory.output_size_in_bytes < 1.1 * (nbytes(adapters) + moments)


@pytest.mark.heavy
def test_a_longer_context_takes_more_and_the_weights_stay():
    short, long = (
        estimate(ENTRIES, Settings(model=None, length=length, batch=1)) for length in (64, 256)
    )
    assert short.training["weights"] == long.training["weights"]
    assert long.generating["cache of one text"] == pytest.approx(
        4 * short.generating["cache of one text"], rel=0.01
    )
    name = "activations: inputs of layers"
    assert long.training[name] == 4 * short.training[name]
    assert sum(long.training.values()) > sum(short.training.values())


def test_the_command(run, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(ENTRIES))
    code, out, err = run("estimate", file, "--context", 64)
    assert (code, err) == (0, "")
    totals = [float(text) for text in re.findall(r"total +([\d.]+)", out)]
    parts = [float(text) for text in re.findall(r"  [a-z].* ([\d.]+)$", out, re.MULTILINE)]
    assert len(totals) == 2
    assert sum(parts) == pytest.approx(2 * sum(totals), abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--context", "1"], "--context must be at least 2, got 1"),
        (["--context", "9", "--rank", "0"], "--rank must be an integer of at least 1, got 0"),
        (["--context", "9", "--mesh", "fsdp"], "--mesh must be like fsdp=4,tensor=2, got 'fsdp'"),
        ([], "the following arguments are required: --context"),
    ],
)
def test_a_wrong_option_is_one_line(run, tmp_path, arguments, message):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(ENTRIES))
    code, out, err = run("estimate", file, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_a_wrong_config_is_one_line(run, tmp_path):
    code, _, err = run("estimate", "/nowhere", "--context", 9)
    assert (code, "there is no /nowhere" in err, err.count("\n")) == (2, True, 1)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**ENTRIES, "hidden_size": "x"}))
    code, _, err = run("estimate", file, "--context", 9)
    assert (code, "hidden_size" in err, err.count("\n")) == (2, True, 1)


@pytest.mark.heavy
def test_llama_3_8b_is_within_5_percent_of_a_step_that_is_written_apart():
    """The step of `benchmarks/scale.py --memory` donates its arguments, and is no part of q4jax."""
    import step_memory

    entries = step_memory.LLAMA_3_8B.to_hf() | {"dtype": "bfloat16"}
    settings = Settings(model=None, length=step_memory.LENGTH, batch=1, rank=step_memory.RANK)
    measured = step_memory.measure(blocks=True, gpu=False)
    found = estimate(entries, settings).training
    assert found["weights"] == pytest.approx(measured["weights"], rel=1e-4)
    assert sum(found.values()) == pytest.approx(sum(measured.values()), rel=0.05)
