"""A quant type and an implementation that are added from outside of q4jax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import q4jax
from q4jax.core import blockwise
from q4jax.core.codebooks import CODEBOOKS, Codebook
from q4jax.core.spec import QuantSpec
from q4jax.ops import registry
from tests.support.random_arrays import normal

LINEAR = np.linspace(-1, 1, 16, dtype=np.float32)


@pytest.fixture
def int4(monkeypatch):
    """A quant type of 16 evenly spaced values, whose codes are in descending order."""
    order = np.arange(16, dtype=np.uint8)[::-1]
    monkeypatch.setitem(CODEBOOKS, "int4", Codebook("int4", LINEAR[::-1].copy(), order))
    yield "int4"
    jax.clear_caches()


@pytest.mark.parametrize("implementation", [None, "xla", "native", "pallas_interpret"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_quant_type(int4, implementation, nested):
    if implementation == "native" and q4jax.native.status().isa is None:
        pytest.skip(q4jax.native.status().reason)
    w, x = normal(0, 24, 128), normal(1, 3, 128)
    blocks = np.asarray(w).reshape(-1, 64)
    absmax = np.abs(blocks).max(1, keepdims=True)
    nearest = np.abs(blocks[..., None] / absmax[..., None] - LINEAR).argmin(-1)
    weight = q4jax.Params4bit.quantize(w, 64, nested, int4, implementation=implementation)
    assert weight.quant_state.spec.tag().startswith("int4_b64")
    if not nested:
        found = weight.dequantize(implementation=implementation)
        np.testing.assert_allclose(found, (LINEAR[nearest] * absmax).reshape(w.shape), rtol=1e-6)
    dense = np.asarray(weight.dequantize(implementation="xla"))
    y, vjp = jax.vjp(lambda x: q4jax.matmul_4bit(x, weight, implementation=implementation), x)
    np.testing.assert_allclose(y, x @ dense.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(vjp(y)[0], np.asarray(y) @ dense, rtol=1e-4, atol=1e-3)


def test_a_quant_type_in_files(int4):
    weight = q4jax.Params4bit.quantize(jnp.ones((4, 64)), 64, True, int4)
    assert QuantSpec.parse(weight.quant_state.spec.tag()) == weight.quant_state.spec
    restored = q4jax.Params4bit.from_prequantized(
        weight.packed, weight.quant_state.as_dict(packed=True)
    )
    assert restored.quant_state.spec == weight.quant_state.spec


class Toy:
    """The reference under a name of its own, which counts its calls."""

    name = "toy"
    takes_stacks = False

    def __init__(self):
        self.calls = []

    def quantize(self, w, *, spec):
        self.calls.append("quantize")
        return blockwise.in_layout(w.shape, *blockwise.quantize_flat(w, spec), spec)

    def double_quantize(self, absmax):
        self.calls.append("double_quantize")
        return blockwise.double_quantize(absmax)

    def dequantize(self, arrays, *, spec, dtype):
        self.calls.append("dequantize")
        return blockwise.dequantize(arrays, spec, dtype)

    def linear(self, x, arrays, bias, *, spec):
        self.calls.append("linear")
        y = x @ blockwise.dequantize(arrays, spec, x.dtype).T
        return y if bias is None else y + bias

    def linear_transpose(self, g, arrays, *, spec):
        self.calls.append("linear_transpose")
        return g @ blockwise.dequantize(arrays, spec, g.dtype)

    def is_preferred(self, op, dtype, rows):
        return rows is None or rows < 4


@pytest.fixture
def toy(monkeypatch):
    toy = Toy()
    monkeypatch.setitem(registry.IMPLEMENTATIONS, toy.name, toy)
    yield toy
    jax.clear_caches()


def test_an_implementation(toy):
    w, x = normal(0, 24, 128), normal(1, 3, 128)
    weight = q4jax.Params4bit.quantize(w, 64, True, "nf4", implementation="toy")
    expected = q4jax.Params4bit.quantize(w, 64, True, "nf4")
    jax.tree.map(np.testing.assert_array_equal, weight, expected)
    np.testing.assert_array_equal(weight.dequantize(implementation="toy"), expected.dequantize())
    y, vjp = jax.vjp(lambda x: q4jax.matmul_4bit(x, weight, implementation="toy"), x)
    vjp(y)
    ops = ["quantize", "double_quantize", "dequantize", "linear", "linear_transpose"]
    assert list(dict.fromkeys(toy.calls)) == ops


def test_an_implementation_that_none_takes(toy, monkeypatch):
    monkeypatch.setitem(registry.AUTOMATIC, jax.default_backend(), (toy,))
    jax.clear_caches()
    weight = q4jax.Params4bit.quantize(normal(0, 24, 128), 64)
    q4jax.matmul_4bit(normal(1, 3, 128), weight)
    assert toy.calls == ["quantize", "linear"]
    q4jax.matmul_4bit(normal(1, 4, 128), weight)  # more rows than it is preferred for
    assert toy.calls == ["quantize", "linear"]


def test_an_unknown_implementation_names_those_that_are_registered(toy):
    with pytest.raises(ValueError, match="one of 'xla', .*, 'toy'; got 'cuda'"):
        q4jax.quantize_4bit(jnp.ones((2, 64)), implementation="cuda")
