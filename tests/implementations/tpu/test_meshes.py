"""Programs compiled for several TPUs: only codes and scales move, and Auto axes are an error."""

import jax
import jax.numpy as jnp
import pytest
from collectives import collectives  # on the path by tests/conftest.py
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import q4jax
from tests.support.tpu.targets import MISSING, TOPOLOGIES, compiled, mesh_of

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
N, K = 512, 1024
SPLITS = {
    "columns": (P("batch"), P("part", None)),
    "rows": (P("batch", None, "part"), P(None, "part")),
    "fsdp on the inputs": (P("batch"), P("part", "batch")),
    "fsdp on the outputs": (P("batch", None, "part"), P("batch", "part")),
}


def on(mesh, spec, *shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def quantize(w):
    return q4jax.Params4bit.quantize(w, 64, True, "nf4", check_finite=False)


def weight_on(mesh, spec):
    weight = jax.eval_shape(quantize, jax.ShapeDtypeStruct((N, K), jnp.bfloat16))
    return jax.tree.map(
        lambda a: on(mesh, spec if a.ndim == 2 else P(), *a.shape, dtype=a.dtype), weight
    )


def step(x, weight):
    y, vjp = jax.vjp(lambda x: q4jax.matmul_4bit(x, weight), x)
    return vjp(y)[0]


def like_weight(shape):
    """Whether it is the weight, a part of it or of its even columns; no batch has these sizes."""
    sizes = {n // d for n in (N, K) for d in (1, 2, 4, 8, 16)}
    return set(shape) <= sizes | {1, 2} and jnp.prod(jnp.array(shape)) >= N * K // 16


@pytest.mark.parametrize("chip", TOPOLOGIES)
@pytest.mark.parametrize("split", SPLITS)
def test_codes_and_scales_move(split, chip):
    mesh = mesh_of(chip, AxisType.Explicit, batch=4, part=2)
    x_spec, w_spec = SPLITS[split]
    with jax.set_mesh(mesh):
        program = compiled(step, on(mesh, x_spec, 12, 100, K), weight_on(mesh, w_spec))
    found = collectives(program.text)
    assert not [c for c in found if c.is_float and like_weight(c.shape)]
    gathered = {c.dtype for c in found if c.kind == "all-gather" and c.size >= N * K // 16}
    assert ("u8" in gathered) == ("fsdp" in split), found


@pytest.mark.parametrize("spec", [P("part", "batch"), P("batch", None)], ids=str)
def test_quantizing_and_dequantizing_stay_where_they_are(spec):
    mesh = mesh_of("v5e", AxisType.Explicit, batch=4, part=2)
    with jax.set_mesh(mesh):
        programs = [
            compiled(quantize, on(mesh, spec, N, K)),
            compiled(q4jax.Params4bit.dequantize, weight_on(mesh, spec)),
        ]
    for program in programs:
        assert all(c.size <= N * K // 64 for c in collectives(program.text))


@pytest.mark.parametrize("call", [step, lambda x, weight: weight.dequantize()])
def test_auto_axes_are_an_error_before_compiling(call):
    mesh = mesh_of("v5e", AxisType.Auto, batch=4, part=2)
    args = on(mesh, P("batch"), 12, 100, K), weight_on(mesh, P("part", "batch"))
    with pytest.raises(NotImplementedError, match="on 8 TPUs with Auto mesh axes.*Explicit"):
        jax.jit(call).lower(*args)


def test_auto_axes_of_one_chip():
    mesh = mesh_of("v5e", AxisType.Auto, batch=1)
    assert compiled(step, on(mesh, P(), 12, 100, K), weight_on(mesh, P())).text


@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_inside_shard_map(chip):
    mesh = mesh_of(chip, AxisType.Auto, batch=8)
    weight = weight_on(mesh, P())
    function = jax.shard_map(
        step, mesh=mesh, in_specs=(P("batch"), P()), out_specs=P("batch"), check_vma=False
    )
    program = compiled(function, on(mesh, P("batch"), 16, 100, K), weight)
    assert not collectives(program.text)
