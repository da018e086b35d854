"""A Llama loaded onto a mesh: shardings and results."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, PartitionSpec

import q4jax
from q4jax.models import Llama, LlamaConfig, LlamaShardings, from_pretrained, save_pretrained
from tests.support.random_weights import CASES, entries_of
from tests.support.vectors import GOLDEN

LLAMA = GOLDEN / "llama_tiny_bnb4"
# Every width is eight blocks of 32, or more.
WIDE = LlamaConfig(
    vocab_size=320,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    attention_bias=True,
    mlp_bias=True,
)
CODE = """
import sys
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import q4jax
from q4jax.models import LlamaShardings, from_pretrained
from q4jax.models import generate

LLAMA, WIDE, TIED = sys.argv[1:]
COLUMN, ROW = ("tensor", "fsdp"), ("fsdp", "tensor")
OUT_IN = dict.fromkeys(["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head"], COLUMN)
OUT_IN |= {"embed_tokens": (("tensor", "fsdp"), None), "o_proj": ROW, "down_proj": ROW}
ids = jnp.arange(24).reshape(2, 12) * 13 % 320
forward = nnx.jit(lambda model, ids: model(ids))


def check(model, mesh):
    "Every leaf is where the rules put it, and no device holds more than its part."
    split = 0
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        array, names = variable[...], [str(part) for part in path]
        module = next((name for name in names if name in OUT_IN), None)
        # The keys of a weight name its description: packed__nf4_..., absmax__nf4_...
        leaf = names[-1].split("__")[0]
        expected = P()
        if leaf in ("kernel", "embedding", "packed", "absmax"):
            tuples = [(a,) if isinstance(a, str) else a or () for a in OUT_IN[module]]
            axes = [tuple(a for a in part if a in mesh.axis_names) for part in tuples]
            axes = axes[::-1] if leaf == "kernel" else axes
            expected = P(*[None] * (names[0] == "layers"), *(part or None for part in axes))
            used = [axis for part in axes for axis in part]
            parts = int(np.prod([mesh.shape[axis] for axis in used]))
            split += parts > 1
            for shard in array.addressable_shards:
                assert shard.data.size * parts == array.size, (names, shard.data.shape)
        else:
            assert leaf in ("scale", "bias", "nested_absmax", "offset"), names
        wanted = NamedSharding(mesh, expected)
        assert array.sharding.is_equivalent_to(wanted, array.ndim), (names, array.sharding)
        assert len(array.addressable_shards) == mesh.size
    return split


def compare(path, shape, names, split, quantization=None, text=False):
    mesh = Mesh(np.array(jax.devices()[: np.prod(shape)]).reshape(shape), names)
    if quantization is None:
        model = from_pretrained(path, sharding=LlamaShardings(mesh, blocksize=32))
    else:
        model = from_pretrained(path, quantization, mesh=mesh)
    assert check(model, mesh) == split, check(model, mesh)
    key = path, quantization
    if key not in unsharded:
        one = from_pretrained(path, quantization)
        unsharded[key] = one, np.asarray(forward(one, ids))
    one, logits = unsharded[key]
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), nnx.state(one))
    error = np.abs(np.asarray(forward(model, ids)) - logits).max()
    assert error < 1e-5 * np.abs(logits).max(), error
    if text:
        tokens = generate(model, ids[:, :4], 4)
        np.testing.assert_array_equal(tokens, generate(one, ids[:, :4], 4))


unsharded = {}
assert len(jax.devices()) == 8
FSDP, TENSOR, BOTH = ("fsdp",), ("tensor",), ("fsdp", "tensor")
DENSE, CODES = 9, 16  # leaves that are split: codes and scales of seven projections, and two more
compare(LLAMA, (2, 2), BOTH, CODES, text=True)
compare(LLAMA, (4, 2), ("data", "fsdp"), CODES)
nested = q4jax.QuantConfig(blocksize=32)
for shape, names in [((8,), FSDP), ((8,), TENSOR), ((4, 2), BOTH), ((2, 4), BOTH)]:
    compare(WIDE, shape, names, DENSE)
    compare(WIDE, shape, names, CODES, nested)
head = q4jax.QuantConfig(blocksize=32, quant_type="fp4", compress_statistics=False, skip=())
compare(WIDE, (2, 2, 2), ("tensor", "data", "fsdp"), CODES + 1, head)
compare(TIED, (2, 4), BOTH, DENSE - 1)
print("done")
"""


def mesh_of(**sizes):
    """Return an abstract mesh that repeats one device."""
    return Mesh(np.full(tuple(sizes.values()), jax.devices()[0]), tuple(sizes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("wide")
    save_pretrained(Llama(WIDE, rngs=nnx.Rngs(2)), path)
    return path


@pytest.mark.slow
@pytest.mark.heavy
def test_eight_devices(folder, tmp_path):
    tied = dataclasses.replace(WIDE, tie_word_embeddings=True)
    save_pretrained(Llama(tied, rngs=nnx.Rngs(3)), tmp_path)
    flags = "--xla_force_host_platform_device_count=8"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    env["PYTHONPATH"] = str(Path(q4jax.__file__).parents[1])
    command = [sys.executable, "-c", CODE, LLAMA, folder, tmp_path]
    done = subprocess.run(command, env=env, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"


def test_a_mesh_of_one_device(forward, input_ids):
    mesh = mesh_of(fsdp=1, tensor=1)
    model = from_pretrained(LLAMA, mesh=mesh)
    packed = model.layers.mlp.down_proj.weight.packed[...]
    assert packed.sharding.mesh == mesh
    assert packed.sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    np.testing.assert_array_equal(
        forward(model, input_ids), forward(from_pretrained(LLAMA), input_ids)
    )


@pytest.mark.parametrize(
    ("sizes", "blocksize", "message"),
    [
        ({"tensor": 3}, None, "down_proj.kernel has 8 blocks .* 'tensor' of size 3 does not"),
        ({"fsdp": 3}, None, "down_proj.kernel has 256 rows, .* 'fsdp' of size 3 does not"),
        (
            {"data": 2, "fsdp": 5},
            64,
            r"down_proj.weight.absmax has 256 rows, which the mesh axis 'fsdp' of size 5",
        ),
        (
            {"data": 2, "tensor": 5},
            None,
            r"layers.\S*_proj.kernel has 8 blocks or features .* 5 does not divide, and 256 rows",
        ),
        ({"tensor": 2}, 1024, r"layers.\S*.weight.absmax is flat .* 'tensor' of size 2 does not"),
    ],
)
def test_axes_that_do_not_divide(folder, sizes, blocksize, message, monkeypatch):
    settings = blocksize and q4jax.QuantConfig(blocksize=blocksize)
    monkeypatch.setattr("q4jax.models.pretrained.loader.Loader.fill", None)  # it is found before
    with pytest.raises(ValueError, match=message) as error:
        from_pretrained(folder, settings, mesh=mesh_of(**sizes))
    assert "\n" not in str(error.value)


def test_a_vocabulary_that_the_mesh_does_not_divide_is_whole():
    rules = LlamaShardings(mesh_of(fsdp=2, tensor=2))

    def spec(name, *shape):
        return tuple(rules(name, jax.ShapeDtypeStruct(shape, np.float32)).spec)

    assert spec("embed_tokens.embedding", 258, 64) == (None, None)
    assert spec("lm_head.kernel", 128, 257) == ("fsdp", None)
    assert spec("lm_head.kernel", 64, 257) == ()


def test_an_axis_that_does_not_divide_the_blocks_splits_the_outputs():
    rules = LlamaShardings(mesh_of(fsdp=4, tensor=2), blocksize=64)

    def spec(name, *shape):
        return tuple(rules(f"layers.{name}", jax.ShapeDtypeStruct((2, *shape), np.float32)).spec)

    both = (None, ("tensor", "fsdp"), None)
    # 576 inputs are 9 blocks, which neither axis divides; 1536 are 24.
    for part, width in (("packed", 288), ("absmax", 9)):
        assert spec(f"self_attn.q_proj.weight.{part}", 192, width) == both
        assert spec(f"self_attn.o_proj.base.weight.{part}", 576, width) == both
    assert spec("self_attn.q_proj.kernel", 576, 192) == (None, None, ("tensor", "fsdp"))
    assert spec("mlp.down_proj.weight.absmax", 576, 24) == (None, "fsdp", "tensor")
    assert spec("mlp.down_proj.weight.packed__nf4_b64_n256", 576, 768) == (None, "fsdp", "tensor")
    with pytest.raises(ValueError, match="9 blocks or features in a row, .* and 100 rows"):
        spec("self_attn.q_proj.weight.absmax", 100, 9)


def test_adapters_are_split_over_tensor_as_their_layers():
    rules = LlamaShardings(mesh_of(fsdp=4, tensor=2))

    def spec(name, *shape):
        return tuple(rules(f"layers.{name}", jax.ShapeDtypeStruct((2, *shape), np.float32)).spec)

    whole = (None,) * 3
    assert spec("mlp.down_proj.lora_a", 1536, 8) == (None, "tensor", None)
    assert spec("mlp.down_proj.lora_b", 8, 576) == whole
    assert spec("self_attn.q_proj.lora_a", 576, 8) == whole
    assert spec("self_attn.q_proj.lora_b", 8, 192) == (None, None, "tensor")
    assert spec("self_attn.q_proj.lora_b", 8, 191) == whole, "which tensor does not divide"


def test_experts_go_over_their_axis():
    rules = LlamaShardings(mesh_of(expert=2, fsdp=2))
    kernel = jax.ShapeDtypeStruct((3, 4, 128, 64), np.float32)
    name = "layers.mlp.experts.up_proj.kernel"
    assert tuple(rules(name, kernel).spec) == (None, "expert", "fsdp", None)
    first = jax.ShapeDtypeStruct((3, 4, 128, 8), np.float32)
    adapter = "layers.mlp.experts.down_proj.lora_a"
    assert tuple(rules(adapter, first).spec) == (None, "expert", None, None)
    with pytest.raises(ValueError, match=r"has 3 experts, which the mesh axis 'expert' of size 2"):
        rules(name, jax.ShapeDtypeStruct((3, 3, 128, 64), np.float32))


def test_settings_of_other_blocks():
    """Different shardings of codes and scales are reported before weights are read."""
    model = nnx.eval_shape(lambda: Llama(WIDE, rngs=nnx.Rngs(0)))
    rules = LlamaShardings(mesh_of(fsdp=8), blocksize=32)
    sizes = {"layers.self_attn.q_proj": 64}
    with pytest.raises(ValueError, match=r"blocks of 64, the rules are for 32: its scales would"):
        rules.check(model, sizes)
    rules.check(model, {"layers.self_attn.q_proj": 32})


def test_a_flat_weight_on_axes_of_size_one(folder):
    settings = q4jax.QuantConfig(blocksize=512)
    model = from_pretrained(folder, settings, mesh=mesh_of(fsdp=1, tensor=1))
    assert model.layers.mlp.up_proj.weight.packed.sharding.spec == PartitionSpec()
    assert model.layers.mlp.down_proj.weight.packed.ndim == 3


def test_bad_meshes(folder):
    names = r"known axes are \('data', 'fsdp', 'tensor', 'expert'\)"
    for mesh in (mesh_of(model=1), mesh_of(fsdp=1, x=1), mesh_of()):
        with pytest.raises(ValueError, match=names):
            from_pretrained(folder, mesh=mesh)
    abstract = jax.sharding.AbstractMesh((1,), ("fsdp",))
    for other in ((8,), "fsdp", jax.devices(), abstract):
        with pytest.raises(TypeError, match=r"mesh must be a jax.sharding.Mesh, got"):
            from_pretrained(folder, mesh=other)
    both = (AxisType.Explicit, AxisType.Auto)
    for types in (both, both[::-1], (AxisType.Manual,) * 2):
        mixed = jax.make_mesh((1, 1), ("fsdp", "tensor"), axis_types=types)
        with pytest.raises(
            NotImplementedError, match=r"axis_types=\(jax.sharding.AxisType.Auto,\) \* 2"
        ):
            from_pretrained(folder, mesh=mixed)


def test_explicit_axes(folder):
    """One device of them: its program still has types with axes."""
    mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(AxisType.Explicit,))
    settings = q4jax.QuantConfig(blocksize=32)
    ids = np.arange(24).reshape(2, 12)
    with jax.set_mesh(mesh):
        model = from_pretrained(folder, settings, mesh=mesh)
        found = model(jax.device_put(ids, LlamaShardings(mesh).batch))
    wanted = np.asarray(from_pretrained(folder, settings)(ids))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_what_a_mapping_and_rules_refuse(folder):
    rules = LlamaShardings(mesh_of(fsdp=1))
    with pytest.raises(ValueError, match="mesh and sharding are both given"):
        from_pretrained(folder, mesh=rules.mesh, sharding=rules)
    array = jax.ShapeDtypeStruct((8, 8), np.float32)
    for name in ("kernel", "layers.mlp.router.table", ""):
        with pytest.raises(ValueError, match=f"{name} is not a variable of a Llama"):
            rules(name, array)


@pytest.mark.parametrize("case", CASES)
def test_each_variable_of_each_family_has_a_rule(case):
    """Matrices that the mesh divides are split, and what it does not divide is named."""
    config = LlamaConfig.from_hf(entries_of(case))
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    rules, split = LlamaShardings(mesh_of(fsdp=2, tensor=2), blocksize=2), {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        name = ".".join(map(str, path))
        spec = rules(name, jax.ShapeDtypeStruct(variable.shape, variable.dtype)).spec
        split[name] = any(axes is not None for axes in spec)
        assert not (split[name] and len(variable.shape) < 2), name
    small = (
        "gate",
        "router",
        "_a_proj",
        "in_proj_",
        "kv_a_proj",
        "per_layer",
        "layer.kernel",
        "wg",
    )
    kernels = {n: s for n, s in split.items() if n.endswith("kernel")}
    whole = [name for name, is_split in kernels.items() if not is_split]
    assert all(any(part in name for part in small) for name in whole), whole
    assert len(whole) < len(kernels)
