"""Loading, refusing, switching off; and custom calls that no q4jax function would make."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from q4jax.native import library
from tests.support.native_kernels import in_use

ADDRESS = {"quant_type": np.int64(0), "blocksize": np.int64(64)}


def operands(**changes):
    """Of a linear call [2, 128] x [8, 128], with some replaced."""
    named = {
        "x": jnp.ones((2, 128)),
        "packed": jnp.zeros((8, 64), jnp.uint8),
        "absmax": jnp.ones((8, 2)),
        "nested_absmax": jnp.zeros(0),
        "offset": jnp.zeros(()),
        "bias": jnp.zeros(0),
    }
    return tuple((named | changes).values())


def call(args, shape=(2, 8), dtype=jnp.float32, target="q4jax_linear", **changes):
    result = jax.ShapeDtypeStruct(shape, dtype)
    return jax.block_until_ready(jax.ffi.ffi_call(target, result)(*args, **ADDRESS | changes))


@in_use
def test_hostile_calls_are_refused():
    assert call(operands()).shape == (2, 8)
    u8 = jnp.uint8
    for args, changes in [
        (operands(x=jnp.ones((2, 64))), {}),
        (operands(x=jnp.ones(256)), {}),
        (operands(x=jnp.ones((2, 128), jnp.int32)), {}),
        (operands(packed=jnp.zeros((8, 63), u8)), {}),
        (operands(packed=jnp.zeros((0, 64), u8)), {}),
        (operands(packed=jnp.zeros((8, 64), jnp.int8)), {}),
        (operands(packed=jnp.zeros(512, u8)), {}),
        (operands(absmax=jnp.ones((8, 1))), {}),
        (operands(absmax=jnp.ones((8, 2), jnp.bfloat16)), {}),
        (operands(absmax=jnp.zeros((8, 2), u8)), {}),  # codes without their scales
        (operands(nested_absmax=jnp.zeros(1)), {}),
        (operands(absmax=jnp.zeros((8, 2), u8), nested_absmax=jnp.zeros(2)), {}),
        (operands(offset=jnp.zeros(1)), {}),
        (operands(bias=jnp.zeros(7)), {}),
        (operands(bias=jnp.zeros(8, jnp.int32)), {}),
        (operands(), {"shape": (2, 9)}),
        (operands(), {"shape": (16,)}),
        (operands(), {"dtype": jnp.bfloat16}),
        (operands(), {"quant_type": np.int64(2)}),
        (operands(), {"blocksize": np.int64(0)}),
        (operands(), {"blocksize": np.int64(-64)}),
        (operands(), {"blocksize": np.int64(48)}),
        (operands(), {"blocksize": np.int64(8192)}),
        (operands(), {"target": "q4jax_transposed"}),
    ]:
        with pytest.raises(jax.errors.JaxRuntimeError, match="q4jax: "):
            call(args, **changes)


@in_use
def test_status_and_forced():
    status = library.status()
    assert status.isa in status.available
    assert status.available[-1] == "portable"
    with pytest.raises(ValueError, match="isa must be one of .*'sse9'"), library.use_isa("sse9"):
        pass
    with library.use_isa("portable"):
        pass


@pytest.mark.parametrize(
    ("accepted", "message"),
    [
        ((0, 2), r"built for XLA's interface 0\.3, .* accepts 0\.2"),
        ((1, 3), r"built for XLA's interface 0\.3, .* accepts 1\.3"),
        (None, "does not say"),
    ],
)
def test_another_interface_is_refused(accepted, message):
    library.check_version((0, 3), (0, 3))
    library.check_version((0, 3), (0, 5))
    with pytest.raises(library._Unusable, match=message):
        library.check_version((0, 3), accepted)


def test_without_a_library(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "libq4jax.so")
    with pytest.raises(library._Unusable, match="not built: there is no libq4jax.so"):
        library._open()
    (tmp_path / "libq4jax.so").write_text("no library")
    with pytest.raises(library._Unusable, match="cannot be loaded"):
        library._open()


PROGRAM = """
import jax.numpy as jnp, q4jax, q4jax.native
print(q4jax.native.status())
w = q4jax.Params4bit.quantize(jnp.ones((8, 64)))
print(q4jax.matmul_4bit(jnp.ones((1, 64)), w)[0, 0])
q4jax.matmul_4bit(jnp.ones((1, 64)), w, implementation="native")
"""


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["0", "sse9", "portable"])
def test_the_environment_variable(setting):
    if setting != "0" and library.status().isa is None:
        pytest.skip(library.status().reason)
    env = os.environ | {library.VARIABLE: setting}
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True)
    lines = run.stdout.splitlines()
    assert lines[1] == "64.0"
    if setting == "portable":
        assert "isa='portable'" in lines[0]
        assert run.returncode == 0
    else:
        assert "isa=None" in lines[0]
        assert "NotImplementedError: implementation='native' is not in use" in run.stderr
        assert ("Q4JAX_NATIVE=0" if setting == "0" else "got sse9") in run.stderr
