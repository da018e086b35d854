"""A few programs for the chips that are compiled for less: v5p and TPU7x."""

import re

import jax
import jax.numpy as jnp
import pytest
from collectives import collectives  # on the path by tests/conftest.py
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import q4jax
from tests.support.tpu.targets import MISSING, OTHERS, compiled, devices, mesh_of, on_one, unknown

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
N, K = 512, 1024


@pytest.fixture(params=OTHERS)
def chip(request):
    reason = unknown(request.param)
    if reason:
        pytest.skip(reason)
    return request.param


def struct(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def quantize(w):
    return q4jax.Params4bit.quantize(w, 64, True, "nf4", check_finite=False)


def step(x, weight):
    y, vjp = jax.vjp(lambda x: q4jax.matmul_4bit(x, weight), x)
    return y, vjp(y)[0]


def test_every_call_on_one_device(chip):
    def all_calls(x, weight, w):
        return *step(x, weight), weight.dequantize(), quantize(w)

    weight = jax.eval_shape(quantize, struct(N, K))
    program = compiled(all_calls, *on_one(chip, (struct(8, K), weight, struct(N, K))))
    assert program.temporary <= 7e6  # 6.3e6 on v5p and 1.2e6 on TPU7x when this was written
    assert not re.search(r" (gather|sort|scatter)\(", program.text)


def test_codes_and_scales_move(chip):
    assert len(devices(chip)) == 8
    mesh = mesh_of(chip, AxisType.Explicit, batch=4, part=2)

    def on(spec, array):
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, spec))

    weight = jax.eval_shape(quantize, struct(N, K))
    weight = jax.tree.map(lambda a: on(P("part", "batch") if a.ndim == 2 else P(), a), weight)
    x = on(P("batch"), struct(12, 100, K))
    with jax.set_mesh(mesh):
        program = compiled(step, x, weight)
    found = collectives(program.text)
    codes = [c for c in found if c.dtype == "u8" and c.kind == "all-gather"]
    assert max(c.size for c in codes) == N // 2 * K // 2
    assert not [c for c in found if c.is_float and set(c.shape[-2:]) <= {N, N // 2, K, K // 2}]
