"""A layer class that is added from outside of q4jax, with one `LayerConverter`."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import q4jax
from q4jax.nnx import converters
from q4jax.nnx.base import Quantized
from q4jax.nnx.converters import LayerConverter, converter_for, register_converter
from q4jax.nnx.variables import from_variables
from tests.support.random_arrays import normal


class Scaled(nnx.Module):
    """A dense layer of one's own: `2 * x @ kernel`."""

    def __init__(self, kernel):
        self.kernel = nnx.Param(kernel)

    def __call__(self, x):
        return 2 * x @ self.kernel[...]


class Scaled4bit(Quantized):
    """The 4-bit form."""

    def __init__(self, layer, *, name, dtype=None, **settings):
        kernel = layer.kernel[...]
        self.param_dtype, self.dtype = kernel.dtype, dtype
        self.quant_type, self.blocksize = settings["quant_type"], settings["blocksize"]
        self.compress_statistics = settings["compress_statistics"]
        self.implementation = None
        self.shape = kernel.shape[::-1]
        self._store(kernel.T, name, {})

    def __call__(self, x):
        return 2 * q4jax.matmul_4bit(x, self._load(self.shape))


def axes(layer):
    shape = layer.shape[::-1] if isinstance(layer, Scaled4bit) else layer.kernel.shape
    return q4jax.KernelAxes(tuple(shape), in_axes=(0,))


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(converters, "_CONVERTERS", dict(converters._CONVERTERS))
    register_converter(
        LayerConverter(
            Scaled,
            Scaled4bit,
            to_4bit=Scaled4bit,
            to_dense=lambda layer: Scaled(from_variables(layer.weight).dequantize().T),
            kernel_axes=axes,
            torch_names={"kernel": "weight"},
        )
    )


@pytest.fixture
def model():
    return nnx.Dict(a=Scaled(normal(0, 64, 32)), b=nnx.Linear(32, 64, rngs=nnx.Rngs(0)))


def run(model, x):
    return model.b(model.a(x))


def test_quantize_and_back(model):
    small, x = q4jax.quantize_model(model), normal(1, 3, 64)
    assert type(small.a) is Scaled4bit and converter_for(small.a).quantized is Scaled4bit
    dense = q4jax.dequantize_model(small)
    assert type(dense.a) is Scaled
    np.testing.assert_allclose(run(small, x), run(dense, x), rtol=1e-4, atol=1e-4)
    assert q4jax.memory_report(small).quantized_weights == 2 * 64 * 32
    assert [decision.path for decision in q4jax.plan_quantization(model).quantized] == ["a", "b"]


def test_adapters(model):
    x = normal(1, 3, 64)
    tuned = q4jax.add_lora(q4jax.quantize_model(model), rank=4, alpha=8)
    np.testing.assert_array_equal(run(tuned, x), run(q4jax.quantize_model(model), x))
    tuned.a.lora_b[...] = normal(2, 4, 32)
    merged, errors = q4jax.merge_lora(tuned, requantize=True)
    assert type(merged.a) is Scaled4bit and set(errors) == {"a", "b"}
    assert type(q4jax.merge_lora(tuned).a) is Scaled


def test_a_state_dict(model):
    from q4jax.interop import bitsandbytes

    model = q4jax.quantize_model(nnx.Dict(a=model.a))
    loaded = bitsandbytes.load_state_dict(model, {"a.weight": np.ones((32, 64), np.float32)})
    np.testing.assert_allclose(loaded.a(jnp.ones((1, 64))), np.full((1, 32), 128.0))
