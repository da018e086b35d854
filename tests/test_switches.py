"""Public calls under JAX's own switches: promotion, 64-bit types, no `jit`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import q4jax
import q4jax.linen
from q4jax.lora import LoRAEmbedding4bit
from q4jax.models import Llama, LlamaConfig, generate
from q4jax.models.decoder.rope import rotation
from q4jax.models.decoder.rope_scaling import RopeScaling
from q4jax.nnx.variables import from_variables

CONFIG = LlamaConfig(64, 64, 96, 2, 4, 2, 16)
SWITCHES = {
    "rank": lambda: jax.numpy_rank_promotion("raise"),
    "dtype": lambda: jax.numpy_dtype_promotion("strict"),
    "x64": lambda: jax.enable_x64(True),
    "no_jit": lambda: jax.disable_jit(),
}


@pytest.fixture(autouse=True)
def switch(request, few_optimizations):
    with SWITCHES[request.param]():
        yield


def pytest_generate_tests(metafunc):
    """Run each test under each switch."""
    slow = {"no_jit"} if metafunc.function in WITHOUT_JIT_SLOW else set()
    names = [pytest.param(n, marks=[pytest.mark.heavy] * (n in slow)) for n in SWITCHES]
    metafunc.parametrize("switch", names, indirect=True)


def normal(*shape, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape).astype(dtype))


@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.parametrize("columns", [64, 50])
def test_functions(columns, implementation):
    weight = q4jax.Params4bit.quantize(normal(8, columns), 64, True, "nf4")
    x, bias = normal(2, 3, columns), normal(8)

    def matmul(x, bias):
        return q4jax.matmul_4bit(x, weight, bias=bias, implementation=implementation)

    y, vjp = jax.vjp(matmul, x, bias)
    w = np.asarray(weight.dequantize())
    np.testing.assert_allclose(y, x @ w.T + bias[None, None], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(vjp(y)[0], y @ w, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(jax.vmap(matmul, (0, None))(x, bias), y, rtol=1e-6, atol=1e-6)


def test_stacked_weights():
    experts = jax.vmap(lambda w: q4jax.Params4bit.quantize(w, 64, True, "nf4"))(normal(3, 8, 64))
    y = jax.vmap(q4jax.matmul_4bit)(normal(3, 2, 64), experts)
    assert y.shape == (3, 2, 8)
    assert experts.dequantize().shape == (3, 8, 64)


@pytest.mark.parametrize("features", [64, 50])
@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint16", "int32"])
def test_embeddings(features, dtype):
    layer = q4jax.EmbeddingNF4(300, features, rngs=nnx.Rngs(0))
    ids = jnp.asarray(np.array([[1, 2], [3, 99]], dtype))
    table = np.asarray(from_variables(layer.weight).dequantize())
    np.testing.assert_array_equal(layer(ids), table[np.asarray(ids)])
    adapted = LoRAEmbedding4bit(layer, 2, 4, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(adapted(ids), table[np.asarray(ids)])
    layer.attend(normal(2, features))


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_layers_take_float64_too(dtype):
    """What `jnp.ones` makes under x64; numpy makes it always."""
    x, expected = np.ones((2, 3, 64)), jnp.float32 if dtype is None else dtype
    layer = q4jax.Linear4bit(64, 32, dtype=dtype, rngs=nnx.Rngs(0))
    linen = q4jax.linen.Linear4bit(32, dtype=dtype)
    y, _ = linen.init_with_output(jax.random.key(0), x)
    general = q4jax.LinearGeneral4bit(64, (4, 8), dtype=dtype, rngs=nnx.Rngs(0))
    for found in (layer(x), y, general(x), q4jax.add_lora(layer, rank=2, alpha=4)(x)):
        assert found.dtype == expected


def test_adapters():
    model = nnx.Sequential(*(nnx.Linear(64, 64, rngs=nnx.Rngs(i)) for i in range(2)))
    model = q4jax.add_lora(q4jax.quantize_model(model), rank=2, alpha=4)
    x = normal(2, 3, 64)
    nnx.grad(lambda m: (m(x) ** 2).mean(), argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    bank = q4jax.AdapterBank(model, "a")
    bank.add("b")
    bank.set_adapter("b")
    merged, _ = q4jax.merge_lora(model, requantize=True)
    assert q4jax.dequantize_model(merged)(x).shape == x.shape


@pytest.mark.parametrize(
    "dtype",
    [
        None,
        pytest.param(jnp.bfloat16, marks=pytest.mark.heavy),
        pytest.param(jnp.float16, marks=pytest.mark.heavy),
    ],
)
def test_llama_and_generate(dtype):
    model = q4jax.quantize_model(Llama(CONFIG, dtype=dtype, rngs=nnx.Rngs(0)))
    ids = jnp.asarray([[1, 2, 3], [4, 5, 6]], jnp.int8)
    mask = jnp.asarray([[0, 1, 1], [1, 1, 1]])
    assert model(ids, attention_mask=mask).shape == (2, 3, 64)
    assert generate(model, [[1, 2, 3], [4]], 2).shape == (2, 5)
    sampling = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "rng": jax.random.key(0)}
    assert generate(model, ids, 2, **sampling).shape == (2, 5)


@pytest.mark.slow
def test_positions_of_a_small_dtype():
    config = LlamaConfig(
        64,
        64,
        96,
        2,
        4,
        2,
        16,
        max_position_embeddings=64,
        rope_scaling=RopeScaling("dynamic", 2.0),
    )
    model = Llama(config, rngs=nnx.Rngs(0))
    ids, positions = jnp.zeros((1, 128), jnp.int32), np.arange(128)[None]
    rope = config.decoder.layers[0].mixer.rope
    expected = rotation(jnp.asarray(positions, jnp.int32), rope)
    assert all(map(np.array_equal, rotation(jnp.asarray(positions, jnp.int8), rope), expected))
    logits = [model(ids, jnp.asarray(positions, d)) for d in (jnp.int8, jnp.int32)]
    np.testing.assert_array_equal(*logits)


WITHOUT_JIT_SLOW = (test_llama_and_generate, test_positions_of_a_small_dtype)
