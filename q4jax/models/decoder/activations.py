"""Activations under Hugging Face's names."""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

_tanh_gelu = functools.partial(jax.nn.gelu, approximate=True)
_gelu = functools.partial(jax.nn.gelu, approximate=False)

# "xielu" has parameters of its own, which the MLP applies.
ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "gelu": _gelu,
    "gelu_new": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "xielu": lambda x: x,
}
