"""What an installed q4jax must do with nothing but its own dependencies."""

import importlib.metadata
import importlib.resources
import sys

import jax
import jax.numpy as jnp
import numpy as np

import q4jax

assert q4jax.__file__.startswith(sys.prefix), f"not the installed package: {q4jax.__file__}"
assert importlib.metadata.version("q4jax") == q4jax.__version__
assert importlib.resources.files("q4jax").joinpath("py.typed").is_file()

w = jax.random.normal(jax.random.key(0), (128, 256))
x = jax.random.normal(jax.random.key(1), (4, 256))
weight = q4jax.Params4bit.quantize(w, quant_type="nf4", compress_statistics=True)
y = q4jax.matmul_4bit(x, weight)
np.testing.assert_allclose(y, x @ weight.dequantize(jnp.float32).T, rtol=1e-4, atol=1e-4)
print(f"q4jax {q4jax.__version__}, jax {jax.__version__}: {weight}")
