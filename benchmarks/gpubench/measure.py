"""The kernels and what they are compared with, on the weights of layers.

Weights are nf4 in blocks of 64 with double quantization, as the layers have them, and bfloat16 is
the compute dtype. A product is compared with

- "dense": bfloat16 `jnp.dot` with the weight as it is rounded, by cuBLAS: what XLA would put in its
  place is off. At M = 1 that is timed, too, as "dense by XLA", and the faster one counts; at each
  M it would cost a search for tiles;
- "dequantize + dot": the dequantization kernel, then that;
- "xla": q4jax in plain XLA, as it comes;
- and those of `torch_peer`.

What a candidate computes is compared with "dense" where it is small enough to fetch.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from gpubench.clock import Job
from q4jax import Params4bit
from q4jax.ops.dequantize import Dequantize
from q4jax.ops.matmul import Linear, LinearTranspose
from q4jax.ops.quantize import Quantize
from q4jax.ops.registry import check_name
from q4jax.sharding.partition import run

DTYPE = jnp.dtype(jnp.bfloat16)
DENSE, DENSE_BY_XLA, SEPARATE = "dense", "dense by XLA", "dequantize + dot"
CUBLAS = {
    "xla_gpu_enable_triton_gemm": False,
    "xla_disable_hlo_passes": "dot-strength-reduction",
}
MOST_COPIES = 48
FETCHED_ROWS = 512
DISAGREEMENT = 1e-2
"""Of the norm: more than twice what rounding both results to bfloat16 (2^-9 each) can make."""

_BANDWIDTH, _RATE = 3e6, 5e8  # bytes and operations a microsecond; only to plan how often to run


class Weights:
    """Quantized and dense copies of a weight [N, K], more than `cache_bytes` of each."""

    def __init__(self, cache_bytes):
        self.cache_bytes = cache_bytes
        self._made = {}

    def copies(self, nbytes):
        """How many copies of `nbytes` bytes are needed."""
        return min(MOST_COPIES, max(2, math.ceil(self.cache_bytes / nbytes)))

    def get(self, n, k):
        """(4-bit, dense) copies; number i of both is the same weight."""
        if (n, k) not in self._made:

            @jax.jit
            def make(key):
                w = jax.random.normal(key, (n, k), DTYPE) * 0.02
                weight = Params4bit.quantize(w, 64, True, "nf4", implementation="xla")
                return weight, weight.dequantize(DTYPE, implementation="xla")

            few = self.copies(2 * n * k)
            made = [make(jax.random.key(i)) for i in range(self.copies(n * k // 2))]
            self._made[n, k] = [w for w, _ in made], [d for _, d in made[:few]]
        return self._made[n, k]


def cost(row, weight):
    """(bytes, operations) that a row needs at least."""
    packed, dense = weight.nbytes, 2 * row.n * row.k
    if not row.m:
        return packed + dense, 0
    return packed + 2 * row.m * (row.n + row.k), 2 * row.m * row.n * row.k


def operation(name, implementation, spec):
    """f(x, weight) of a row's operation, by an implementation or in one of the other ways."""
    chosen = check_name(implementation)

    def dequantize(_, weight):
        return run(Dequantize(spec, chosen, DTYPE), weight.arrays)[0]

    def quantize(_, w):
        return run(Quantize(spec, chosen), w)

    def linear(x, weight):
        return run(Linear(spec, chosen, False), x, weight.arrays, None)[0]

    def linear_transpose(x, weight):
        return run(LinearTranspose(spec, chosen, False), x, weight.arrays)[0]

    return {f.__name__: f for f in (dequantize, quantize, linear, linear_transpose)}[name]


def dot(x, w, *, transposed):
    """`x @ W.T`, or `x @ W`."""
    return jnp.dot(x, w if transposed else w.T)


def jobs(row, names, kernels, weights):
    """A job for each candidate of a row.

    Args:
      row: what.
      names: of the candidates: implementations and the other ways.
      kernels: the implementation whose kernels are measured, "pallas".
      weights: `Weights`.
    """
    packed, dense = weights.get(row.n, row.k)
    spec = packed[0].quant_state.spec
    nbytes, operations = cost(row, packed[0])
    floor = max(4.0, nbytes / _BANDWIDTH, operations / _RATE)
    if not row.m:
        few = weights.copies(nbytes)
        which = packed if row.operation == "dequantize" else dense
        run = operation(row.operation, kernels, spec)
        return [Job((row, kernels), run, (), which[:few], 2 * floor)]
    width = row.n if row.operation == "linear_transpose" else row.k
    x = jax.random.normal(jax.random.key(row.m), (row.m, width), DTYPE)
    plain = functools.partial(dot, transposed=row.operation == "linear_transpose")
    dense_floor = max(floor, 2 * row.n * row.k / _BANDWIDTH)
    found = []
    for name in names:
        key = row, name
        if name == DENSE:
            found.append(Job(key, plain, x, dense, dense_floor, CUBLAS))
        elif name == DENSE_BY_XLA:
            found.append(Job(key, plain, x, dense, dense_floor))
        elif name == SEPARATE:
            decode = operation("dequantize", kernels, spec)

            def separate(x, weight, decode=decode):
                return plain(x, decode(None, weight))

            found.append(Job(key, separate, x, packed, 3 * dense_floor, CUBLAS))
        else:
            run = operation(row.operation, name, spec)
            slow = 4 * dense_floor if name == "xla" else 2 * floor
            found.append(Job(key, run, x, packed, slow))
    return found


def denominators():
    """Jobs for the copy bandwidth and the bf16 rate, each with what a call costs.

    The copy reads and writes 1 GiB; the product is of 8192 x 8192 x 8192 random numbers.
    """
    size = 2**28
    source = [jax.random.bits(jax.random.key(i), (size,), jnp.uint32) for i in range(2)]
    n = 8192
    x, *ws = (jax.random.normal(jax.random.key(i), (n, n), DTYPE) for i in range(3))
    plain = functools.partial(dot, transposed=False)
    return [
        (Job("copy", lambda _, w: ~w, (), source, 600.0), 8 * size),
        (Job("bf16", plain, x, ws, 1500.0, CUBLAS), 2 * n**3),
    ]


def small_denominators():
    """The same for a dry run."""
    x = jnp.ones((64, 64), DTYPE)
    source = [jnp.arange(4096, dtype=jnp.uint32) + i for i in range(2)]
    plain = functools.partial(dot, transposed=False)
    return [
        (Job("copy", lambda _, w: ~w, (), source, 1000.0), 8 * 4096),
        (Job("bf16", plain, x, [x, x + 1], 1000.0), 2 * 64**3),
    ]


def disagreement(found, expected):
    """‖found - expected‖ / ‖expected‖, or None for results too large to fetch."""
    if expected.shape[0] > FETCHED_ROWS:
        return None
    found, expected = (np.asarray(a).astype(np.float32) for a in (found, expected))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
