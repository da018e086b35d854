"""How the kernels behave as part of jax programs, and what is refused."""

import importlib
import re
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

import q4jax
from q4jax import Params4bit
from q4jax.gpu import requirements as backend
from q4jax.gpu import tiles
from q4jax.pallas import implementation as operations
from tests.support.implementations import QUICK
from tests.support.products import assert_product
from tests.support.random_arrays import normal

KERNELS = {"implementation": "pallas_interpret"}
GPU = {"implementation": "pallas"}


@pytest.fixture(scope="module")
def weight():
    return Params4bit.quantize(normal(0, 70, 192), 64, True, "nf4")


def lower_for_gpu(function, *args, kind="NVIDIA H200"):
    """The program as a GPU would get it; no GPU is needed, nor a plugin for one."""
    device = AbstractDevice(device_kind=kind, num_cores=132, platform="cuda")
    mesh = AbstractMesh((1,), ("x",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def test_second_order(weight):
    x = normal(1, 3, 192)

    def loss(x, **kwargs):
        return (q4jax.matmul_4bit(x, weight, **kwargs) ** 2).sum()

    def gradient_of_norm(**kwargs):
        return jax.grad(lambda x: (jax.grad(loss)(x, **kwargs) ** 2).sum())(x)

    found, expected = gradient_of_norm(**KERNELS), gradient_of_norm()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_vmap_over_stacked_weights_and_scan():
    w = normal(0, 3, 40, 64)
    stacked = jax.vmap(lambda w: Params4bit.quantize(w, 64, True, "nf4"))(w)
    x = normal(1, 3, 4, 64)
    weights = [jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(3)]
    expected = [q4jax.matmul_4bit(x[i], weights[i]) for i in range(3)]
    mapped = jax.vmap(lambda x, weight: q4jax.matmul_4bit(x, weight, **KERNELS))(x, stacked)
    np.testing.assert_allclose(mapped, jnp.stack(expected), rtol=2e-5, atol=2e-5)
    shared = jax.vmap(lambda x: q4jax.matmul_4bit(x, weights[0], **KERNELS))(x)
    np.testing.assert_allclose(shared[0], expected[0], rtol=2e-5, atol=2e-5)
    _, scanned = jax.lax.scan(
        lambda _, xs: (None, q4jax.matmul_4bit(*xs, **KERNELS)), None, (x, stacked)
    )
    np.testing.assert_array_equal(scanned, mapped)
    np.testing.assert_array_equal(
        q4jax.dequantize_4bit(stacked, **KERNELS), q4jax.dequantize_4bit(stacked)
    )


def test_a_layer_takes_the_implementation():
    from flax import nnx

    model = nnx.Linear(64, 40, rngs=nnx.Rngs(0))
    found = q4jax.Linear4bit.from_linear(model, quant_type="nf4", implementation="pallas_interpret")
    expected = q4jax.Linear4bit.from_linear(model, quant_type="nf4")
    x = normal(1, 3, 64)
    np.testing.assert_allclose(found(x), expected(x), rtol=1e-5, atol=1e-5)
    gradient = nnx.grad(lambda m, x: (m(x) ** 2).sum())(found, x)
    assert {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(gradient)} == {"bias"}


CALLS = {
    "quantize_4bit": lambda weight, **kw: q4jax.quantize_4bit(jnp.ones((4, 64)), **kw),
    "dequantize_4bit": lambda weight, **kw: q4jax.dequantize_4bit(weight, **kw),
    "matmul_4bit": lambda weight, **kw: q4jax.matmul_4bit(jnp.ones((2, 192)), weight, **kw),
    "gradient": lambda weight, **kw: jax.grad(lambda x: q4jax.matmul_4bit(x, weight, **kw).sum())(
        jnp.ones((2, 192))
    ),
}


# The one result that has the size of a weight.
RESULT = dict.fromkeys(CALLS, "-") | {"dequantize_4bit": "tensor<70x192xf32>"}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("jit", [False, True])
def test_without_a_gpu(weight, name, jit):
    call = (
        (lambda w: CALLS[name](w, **GPU)) if not jit else jax.jit(lambda w: CALLS[name](w, **GPU))
    )
    with pytest.raises(NotImplementedError) as error:
        call(weight)
    message = str(error.value)
    served = "implementation='pallas' runs on NVIDIA GPUs and TPUs and this program is for"
    assert message.startswith(served)
    assert "cpu" in message and "'xla'" in message and "'pallas_interpret'" in message
    assert "\n" not in message


@pytest.mark.parametrize("name", CALLS)
def test_the_same_call_lowers_for_a_gpu(weight, name):
    """From this machine, which has none; and jax's notice about its Triton backend stays inside."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = lower_for_gpu(lambda w: CALLS[name](w, **GPU), weight)
    kernel = (
        name.removesuffix("_4bit")
        .replace("matmul", "linear")
        .replace("gradient", "linear_transpose")
    )
    assert f"q4jax_{kernel}" in text
    assert text.count("__gpu$xla.gpu.triton") == 1
    assert not re.search(r"tensor<(70x192|192x70)x(f32|bf16)>", text.replace(RESULT[name], ""))


def test_under_vmap_for_a_gpu():
    w = normal(0, 3, 64, 128)
    stacked = jax.vmap(lambda w: Params4bit.quantize(w, 64, True, "nf4"))(w)
    mapped = jax.vmap(lambda x, weight: q4jax.matmul_4bit(x, weight, **GPU))
    text = lower_for_gpu(mapped, normal(1, 3, 4, 128, dtype="bfloat16"), stacked)
    assert text.count("__gpu$xla.gpu.triton") == 1


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_scan_over_numbers_gives_the_kernel_the_stack(direction):
    """It cuts nothing as large as a weight out of the stack; a scan over the stack does."""
    stack = jax.vmap(lambda w: Params4bit.quantize(w, 64, True, "nf4"))(normal(0, 3, 128, 128))

    def run(x, stack, numbers):
        def layer(x, own):
            weight = own if numbers is None else q4jax.weight_of_stack(stack, own)
            return q4jax.matmul_4bit(x, weight, **GPU), None

        return jax.lax.scan(layer, x, stack if numbers is None else numbers)[0].sum()

    run = jax.grad(run) if direction == "backward" else run
    x = normal(1, 3, 128)
    cut = re.compile(r"dynamic_slice.*-> tensor<1x128x64xui8>")
    assert cut.search(lower_for_gpu(lambda x: run(x, stack, None), x))
    text = lower_for_gpu(lambda x: run(x, stack, jnp.arange(3)), x)
    assert not cut.search(text)
    assert text.count("custom_call @__gpu$xla.gpu.triton") == 1
    assert re.search(r"custom_call @__gpu\$xla.gpu.triton\(.*tensor<3x128x2x8xi32>", text)


def test_none_takes_xla_on_a_gpu(weight):
    """Until the ledger in docs/gpu.md has seen the kernels right on hardware."""
    text = lower_for_gpu(lambda w: CALLS["matmul_4bit"](w), weight)
    assert "triton" not in text


def test_none_takes_a_verified_kernel(weight, monkeypatch):
    """On a GPU of the ledger, up to the crossover, and without noise for a call that the kernels
    cannot serve; on another platform never."""
    gpu = types.SimpleNamespace(
        platform="gpu", compute_capability="9.0", device_kind="NVIDIA H200", id=0
    )
    monkeypatch.setattr(operations.jax, "devices", lambda: [gpu])
    flat = Params4bit.quantize(normal(0, 70, 192), 128, False, "nf4")

    def kernels(weight, rows=2):
        jax.clear_caches()
        call = lambda w: q4jax.matmul_4bit(jnp.ones((rows, 192)), w)  # noqa: E731
        return lower_for_gpu(call, weight).count("__gpu$xla.gpu.triton")

    assert kernels(weight) == 0
    monkeypatch.setattr(tiles, "verified", lambda: ("NVIDIA H200",))
    assert kernels(weight) == 1
    most = tiles.crossover("linear", "float32")
    assert (kernels(weight, most), kernels(weight, most + 1)) == (1, 0)
    assert kernels(flat) == 0
    assert_product(jax.jit(CALLS["matmul_4bit"])(weight), jnp.ones((2, 192)), weight.dequantize())
    monkeypatch.setattr(tiles, "verified", lambda: ("NVIDIA A100",))
    assert kernels(weight) == 0
    jax.clear_caches()


@pytest.mark.parametrize("implementation", ["pallas", "pallas_interpret"])
def test_blocks_that_cross_rows(implementation):
    flat = Params4bit.quantize(normal(0, 70, 192), 128, False, "nf4")
    expected = (
        rf"implementation='{implementation}' needs rows that are whole blocks; the last axis of "
        r"\(70, 192\) is not a multiple of blocksize 128"
    )
    for call in (
        lambda: q4jax.dequantize_4bit(flat, implementation=implementation),
        lambda: q4jax.matmul_4bit(jnp.ones((2, 192)), flat, implementation=implementation),
        lambda: q4jax.quantize_4bit(jnp.ones((70, 192)), 128, implementation=implementation),
    ):
        with pytest.raises(NotImplementedError, match=expected):
            call()


# The most blocks of 64 that the kernels number in 32 bits, in rows of 2048 blocks.
MOST_ROWS = (2**31 - 2**13) // 2**11


def abstract_weight(rows, lead=()):
    w = jax.ShapeDtypeStruct((*lead, rows, 2**17), jnp.bfloat16)

    def quantize(w):
        return Params4bit.quantize(w, 64, True, "nf4", implementation="xla")

    for _ in lead:
        quantize = jax.vmap(quantize)
    return w, jax.eval_shape(quantize, w)


@pytest.mark.parametrize("rows", [MOST_ROWS, MOST_ROWS + 1])
def test_the_largest_weight(rows):
    w, weight = abstract_weight(rows)
    x = jax.ShapeDtypeStruct((1, 2**17), jnp.bfloat16)
    for function, *args in (
        (lambda w: q4jax.quantize_4bit(w, **GPU), w),
        (lambda weight: q4jax.dequantize_4bit(weight, **GPU), weight),
        (lambda x, weight: q4jax.matmul_4bit(x, weight, **GPU), x, weight),
    ):
        if rows == MOST_ROWS:
            jax.eval_shape(function, *args)
        else:
            with pytest.raises(NotImplementedError, match="at most 2147475456 blocks.*2147477504"):
                jax.eval_shape(function, *args)


@pytest.mark.parametrize(("count", "works"), [(2, True), (3, False), (4, False), (5, True)])
def test_a_stack_of_bytes_that_pallas_cannot_address(count, works):
    """Each weight has 2^30 scales of 8 bits; the kernel is launched once for all."""
    _, weight = abstract_weight(2**19, (count,))
    x = jax.ShapeDtypeStruct((count, 1, 2**17), jnp.bfloat16)

    def products(x, weight):
        return jax.vmap(lambda x, weight: q4jax.matmul_4bit(x, weight, **GPU))(x, weight)

    if works:
        jax.eval_shape(products, x, weight)
    else:
        with pytest.raises(NotImplementedError, match=rf"cannot address uint8\[{count}, 524288"):
            jax.eval_shape(products, x, weight)


@pytest.mark.parametrize("capability", ["7.5", "6.0"])
def test_an_old_gpu(weight, monkeypatch, capability):
    jax.clear_caches()  # a trace of the same call would not look at the devices again
    old = types.SimpleNamespace(
        platform="gpu", compute_capability=capability, device_kind="Tesla T4"
    )
    monkeypatch.setattr(backend.jax, "devices", lambda: [old])
    with pytest.raises(NotImplementedError, match=f"8.0 .Ampere.*Tesla T4 has {capability}; 'xla'"):
        CALLS["matmul_4bit"](weight, **GPU)


def test_a_jax_without_the_triton_backend(weight, monkeypatch):
    def missing(name):
        raise ImportError(name)

    backend.triton.cache_clear()
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(NotImplementedError, match="needs Pallas's Triton backend, which jax"):
        backend.triton("pallas")
    monkeypatch.undo()
    assert backend.triton() is not None


def test_tiles():
    """Every M has a tile; sums are split only where there are too few programs, and none idles."""
    for transpose in (False, True):
        for dtype in ("float32", "bfloat16"):
            for m in (1, 16, 17, 64, 100, 4096, 10**7):
                for shape in ((4096, 4096), (70, 64), (28672, 8192)):
                    tile = tiles.choose(m, shape, dtype, transpose=transpose)
                    summed, step = (shape[0], tile.n) if transpose else (shape[1], tile.k)
                    steps = -(-summed // step)
                    assert 1 <= tile.splits <= steps
                    assert (tile.splits - 1) * -(-steps // tile.splits) < steps
    assert tiles.choose(1, (4096, 4096), "bfloat16", transpose=False).splits > 1
    assert tiles.choose(4096, (4096, 4096), "bfloat16", transpose=False).splits == 1


def test_results_do_not_depend_on_the_run(weight):
    """Split sums are added in one order."""
    big = Params4bit.quantize(normal(0, 70, 4096), 64, True, "nf4")
    x = normal(1, 3, 4096)
    assert tiles.choose(3, (70, 4096), "float32", transpose=False).splits > 1
    call = jax.jit(lambda x: q4jax.matmul_4bit(x, big, **KERNELS)).lower(x).compile(QUICK)
    np.testing.assert_array_equal(call(x), call(x))
    assert_product(call(x), x, np.asarray(big.dequantize()), roundings=16)
