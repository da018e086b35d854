"""quantize_model on layers of every kind, Flax's and other people's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import q4jax
from q4jax.convert.einsum import BinaryEinsum
from q4jax.nnx.quantized_variable import QuantizedVariable

KEY = jax.random.key(7)


def draw(*shape, seed=0):
    return jax.random.normal(jax.random.fold_in(KEY, seed), shape)


def close(found, expected, limit=2e-6):
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert np.abs(found - expected).max() <= limit * np.abs(expected).max()


# Flax's layers


def general(*sizes, bias=True, **settings):
    layer = nnx.LinearGeneral(*sizes, use_bias=bias, rngs=nnx.Rngs(0), **settings)
    if bias:
        layer.bias[...] = draw(*layer.bias.shape, seed=1)
    return layer


GENERAL = [
    (general(64, 32), (2, 64)),
    (general(64, (4, 16)), (2, 3, 64)),
    (general((4, 32), 48, axis=(-2, -1)), (2, 3, 4, 32)),
    (general((4, 32), (2, 3, 8), axis=(-1, 1)[::-1], bias=False), (2, 4, 5, 32)),
    (general(64, (2, 8), batch_axis={0: 3}), (3, 5, 64)),
    (general(64, 8, axis=1, batch_axis={0: 3}), (3, 64, 5)),
    (general(24, (2, 8)), (5, 24)),
]


@pytest.mark.parametrize(("layer", "shape"), GENERAL)
def test_linear_general(layer, shape):
    small = q4jax.quantize_model(layer)
    assert type(small) is q4jax.LinearGeneral4bit
    dense = q4jax.dequantize_model(small)
    assert type(dense) is nnx.LinearGeneral
    x = draw(*shape)
    close(nnx.jit(lambda m, x: m(x))(small, x), dense(x))
    kernel = np.asarray(layer.kernel[...])
    assert dense.kernel.shape == kernel.shape
    error = np.linalg.norm(dense.kernel[...] - kernel) / np.linalg.norm(kernel)
    assert 0.05 < error < 0.13
    assert small(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def einsum(text, kernel, bias=None, **settings):
    layer = nnx.Einsum(text, kernel, bias, rngs=nnx.Rngs(0), **settings)
    if bias:
        layer.bias[...] = draw(*bias, seed=1)
    return layer


EINSUM = [
    (einsum("BTD,NDH->BTNH", (4, 64, 16), (4, 16)), (2, 3, 64)),
    (einsum("BTNH,NHD->BTD", (4, 32, 48), (48,)), (2, 3, 4, 32)),
    (einsum("BSD,CKDH->CBSKH", (2, 3, 64, 8)), (2, 5, 64)),
    (einsum("...D,DF->...F", (64, 32), (32,)), (2, 3, 5, 64)),
    (einsum("ecd,edf->ecf", (3, 64, 32)), (3, 5, 64)),
    (einsum("cbed,efd->bfec", (3, 16, 64), (16, 3)), (2, 5, 3, 64)),
]


@pytest.mark.parametrize(("layer", "shape"), EINSUM)
def test_einsum(layer, shape):
    small = q4jax.quantize_model(layer)
    assert type(small) is q4jax.Einsum4bit
    dense = q4jax.dequantize_model(small)
    assert type(dense) is nnx.Einsum
    x = draw(*shape)
    close(nnx.jit(lambda m, x: m(x))(small, x), dense(x))
    assert dense.kernel.shape == layer.kernel.shape


def test_blocks_run_along_what_is_summed_over():
    """The codes are those of the matrix, whatever the order of the axes in the kernel."""
    w = draw(4, 64, 16)
    layer = einsum("BTD,NDH->BTNH", (4, 64, 16))
    layer.kernel[...] = w
    matrix = w.transpose(0, 2, 1).reshape(64, 64)
    expected = q4jax.Params4bit.quantize(matrix, quant_type="nf4", compress_statistics=True)
    packed = q4jax.quantize_model(layer).weight.packed[...]
    np.testing.assert_array_equal(packed, expected.packed)


def test_multi_head_attention():
    attention = nnx.MultiHeadAttention(4, 64, decode=False, rngs=nnx.Rngs(0))
    small = q4jax.quantize_model(attention)
    assert type(small) is nnx.MultiHeadAttention
    layers = [small.query, small.key, small.value, small.out]
    assert {type(layer) for layer in layers} == {q4jax.LinearGeneral4bit}
    dense = q4jax.dequantize_model(small)
    x = draw(2, 5, 64)
    close(nnx.jit(lambda m, x: m(x))(small, x), dense(x), 1e-5)
    gradient = [jax.grad(lambda x, m=m: jnp.sum(m(x) ** 2))(x) for m in (small, dense)]
    close(*gradient, 1e-5)
    assert q4jax.memory_report(small).quantized_weights == 4 * 64 * 64


def test_embeddings_by_rule_with_a_tied_head():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(24, 64, rngs=rngs)
            self.up = nnx.Linear(64, 64, rngs=rngs)

        def __call__(self, ids):
            return self.embed.attend(self.up(self.embed(ids)))

    model = Tied(nnx.Rngs(0))
    small = q4jax.quantize_model(model, [q4jax.QuantRule(embeddings=True, blocksize=32)])
    assert type(small.embed) is q4jax.Embedding4bit
    ids = jnp.array([[1, 2, 23, -1]])
    close(small(ids), q4jax.dequantize_model(small)(ids), 1e-5)
    assert type(q4jax.quantize_model(model).embed) is nnx.Embed


def test_stacks_of_folded_layers_scan():
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def stack(rngs):
        return nnx.Einsum("BD,DE->BE", (64, 64), rngs=rngs)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def run(layer, x):
        return layer(x)

    small = q4jax.quantize_model(stack(nnx.Rngs(0)))
    assert small.weight.quant_state.shape == (3, 64, 64)
    x = draw(2, 64)
    close(run(small, x), run(q4jax.dequantize_model(small), x), 1e-5)


# Other people's


class Einsum(nnx.Module):
    """As several packages have it: a Param `w` and a string."""

    def __init__(self, text, shape, rngs):
        self.text = text
        self.w = nnx.Param(jax.random.normal(rngs.params(), shape))

    def __call__(self, x):
        return jnp.einsum(self.text, x, self.w[...])


class Experts(nnx.Module):
    """Two stacked weights, read in other ways."""

    def __init__(self, rngs):
        self.up = nnx.Param(jax.random.normal(rngs.params(), (3, 64, 32)))
        self.down = nnx.Param(jax.random.normal(rngs.params(), (3, 32, 64)))
        self.scale = nnx.Param(jnp.ones(64))

    def __call__(self, x):
        hidden = jnp.einsum("bd,edf->ebf", x, self.up)
        return (jax.nn.relu(hidden) @ self.down.get_value()).sum(0) * self.scale


class Strange(nnx.Module):
    def __init__(self, rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (64, 64)))


class Model(nnx.Module):
    def __init__(self, rngs):
        self.q_einsum = Einsum("BD,NDH->BNH", (4, 64, 16), rngs)
        self.out_einsum = Einsum("BNH,NHD->BD", (4, 16, 64), rngs)
        self.experts = Experts(rngs)
        self.again = self.q_einsum
        self.up = nnx.Linear(64, 64, rngs=rngs)

    def __call__(self, x):
        x = self.out_einsum(self.q_einsum(x) + self.again(x))
        return self.up(self.experts(x))


q4jax.register_layer(Einsum, lambda module: {"w": module.text})
q4jax.register_layer(
    Experts,
    lambda module: {
        "up": "bd,edf->ebf",
        "down": q4jax.KernelAxes((3, 32, 64), in_axes=(1,), batch_axes=(0,)),
    },
)


@pytest.fixture(scope="module")
def model():
    return Model(nnx.Rngs(0))


@pytest.fixture(scope="module")
def small(model):
    return q4jax.quantize_model(model, [q4jax.QuantRule("up", skip=True), q4jax.QuantRule()])


def test_the_forward_is_the_owner_s_own_to_the_bit(model, small):
    dense = q4jax.dequantize_model(small)
    assert type(small.q_einsum) is Einsum and isinstance(small.q_einsum.w, QuantizedVariable)
    assert small.again is small.q_einsum
    assert type(dense.q_einsum.w) is nnx.Param
    assert dense.q_einsum.w.get_metadata() == model.q_einsum.w.get_metadata()
    x = draw(5, 64)
    np.testing.assert_array_equal(small(x), dense(x))
    # In one program with the decoding, XLA may add the products of a dot in another order.
    run = nnx.jit(lambda m, x: m(x))
    expected = run(dense, x)
    np.testing.assert_allclose(run(small, x), expected, rtol=0, atol=1e-6 * abs(expected).max())
    assert not np.array_equal(small(x), model(x))
    assert type(model.q_einsum.w) is nnx.Param


def test_what_is_4_bit_in_it_is_frozen_and_counted(small):
    report = q4jax.memory_report(small)
    assert report.quantized_weights == 2 * 4096 + 2 * 3 * 2048
    assert len(jax.tree.leaves(nnx.state(small, nnx.Param))) == 3
    assert small.experts.down.weight.quant_state.shape == (3, 64, 32)
    assert small.experts.down.shape == (3, 32, 64)
    assert small.experts.down.T.shape == (64, 32, 3)
    with pytest.raises(AttributeError, match="_nothing"):
        _ = small.experts.down._nothing


def test_split_merge_gradient_and_checkpoint(small, tmp_path):
    again = nnx.merge(*nnx.split(small))
    x = draw(5, 64)
    np.testing.assert_array_equal(again(x), small(x))

    @nnx.jit
    def gradient(model, x):
        return nnx.grad(lambda m, x: jnp.sum(m(x) ** 2), argnums=1)(model, x)

    dense = q4jax.dequantize_model(small)
    expected = gradient(dense, x)
    np.testing.assert_allclose(
        gradient(small, x), expected, rtol=0, atol=1e-6 * abs(expected).max()
    )
    q4jax.checkpoint.save(tmp_path / "c", small)
    other = q4jax.quantize_model(
        Model(nnx.Rngs(1)), [q4jax.QuantRule("up", skip=True), q4jax.QuantRule()]
    )
    restored = q4jax.checkpoint.restore(tmp_path / "c", target=other)
    np.testing.assert_array_equal(restored(x), small(x))
    assert q4jax.fingerprint(restored) == q4jax.fingerprint(small) != q4jax.fingerprint(other)


def test_stacked_foreign_layers_scan():
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def stack(rngs):
        return Einsum("BD,DE->BE", (64, 64), rngs)

    @nnx.jit
    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def run(layer, x):
        return layer(x)

    small = q4jax.quantize_model(stack(nnx.Rngs(0)))
    assert small.w.shape == (3, 64, 64)
    x = draw(2, 64)
    np.testing.assert_array_equal(run(small, x), run(q4jax.dequantize_model(small), x))


def test_an_unknown_class_is_reported(model):
    unknown = nnx.Dict(a=Strange(nnx.Rngs(0)), b=nnx.Linear(64, 8, rngs=nnx.Rngs(0)))
    plan = q4jax.plan_quantization(unknown)
    assert str(plan.kept[0]) == (
        "a (Strange): kept: its class is unknown; register_layer for its ['w']"
    )
    assert [d.path for d in plan.quantized] == ["b"]
    assert "b (Linear): quantized" in str(plan)


@pytest.mark.parametrize(
    ("describe", "reason"),
    [
        (lambda m: "it is frozen", "it is frozen"),
        (lambda m: {"v": "BD,DE->BE"}, r"it has no parameter 'v', but \['w'\]"),
        (lambda m: {"w": "BD,DEF->BEF"}, r"a weight \[64, 64\] has not the axes 'DEF'"),
        (lambda m: {"w": "BD,DE->B"}, r"\['E'\] are in one place only"),
        (lambda m: {"w": q4jax.KernelAxes((64, 32), (0,))}, r"w is \[64, 64\], not \[64, 32\]"),
    ],
)
def test_descriptions_that_do_not_fit(describe, reason):
    class Local(Strange):
        pass

    q4jax.register_layer(Local, describe)
    with pytest.raises(ValueError, match=reason):
        q4jax.quantize_model(Local(nnx.Rngs(0)))
    with pytest.raises(ValueError, match=f"rule '.?' matches .*cannot be quantized: .*{reason}"):
        q4jax.plan_quantization(nnx.Dict(a=Local(nnx.Rngs(0))), [q4jax.QuantRule("a")])
    with pytest.raises(TypeError, match="takes a class and a function"):
        q4jax.register_layer("Local", describe)


@pytest.mark.parametrize(
    ("equation", "message"),
    [
        ("BD,DE", "no einsum of two operands"),
        ("BD,DE,EF->BF", "no einsum of two operands"),
        ("BB,BE->E", "must be different letters"),
        ("BD,...DE->BE", r"'...' must be in the input and the result alone"),
        ("BD,DE->BEF", r"\['F'\] are in one place only"),
    ],
)
def test_equations_that_are_refused(equation, message):
    with pytest.raises(ValueError, match=message):
        BinaryEinsum.parse(equation)


def test_inputs_that_do_not_fit():
    layer = q4jax.quantize_model(einsum("BTD,NDH->BTNH", (4, 64, 16)))
    with pytest.raises(ValueError, match=r"the input is \[2, 3, 32\], the weight \[4, 64, 16\]"):
        layer(jnp.ones((2, 3, 32)))
    with pytest.raises(ValueError, match=r"the input is \[2, 64\]"):
        layer(jnp.ones((2, 64)))
    with pytest.raises(TypeError, match="cannot quantize a Linear: it is not an nnx.Einsum"):
        q4jax.Einsum4bit(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(TypeError, match="it is not an nnx.LinearGeneral"):
        q4jax.LinearGeneral4bit(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"different axes of \[2, 3\]"):
        q4jax.KernelAxes((2, 3), (2,))
    with pytest.raises(ValueError, match="has no output axis"):
        q4jax.KernelAxes((2, 3), (0, 1))


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.einsum = nnx.Einsum("BD,DE->BE", (512, 512), rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.einsum(x))


class Foreign(nnx.Module):
    def __init__(self, rngs):
        self.einsum = Einsum("BD,DE->BE", (512, 512), rngs)

    def __call__(self, x):
        return jnp.tanh(self.einsum(x))


@pytest.mark.parametrize(("kind", "remat"), [(Layer, False), (Layer, True), (Foreign, True)])
def test_training_keeps_codes_and_no_decoded_weights(kind, remat):
    """Of 12 stacked layers, what a gradient needs beside its arguments, by the compiled program."""

    @nnx.split_rngs(splits=12)
    @nnx.vmap
    def stack(rngs):
        return kind(rngs)

    graph, state = nnx.split(q4jax.quantize_model(stack(nnx.Rngs(0))))

    def body(x, state):
        return nnx.merge(graph, state)(x), None

    body = jax.checkpoint(body, prevent_cse=False) if remat else body

    def gradient(x, state):
        return jax.grad(lambda x: jax.lax.scan(body, x, state)[0].sum())(x)

    compiled = jax.jit(gradient).lower(jnp.ones((8, 512)), state).compile()
    dense = 12 * 512 * 512 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 0.13 * dense
