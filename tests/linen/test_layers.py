"""The Linen layers: what they compute, what they store, and what they refuse."""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState

import q4jax
from q4jax import linen

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (3, 128))
LAYER = linen.LinearNF4(64)


def leaves_equal(a, b):
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype and bool((a == b).all()), a, b)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(jax.tree.leaves(same))


class Block(nn.Module):
    linear: type = linen.LinearNF4

    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.tanh(self.linear(128, name="up")(x)), None


class Stack(nn.Module):
    remat: bool = False
    linear: type = linen.LinearNF4

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        axes = {"params": 0, "quant": 0}
        scan = nn.scan(block, variable_axes=axes, split_rngs={"params": True}, length=4)
        return scan(self.linear, name="blocks")(x, None)[0]


@functools.cache
def stack_variables():
    return Stack().init(KEY, X)


@pytest.mark.parametrize(
    ("dtype", "x_dtype"),
    [(None, jnp.bfloat16), (jnp.float32, jnp.bfloat16), (jnp.float16, jnp.float32)],
)
def test_forward_is_matmul_of_the_stored_weight(dtype, x_dtype):
    layer = linen.Linear4bit(64, dtype=dtype, bias_init=nn.initializers.normal())
    variables = layer.init(KEY, X)
    x = X.reshape(3, 1, 128).astype(x_dtype)
    compute = x.astype(dtype or x_dtype)
    expected = q4jax.matmul_4bit(
        compute, variables["quant"]["weight"], bias=variables["params"]["bias"]
    )
    y = layer.apply(variables, x)
    assert y.dtype == compute.dtype
    assert y.shape == (3, 1, 64)
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize(
    ("cls", "param_dtype", "width", "nested"),
    [
        (linen.LinearNF4, jnp.float32, 128, True),
        (linen.LinearFP4, jnp.bfloat16, 128, False),
        (linen.LinearNF4, jnp.float16, 100, True),
    ],
)
def test_init_has_the_weights_of_dense(cls, param_dtype, width, nested):
    x, bias_init = X[:, :width], nn.initializers.normal()
    dense = nn.Dense(64, param_dtype=param_dtype, bias_init=bias_init).init(KEY, x)["params"]
    layer = cls(64, param_dtype=param_dtype, compress_statistics=nested, bias_init=bias_init)
    variables = layer.init(KEY, x)
    expected = q4jax.Params4bit.quantize(
        dense["kernel"].T, quant_type=layer.quant_type, compress_statistics=nested
    )
    assert leaves_equal(variables["quant"]["weight"], expected)
    assert leaves_equal(variables["params"], {"bias": dense["bias"]})


def test_fields_of_the_twins():
    assert linen.LinearNF4(8).quant_type == linen.EmbeddingNF4(8, 64).quant_type == "nf4"
    assert linen.LinearFP4(8).quant_type == linen.EmbeddingFP4(8, 64).quant_type == "fp4"
    assert linen.LinearNF4(8).copy(blocksize=32).quant_type == "nf4"
    with pytest.raises(TypeError, match="quant_type"):
        linen.LinearNF4(8, quant_type="fp4")
    assert "params" not in linen.LinearNF4(64, use_bias=False).init(KEY, X)


def test_nothing_in_params_is_quantized():
    variables = stack_variables()
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables["params"])} == {"float32"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables["quant"])} == {"uint8", "float32"}


def test_training_leaves_codes_alone():
    model = Stack()
    variables = stack_variables()
    quant = jax.tree.map(jnp.copy, variables["quant"])

    class State(TrainState):
        quant: dict

    tx = optax.adamw(1e-1, weight_decay=0.5)
    state = State.create(
        apply_fn=model.apply, params=variables["params"], tx=tx, quant=variables["quant"]
    )

    def loss(params, quant):
        return jnp.square(model.apply({"params": params, "quant": quant}, X)).mean()

    @jax.jit
    def step(state):
        value, grads = jax.value_and_grad(loss)(state.params, state.quant)
        return state.apply_gradients(grads=grads), value

    losses = []
    for _ in range(5):
        state, value = step(state)
        losses.append(float(value))
    assert losses == sorted(losses, reverse=True)
    assert leaves_equal(state.quant, quant)
    assert not leaves_equal(state.params, variables["params"])


@pytest.mark.parametrize("remat", [False, True])
def test_scan_equals_a_loop(remat):
    model = Stack(remat)
    variables = jax.jit(model.init)(KEY, X) if remat else stack_variables()
    weight = variables["quant"]["blocks"]["up"]["weight"]
    assert weight.quant_state.lead == (4,)
    assert not (weight.packed[0] == weight.packed[1]).all()

    def one(i, tree):
        return {name: jax.tree.map(lambda v: v[i], part)["blocks"] for name, part in tree.items()}

    x = X
    for i in range(4):
        x, _ = Block().apply(one(i, variables), x)
    np.testing.assert_allclose(jax.jit(model.apply)(variables, X), x, rtol=1e-5, atol=1e-5)
    grad = jax.grad(lambda x: model.apply(variables, x).sum())
    assert jnp.isfinite(grad(X)).all()


def test_vmap():
    axes = {"params": 0, "quant": 0}
    experts = nn.vmap(linen.LinearNF4, variable_axes=axes, split_rngs={"params": True})(64)
    x = jnp.stack([X, 2 * X])
    variables = experts.init(KEY, x)
    y = experts.apply(variables, x)
    for i in range(2):
        one = jax.tree.map(lambda v, i=i: v[i], variables)
        np.testing.assert_allclose(y[i], LAYER.apply(one, x[i]), rtol=1e-5, atol=1e-5)


def test_jit_eval_shape_tabulate():
    model = Stack()
    variables = stack_variables()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
        jax.jit(model.init)(KEY, X),
        variables,
    )
    shapes = jax.eval_shape(model.init, KEY, X)
    assert jax.tree.structure(shapes) == jax.tree.structure(variables)
    assert jax.eval_shape(model.apply, shapes, X).shape == X.shape
    table = model.tabulate(KEY, X, console_kwargs={"width": 200, "force_terminal": False})
    assert "weight: uint8[4,128,64] nf4_b64_n256_float32_128x128" in table


def test_partitioned():
    layer = linen.LinearNF4(
        256,
        kernel_init=nn.with_partitioning(nn.linear.default_kernel_init, ("embed", "mlp")),
        bias_init=nn.with_partitioning(nn.initializers.zeros, ("mlp",)),
    )
    variables = layer.init(KEY, X)
    specs = nn.get_partition_spec(variables)
    assert specs["params"]["bias"] == jax.P("mlp")
    weight = specs["quant"]["weight"]
    assert weight.packed == weight.quant_state.absmax == jax.P("mlp", "embed")
    assert weight.quant_state.nested_absmax == jax.P(None)
    assert weight.quant_state.offset == jax.P()
    plain = linen.LinearNF4(256).init(KEY, X)
    assert leaves_equal(nn.unbox(variables), plain)
    np.testing.assert_array_equal(layer.apply(variables, X), layer.apply(plain, X))

    scan = nn.scan(
        lambda layer, x, _: (layer(x)[..., :128], None),
        variable_axes={"params": 0, "quant": 0},
        split_rngs={"params": True},
        length=3,
        metadata_params={nn.meta.PARTITION_NAME: "layers"},
    )
    stacked = nn.get_partition_spec(nn.init(lambda m, x: scan(m, x, None), layer)(KEY, X))
    weight = stacked["quant"]["weight"]
    assert weight.packed == jax.P("layers", "mlp", "embed")
    assert weight.quant_state.offset == jax.P("layers")


def test_apply_does_not_write():
    variables = LAYER.init(KEY, X)
    _, after = LAYER.apply(variables, X, mutable=["quant"])
    before = jax.tree.leaves(variables["quant"])
    assert all(a is b for a, b in zip(jax.tree.leaves(after["quant"]), before, strict=True))


TAG = "nf4_b64_n256_float32_64x128"


@pytest.mark.parametrize(
    ("other", "held"),
    [
        (linen.LinearFP4(64), "fp4_b64_n256_float32_64x128"),
        (linen.LinearNF4(64, blocksize=32), "nf4_b32_n256_float32_64x128"),
        (linen.LinearNF4(64, compress_statistics=False), "nf4_b64_n0_float32_64x128"),
        (linen.LinearNF4(64, param_dtype=jnp.bfloat16), "nf4_b64_n256_bfloat16_64x128"),
        (linen.LinearNF4(32), "nf4_b64_n256_float32_32x128"),
    ],
)
def test_variables_of_another_layer(other, held):
    variables = other.init(KEY, X)
    with pytest.raises(ValueError, match=f"^LinearNF4 is {TAG}, its variables hold {held}, for"):
        LAYER.apply(variables, X)


def test_the_error_says_where():
    variables = {"quant": Block(linen.LinearFP4).init(KEY, X)["quant"]}
    with pytest.raises(ValueError, match=r"LinearNF4 up is nf4_.*, its variables hold fp4_"):
        Block().apply(variables, X)


def test_inputs_that_do_not_fit():
    variables = LAYER.init(KEY, X)
    with pytest.raises(ValueError, match=rf"64x64, its .* {TAG}, for inputs \[3, 64\]"):
        LAYER.apply(variables, X[:, :64])
    with pytest.raises(ValueError, match=r"inputs must be .* got a scalar"):
        LAYER.apply(variables, 1.0)
    with pytest.raises(ValueError, match=r"x.dtype must be float32.* got int32"):
        LAYER.apply(variables, jnp.ones((1, 128), jnp.int32))


def test_stacked_variables_without_scan():
    stacked = stack_variables()
    one = {name: tree["blocks"] for name, tree in stacked.items()}
    with pytest.raises(ValueError, match=r"64.*128x128 with leading axes \[4\]"):
        Block().apply(one, X)


def test_half_present_variables():
    variables = LAYER.init(KEY, X)
    with pytest.raises(flax.errors.ScopeCollectionNotFound, match="weight"):
        LAYER.apply({"params": variables["params"]}, X)
    rngs = {"params": KEY}
    with pytest.raises(flax.errors.ScopeCollectionNotFound, match="weight"):
        LAYER.apply({"params": variables["params"]}, X, rngs=rngs, mutable=["quant"])
    with pytest.raises(flax.errors.ScopeCollectionNotFound, match="bias"):
        LAYER.apply({"quant": variables["quant"]}, X)
    for bad, name in [(jnp.ones((64, 128)), "ArrayImpl"), ({"packed": 1}, "dict")]:
        with pytest.raises(ValueError, match=f"{TAG}, its variables hold a {name}"):
            LAYER.apply({**variables, "quant": {"weight": bad}}, X)
    empty = jax.tree.map(lambda leaf: None, variables["quant"])
    with pytest.raises(ValueError, match=f"{TAG}, .* a Params4bit without some of its arrays"):
        LAYER.apply({**variables, "quant": empty}, X)


def test_casts_are_caught_at_use():
    variables = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), LAYER.init(KEY, X))
    with pytest.raises(ValueError, match=r"packed must be uint8\[64, 64\].* got bfloat16"):
        LAYER.apply(variables, X)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quant_type": "int4"}, "quant_type must be 'nf4' or 'fp4', got 'int4'"),
        ({"blocksize": 48}, "blocksize 48"),
        ({"param_dtype": jnp.int8}, "param_dtype must be .* got int8"),
        ({"dtype": jnp.int8}, "dtype must be .* got int8"),
        ({"features": 0}, r"shape must .* got \(0, 128\)"),
        ({"kernel_init": nn.initializers.constant(jnp.nan)}, "kernel.*NaN or inf"),
        ({"implementation": "cuda"}, "implementation must be .* got 'cuda'"),
    ],
)
def test_fields_that_are_not_allowed(fields, message):
    with pytest.raises(ValueError, match=message):
        linen.Linear4bit(**{"features": 64, **fields}).init(KEY, X)
