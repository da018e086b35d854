"""What "mosaic_gpu" refuses, and where. tests/implementations/gpu executes its kernels."""

import jax
import jax.numpy as jnp
import pytest

import q4jax
from q4jax.ops import registry
from tests.support.random_arrays import random_weight

MOSAIC = registry.IMPLEMENTATIONS["mosaic_gpu"]
SERVED = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="every call is refused: Mosaic GPU needs jax 0.11"
)


class Hopper:
    """A visible GPU."""

    platform, device_kind = "gpu", "NVIDIA H200"

    def __init__(self, capability="9.0"):
        self.compute_capability = capability


def linear(shape=(64, 256), m=2, dtype="bfloat16", blocksize=64):
    weight = random_weight(shape, blocksize, False, dtype=dtype)
    x = jnp.ones((m, shape[-1]), dtype)
    return q4jax.matmul_4bit(x, weight, implementation="mosaic_gpu")


def traced_anew():
    """The same on the implementation's own level, of which JAX remembers nothing."""
    weight = random_weight((64, 256), 64, False, dtype="bfloat16")
    x = jnp.ones((2, 256), jnp.bfloat16)
    return MOSAIC.linear(x, weight.arrays, None, spec=weight.quant_state.spec)


@SERVED
def test_only_for_gpus():
    with pytest.raises(
        NotImplementedError, match="runs on NVIDIA GPUs and this program is for cpu"
    ):
        linear()


@SERVED
@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({"shape": (64, 192)}, r"K of 128, or 256 where it is differentiated, not \(64, 192\)"),
        ({"shape": (68, 256)}, r"N is a multiple of 8 and K of 128, .* not \(68, 256\)"),
        ({"dtype": "float32"}, "multiplies in bfloat16 and float16, not float32"),
        ({"shape": (64, 96)}, "needs rows that are whole blocks"),
    ],
)
def test_what_it_does_not_serve(call, reason):
    with pytest.raises(NotImplementedError, match=f"implementation='mosaic_gpu' .*{reason}"):
        linear(**call)


@SERVED
def test_the_gradient_needs_wider_rows():
    spec = random_weight((64, 384), 64, False).quant_state.spec
    g = jnp.ones((2, 64), jnp.bfloat16)
    with pytest.raises(
        NotImplementedError, match=r"256 where it is differentiated, not \(64, 384\)"
    ):
        MOSAIC.linear_transpose(g, random_weight((64, 384), 64, False).arrays, spec=spec)


@SERVED
def test_too_many_results():
    weight = random_weight((8, 256), 64, False, dtype="bfloat16")
    x = jax.ShapeDtypeStruct((2**21 + 1, 256), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="at most 536870912 elements; 2097153 rows have"):
        jax.eval_shape(
            lambda x: MOSAIC.linear(x, weight.arrays, None, spec=weight.quant_state.spec), x
        )


def test_other_operations():
    with pytest.raises(NotImplementedError, match="to quantize a weight, 'pallas', 'xla'"):
        q4jax.quantize_4bit(jnp.ones((8, 128)), implementation="mosaic_gpu")
    weight = random_weight((64, 256))
    with pytest.raises(NotImplementedError, match="to dequantize a weight, 'pallas', 'xla'"):
        q4jax.dequantize_4bit(weight, implementation="mosaic_gpu")


@SERVED
@pytest.mark.parametrize("capability", ["8.0", "8.9", "10.0", "12.0"])
def test_another_gpu(monkeypatch, capability):
    monkeypatch.setattr(jax, "devices", lambda *_: [Hopper(), Hopper(capability)])
    with pytest.raises(
        NotImplementedError, match=rf"needs .* 9\.0 \(Hopper\); .* has {capability}"
    ):
        traced_anew()


def test_an_older_jax(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    with pytest.raises(NotImplementedError, match="needs jax 0.11; this is"):
        traced_anew()


@SERVED
def test_no_rows():
    assert linear(m=0).shape == (0, 64)


def test_never_chosen_by_itself():
    assert not MOSAIC.is_preferred("linear", jnp.dtype(jnp.bfloat16), 1)
