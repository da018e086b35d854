"""On eight simulated devices, in a process of its own."""

import os
import subprocess
import sys

import pytest

from tests.support.native_kernels import in_use

pytestmark = [in_use, pytest.mark.slow]

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np, q4jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from q4jax.native import calls as ops

assert jax.device_count() == 8
w = q4jax.Params4bit.quantize(jax.random.normal(jax.random.key(0), (256, 512)), 64, False, "nf4")
x = jax.random.normal(jax.random.key(1), (8, 512))
whole = q4jax.matmul_4bit(x, w, implementation="native")
mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

def shard(x, packed, absmax):
    return ops.linear(x, packed, absmax, quant_type="nf4", blocksize=64)

# Rows of x and of the weight, split.
specs = P("data"), P("model"), P("model")
split = jax.jit(jax.shard_map(shard, mesh=mesh, in_specs=specs, out_specs=P("data", "model")))
np.testing.assert_allclose(split(x, w.packed, w.quant_state.absmax), whole, atol=2e-4)

# Columns of both, split: partial sums.
def partial(*args):
    return jax.lax.psum(shard(*args), "model")

specs = P("data", "model"), P(None, "model"), P(None, "model")
summed = jax.jit(jax.shard_map(partial, mesh=mesh, in_specs=specs, out_specs=P("data")))
np.testing.assert_allclose(summed(x, w.packed, w.quant_state.absmax), whole, atol=2e-4)

# Left to the compiler, the weight stays where it is, and each device calls the kernel on its part.
place = lambda a: jax.device_put(a, NamedSharding(mesh, P("model")))
forward = jax.jit(q4jax.matmul_4bit)
sharded = jax.tree.map(place, w)
np.testing.assert_allclose(forward(x, sharded), whole, atol=2e-4)
text = forward.lower(x, sharded).compile().as_text()
assert "q4jax_linear" in text and "all-gather" not in text
"""


def test_eight_devices():
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
