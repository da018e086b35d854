"""`matmul_4bit` on meshes: the same numbers, and only codes and scales moved."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import q4jax
from q4jax.ops import registry
from tests.support.meshes import AUTO, EXPLICIT, mesh_of, normal, place, put

N, K = 480, 1536
X = normal(1, 24, 18, K) / 8  # no part of its 432 rows is as many as a part of the weight's
BIAS = normal(2, N)
SPLITS = {
    "columns": (P("batch"), P("part", None)),
    "rows": (P("batch", None, "part"), P(None, "part")),
    "both": (P("batch"), P("part", "batch")),
    "both, other way": (P("batch", None, "part"), P("batch", "part")),
    "fsdp on the inputs": (P("batch"), P(None, "batch")),
    "fsdp on the outputs": (P("batch"), P("batch", None)),
    "two axes on one": (P(("batch", "part")), P(("part", "batch"), None)),
    "sequence": (P("batch", "part"), P("part", "batch")),
    "batch whole": (P(), P("part", "batch")),
    "weight whole": (P(("batch", "part")), P()),
}
MESHES = {"4x2": {"batch": 4, "part": 2}, "2x3": {"batch": 2, "part": 3}, "8": {"batch": 8}}


def weight_of(nested=True, quant_type="nf4", blocksize=64):
    return q4jax.Params4bit.quantize(normal(0, N, K), blocksize, nested, quant_type)


def loss(x, weight, bias, implementation=None):
    y = q4jax.matmul_4bit(x, weight, bias=bias, implementation=implementation)
    return jnp.sum(jnp.tanh(y / 16).astype(jnp.float32)), y


run = jax.jit(jax.value_and_grad(loss, (0, 2), has_aux=True), static_argnames="implementation")


def on(mesh, spec):
    """`spec` without the axes that the mesh does not have."""

    def known(entry):
        names = entry if isinstance(entry, tuple) else (entry,)
        return tuple(n for n in names if n in mesh.axis_names) or None

    return P(*map(known, spec))


def like_weight(shape):
    """Whether it is the weight, or a part of it that one of eight devices may have."""
    parts = [{n // d for d in (1, 2, 3, 4, 6, 8)} for n in (N, K)]
    return len(shape) == 2 and any(
        shape[a] in parts[0] and shape[b] in parts[1] for a, b in ((0, 1), (1, 0))
    )


def close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = (np.asarray(v, np.float32) for v in (a, b))
        np.testing.assert_allclose(a, b, rtol=0, atol=4e-6 * max(np.abs(b).max(), 1))


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("split", SPLITS)
def test_equals_one_device_and_moves_bytes(split, mesh, kind, moved):
    mesh = mesh_of(kind, **MESHES[mesh])
    x_spec, w_spec = (on(mesh, spec) for spec in SPLITS[split])
    weight = weight_of()
    expected = run(X, weight, BIAS)
    args = put(X, mesh, *x_spec), place(weight, mesh, w_spec), put(BIAS, mesh)
    with jax.set_mesh(mesh) if kind == EXPLICIT else contextlib.nullcontext():
        close(run(*args), expected)
        found = moved(run, *args)
    assert not [c for c in found if c.is_float and like_weight(c.shape)]
    gathered = [c for c in found if c.kind == "all-gather" and not c.is_float]
    if "fsdp" in split:
        # In the forward pass and, as they are not kept, in the backward pass; or once for both.
        assert {c.shape for c in gathered} == {(N, K // 2), (N, K // 64)}, found
        assert {c.dtype for c in gathered} == {"u8"}


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_settings(quant_type, nested, dtype):
    mesh = mesh_of(batch=2, part=4)
    weight, x = weight_of(nested, quant_type, 128), X.astype(dtype)
    sharded = place(weight, mesh, P("batch", "part"))
    y = jax.jit(q4jax.matmul_4bit)(put(x, mesh, "batch", None, "part"), sharded)
    whole = q4jax.matmul_4bit(x, weight)
    assert y.dtype == whole.dtype == dtype
    eps = float(jnp.finfo(dtype).eps)
    # Each of four partial sums is rounded to the dtype, and so is their sum, step by step.
    bound = 4e-6 if dtype == "float32" else 4 * eps
    error = np.abs(np.asarray(y, np.float32) - np.asarray(whole, np.float32)).max()
    assert error <= bound * float(jnp.abs(whole).max()), error


IMPLEMENTATIONS = ["xla", "pallas_interpret", "native"]


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_kernel_sees_its_shard(implementation, kind, monkeypatch):
    """An opaque kernel gets the shard of each device, in both directions, and nothing larger."""
    if implementation == "native" and q4jax.native.status().isa is None:
        pytest.skip("the native kernels are not built here")
    weight, seen = weight_of(), set()
    chosen = type(registry.IMPLEMENTATIONS[implementation])

    def spy(op):
        original = getattr(chosen, op)

        def call(self, x, arrays, *bias, spec):
            seen.add((op, x.shape, arrays.packed.shape, arrays.absmax.shape, spec.nested))
            return original(self, x, arrays, *bias, spec=spec)

        monkeypatch.setattr(chosen, op, call)

    jax.clear_caches()
    spy("linear")
    spy("linear_transpose")
    mesh = mesh_of(kind, batch=2, part=4)
    # More elements than codes in both directions, or the compiler would rather move activations.
    x = jnp.tile(X, (1, 3, 1))
    args = put(x, mesh, "batch"), place(weight, mesh, P("part", "batch")), put(BIAS, mesh)
    with jax.set_mesh(mesh) if kind == EXPLICIT else contextlib.nullcontext():
        found = run(*args, implementation)
    shards = {shape for shape in seen if shape[2] != (N, K // 2)}
    rows, mine = x.shape[0] * x.shape[1] // 2, N // 4
    assert shards == {
        ("linear", (rows, K), (mine, K // 2), (mine, K // 64), False),
        ("linear_transpose", (rows, mine), (mine, K // 2), (mine, K // 64), False),
    }
    monkeypatch.undo()
    jax.clear_caches()
    close(found, run(x, weight, BIAS))


@pytest.mark.parametrize("check_vma", [False, True])
def test_inside_shard_map(check_vma):
    mesh = mesh_of(batch=4, part=2)
    weight = weight_of(nested=False)

    def partial(x, packed, absmax):
        spec = q4jax.QuantSpec.from_shape((N, K // 2), "float32", "nf4", 64, False)
        state = q4jax.QuantState(absmax, None, None, spec)
        return jax.lax.psum(q4jax.matmul_4bit(x, packed, state), "part")

    function = jax.shard_map(
        partial,
        mesh=mesh,
        in_specs=(P("batch", None, "part"), P(None, "part"), P(None, "part")),
        out_specs=P("batch"),
        check_vma=check_vma,
    )
    y = jax.jit(function)(X, weight.packed, weight.quant_state.absmax)
    close(y, q4jax.matmul_4bit(X, weight))


def test_inside_a_shard_map_over_some_axes():
    mesh = mesh_of(batch=4, part=2)
    weight = place(weight_of(), mesh, P("part", None))
    function = jax.shard_map(
        q4jax.matmul_4bit,
        mesh=mesh,
        axis_names={"batch"},
        in_specs=(P("batch"), P()),
        out_specs=P("batch"),
        check_vma=False,
    )
    x = put(X, mesh, "batch")
    close(jax.jit(function)(x, weight), q4jax.matmul_4bit(X, weight_of()))
    kernel = jax.shard_map(
        lambda x, w: q4jax.matmul_4bit(x, w, implementation="pallas_interpret"),
        mesh=mesh,
        axis_names={"batch"},
        in_specs=(P("batch"), P()),
        out_specs=P("batch"),
        check_vma=False,
    )
    with pytest.raises(NotImplementedError, match=r"leaves the mesh axes \('part',\)"):
        jax.jit(kernel)(x, weight)


def test_axes_of_two_types():
    mesh = jax.make_mesh((4, 2), ("batch", "part"), axis_types=(AUTO, EXPLICIT))
    with jax.set_mesh(mesh), pytest.raises(NotImplementedError, match="make them of one type"):
        q4jax.matmul_4bit(X, weight_of())


def test_experts():
    mesh = mesh_of(expert=4, part=2)
    w = normal(0, 8, 128, 512)
    experts = jax.vmap(lambda w: q4jax.Params4bit.quantize(w, 64, True, "nf4"))(w)
    x = normal(1, 8, 16, 512)
    forward = jax.jit(jax.vmap(q4jax.matmul_4bit))
    y = forward(put(x, mesh, "expert"), place(experts, mesh, P("expert", None, "part")))
    assert y.sharding.spec == P("expert")
    close(y, forward(x, experts))


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_scan_of_rematerialized_layers(kind, moved):
    """A stack of layers: gathers of bytes inside the loop, one layer's at a time."""
    mesh = mesh_of(kind, batch=4, part=2)
    depth, width = 3, 512

    def quantize(w):
        return q4jax.Params4bit.quantize(w, 64, True, "nf4")

    stack = jax.vmap(quantize)(normal(0, depth, width, width) / 16)
    x = normal(1, 8, 32, width)

    def loss(x, stack):
        def layer(x, weight):
            y = jnp.tanh(q4jax.matmul_4bit(x, weight))
            # A type of its own there: the carry of a loop keeps it.
            lies = jax.typeof(x).sharding
            return jax.sharding.reshard(y, lies) if lies.mesh.axis_names else y, None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, stack)[0] ** 2)

    step = jax.jit(jax.value_and_grad(loss))
    args = put(x, mesh, "batch"), place(stack, mesh, P(None, "part", "batch"))
    with jax.set_mesh(mesh) if kind == EXPLICIT else contextlib.nullcontext():
        close(step(*args), step(x, stack))
        found = moved(step, *args)
    codes = [c for c in found if c.dtype == "u8" and c.size > width * width // 64]
    assert {c.shape[-2:] for c in codes} == {(width // 2, width // 2)}, found
    assert all(c.size == width * width // 4 for c in codes), "one layer at a time"
    assert all(c.size < width * width // 2 for c in found if c.is_float), found


def test_second_derivatives():
    mesh = mesh_of(batch=2, part=4)
    weight, x = weight_of(), X[:2, :2]

    def penalty(x, weight):
        return jnp.sum(jax.grad(lambda x: loss(x, weight, None)[0])(x) ** 2)

    second = jax.jit(jax.grad(penalty))
    found = second(put(x, mesh, "batch"), place(weight, mesh, P("part", "batch")))
    close(found, second(x, weight))


def test_a_program_that_names_no_mesh():
    """Shardings come from `jax.set_mesh` alone: the compiler's, translated to its axes."""
    mesh = mesh_of(batch=4, part=2)

    def make():
        w = jax.lax.with_sharding_constraint(normal(0, N, K), P("part", "batch"))
        weight = q4jax.Params4bit.quantize(w, 64, True, "nf4", check_finite=False)
        return q4jax.matmul_4bit(X, weight), weight

    with jax.set_mesh(mesh):
        y, weight = jax.jit(make)()
    assert weight.packed.sharding.is_equivalent_to(jax.NamedSharding(mesh, P("part", "batch")), 2)
    jax.tree.map(np.testing.assert_array_equal, weight, weight_of())
    close(y, q4jax.matmul_4bit(X, weight_of()))
