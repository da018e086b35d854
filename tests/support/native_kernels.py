"""What the tests of the CPU kernels share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from q4jax.native import calls as ops
from q4jax.native import library, status

ISAS = status().available
DTYPES = ["float32", "bfloat16", "float16"]
in_use = pytest.mark.skipif(status().isa is None, reason=status().reason)


def in_every_isa(function, *args):
    """What the jitted function returns in each instruction set; it is compiled once."""
    function = jax.jit(function)
    for isa in ISAS:
        with library.use_isa(isa):
            yield jax.block_until_ready(function(*args))


def linear(weight):
    """x, *arrays, bias -> y, with the weight's settings."""
    return functools.partial(ops.linear, **settings(weight))


def transposed(weight):
    return functools.partial(ops.linear_transpose, **settings(weight))


def settings(weight):
    spec = weight.quant_state.spec
    return {"quant_type": spec.quant_type, "blocksize": spec.blocksize}


def assert_product(found, a, b, extra=0.0):
    """`a @ b.T + extra` within what K additions in float32, in any order, and a rounding allow."""
    a, b, extra = (np.asarray(t).astype(np.float64) for t in (a, b, extra))
    exact, terms = a @ b.T + extra, np.abs(a) @ np.abs(b).T + np.abs(extra)
    info = jnp.finfo(found.dtype)
    bound = (a.shape[-1] + 2) * 2.0**-24 * terms
    bound += float(info.eps) / 2 * (np.abs(exact) + bound) + float(info.smallest_subnormal)
    assert found.shape == exact.shape
    assert (np.abs(np.asarray(found).astype(np.float64) - exact) <= bound).all()
