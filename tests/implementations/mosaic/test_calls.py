"""How the TPU kernels behave as part of jax programs, and what is refused."""

import importlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

import q4jax
from q4jax import Params4bit
from q4jax.ops.registry import AUTOMATIC, IMPLEMENTATIONS
from q4jax.pallas.tpu import requirements
from q4jax.pallas.tpu.placement import formats
from tests.support.random_arrays import normal, random_weight

SIMULATED = {"implementation": "pallas_tpu_interpret"}
COMPILED = {"implementation": "pallas"}
CALLS = {
    "quantize": lambda weight, **kw: q4jax.quantize_4bit(jnp.ones((128, 256)), **kw),
    "dequantize": lambda weight, **kw: q4jax.dequantize_4bit(weight, **kw),
    "linear": lambda weight, **kw: q4jax.matmul_4bit(jnp.ones((2, 256)), weight, **kw),
    "linear_transpose": lambda weight, **kw: jax.grad(
        lambda x: q4jax.matmul_4bit(x, weight, **kw).sum()
    )(jnp.ones((2, 256))),
}


@pytest.fixture(scope="module")
def weight():
    return random_weight((128, 256))


def lower_for_tpu(function, *args, kind="TPU v5 lite"):
    """The program as a TPU would get it; no libtpu is needed."""
    device = AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    mesh = AbstractMesh((1,), ("x",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(function).trace(*args).lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("name", CALLS)
def test_pallas_lowers_to_mosaic_for_a_tpu(weight, name):
    text = lower_for_tpu(lambda w: CALLS[name](w, **COMPILED), weight)
    assert f"q4jax_tpu_{name}" in text
    assert "triton" not in text


def test_none_takes_xla_on_a_tpu(weight):
    """Until docs/tpu.md has a run on a TPU."""
    assert "q4jax_tpu" not in lower_for_tpu(lambda w: CALLS["linear"](w), weight)
    assert "tpu" not in AUTOMATIC
    simulated = IMPLEMENTATIONS["pallas_tpu_interpret"]
    assert not simulated.is_preferred("linear", np.dtype("float32"), 1)


def test_pallas_interpret_is_that_of_gpus(weight):
    """The rule in docs/tpu.md: each name simulates the kernels of one platform, anywhere."""
    x = jnp.ones((2, 256))

    def kernel(name):
        call = jax.make_jaxpr(lambda x: q4jax.matmul_4bit(x, weight, implementation=name))
        return str(call(x))

    assert "q4jax_tpu_linear" in kernel("pallas_tpu_interpret")
    assert "q4jax_tpu_linear" not in kernel("pallas_interpret")


@pytest.mark.parametrize("kind", ["TPU v2", "TPU v3", "TPU v4", "TPU v4 lite"])
def test_a_chip_without_gathers(weight, kind):
    jax.clear_caches()
    expected = rf"'pallas' looks codes up by gathers along sublanes, which {kind} does not have"
    with pytest.raises(NotImplementedError, match=expected):
        lower_for_tpu(lambda w: CALLS["linear"](w, **COMPILED), weight, kind=kind)


def test_a_visible_chip_without_gathers(monkeypatch):
    old = types.SimpleNamespace(platform="tpu", device_kind="TPU v3")
    monkeypatch.setattr(requirements.jax, "devices", lambda: [old])
    with pytest.raises(NotImplementedError, match="TPU v3 does not have; TPU v5e and newer do"):
        requirements.check_chip("pallas")


@pytest.mark.parametrize("version", ["0.0.41", "0.0.9"])
def test_an_old_libtpu(monkeypatch, version):
    monkeypatch.setattr(requirements.metadata, "version", lambda _: version)
    with pytest.raises(NotImplementedError, match=f"needs libtpu 0.0.42 or newer, not {version}"):
        requirements.check_libtpu("pallas")


@pytest.mark.parametrize("version", ["0.0.42", "0.0.50.1", "0.1.0", "1.0.0.dev20270101+nightly"])
def test_a_new_libtpu(monkeypatch, version):
    monkeypatch.setattr(requirements.metadata, "version", lambda _: version)
    requirements.check_libtpu("pallas")


def test_a_jax_without_the_operations(monkeypatch):
    backend = types.SimpleNamespace(CompilerParams=1, InterpretParams=1, bitcast=1)
    monkeypatch.setattr(importlib, "import_module", lambda name: backend)
    expected = "needs PrefetchScalarGridSpec, pack_elementwise of Pallas, which jax"
    with pytest.raises(NotImplementedError, match=expected):
        requirements.check_pallas("pallas")


def test_float16():
    """Products are refused; weights of that dtype are decoded and quantized."""
    weight = random_weight((128, 256), dtype="float16")
    with pytest.raises(NotImplementedError, match="products in bfloat16 and float32 on TPUs"):
        q4jax.matmul_4bit(jnp.ones((2, 256), "float16"), weight, **SIMULATED)
    found = q4jax.dequantize_4bit(weight, **SIMULATED)
    assert found.dtype == jnp.float16
    np.testing.assert_array_equal(found, q4jax.dequantize_4bit(weight))


@pytest.mark.parametrize("kernels", [SIMULATED, COMPILED], ids=["simulated", "compiled"])
def test_x64_is_refused(weight, kernels):
    x = jnp.ones((2, 256), "float32")
    expected = pytest.raises(NotImplementedError, match="jax_enable_x64=True on TPUs")
    with jax.enable_x64(True), expected:
        lower_for_tpu(lambda x, w: q4jax.matmul_4bit(x, w, **kernels), x, weight)


def test_blocks_that_cross_rows():
    flat = Params4bit.quantize(normal(0, 70, 192), 128, False, "nf4")
    with pytest.raises(NotImplementedError, match="needs rows that are whole blocks"):
        q4jax.matmul_4bit(jnp.ones((2, 192)), flat, **SIMULATED)


def test_formats_keep_leading_axes_major():
    stack = jax.vmap(lambda w: Params4bit.quantize(w, 64, True, "nf4"))(normal(0, 3, 128, 256))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    spec = stack.quant_state.spec
    found = formats(stack.arrays, here, spec)
    orders = [f.layout.major_to_minor for f in found]
    assert orders == [(0, 2, 1), (0, 2, 1), (0, 1), (0,)]
    assert {f.sharding for f in found} == {here}
    plain = formats(random_weight((128, 256), nested=False).arrays, here, spec)
    assert [f and f.layout.major_to_minor for f in plain] == [(1, 0), (1, 0), None, None]
    flat = Params4bit.quantize(normal(0, 70, 192), 128, False, "nf4")
    with pytest.raises(ValueError, match="matrices in rows of whole blocks, not nf4_b128"):
        formats(flat.arrays, here, flat.quant_state.spec)
