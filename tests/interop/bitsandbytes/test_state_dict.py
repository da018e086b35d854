"""State dicts and files: bitsandbytes' bytes, read and written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from q4jax import Params4bit, QuantSpec, QuantState
from q4jax.interop import bitsandbytes as bnb
from q4jax.interop import huggingface
from tests.support.trees import assert_same
from tests.support.vectors import GOLDEN, MANIFEST, tensors

STORAGES = ("uint8", "bfloat16", "float16", "float32")


@pytest.mark.parametrize("name", sorted(MANIFEST["linear4bit"]))
def test_golden_files_come_back_byte_for_byte(name, tmp_path):
    path, copy = GOLDEN / "linear4bit" / f"{name}.state_dict.safetensors", tmp_path / "copy"
    storage = MANIFEST["linear4bit"][name]["quant_storage"]
    tree = bnb.load_file(path)
    assert set(tree) <= {"weight", "bias"}
    bnb.save_file(tree, copy, storage)
    assert copy.read_bytes() == path.read_bytes()
    assert_same(bnb.from_state_dict(tensors(f"{name}.state_dict")), tree)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_golden_experts_come_back_byte_for_byte(quant_type, tmp_path):
    path = GOLDEN / "linear4bit" / f"moe3d_{quant_type}.state_dict.safetensors"
    tree = bnb.load_file(path)
    assert tree["expert_weights"].quant_state.shape == (3, 32, 64)
    bnb.save_file(tree, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", sorted(MANIFEST["embedding"]))
def test_golden_embeddings(name, tmp_path):
    file = bnb.load_file(GOLDEN / "linear4bit" / "embedding4bit.safetensors")
    table = Params4bit.quantize(file[f"{name}.w_orig"], 64, False, name[:3])
    state_dict = bnb.to_state_dict({"embedding": {"weight": table}})
    codes = np.asarray(file[f"{name}.packed"]).reshape(-1, 1)
    np.testing.assert_array_equal(state_dict["embedding.weight"], codes)
    np.testing.assert_array_equal(state_dict["embedding.weight.absmax"], file[f"{name}.absmax"])
    assert_same(bnb.from_state_dict(state_dict), {"embedding.weight": table})


@pytest.mark.parametrize("container", ["int8", "float64", *STORAGES])
def test_containers_hold_the_same_bytes(weight, state_dict, container):
    codes = state_dict["layer.weight"].reshape(-1).view(container).reshape(-1, 1)
    found = bnb.from_state_dict(state_dict | {"layer.weight": codes})
    assert_same(found["layer.weight"], weight)
    if container in STORAGES:
        written = bnb.to_state_dict(found, container)["layer.weight"]
        assert (written.dtype, written.tobytes()) == (codes.dtype, codes.tobytes())


def test_what_is_no_container(weight):
    with pytest.raises(ValueError, match="quant_storage must be one of .*, got 'int8'"):
        bnb.to_state_dict({"w": weight}, "int8")
    odd = Params4bit.quantize(jnp.ones((3, 33)))
    with pytest.raises(ValueError, match="w: 50 bytes of codes do not fill .*'float32' of 4"):
        bnb.to_state_dict({"w": odd}, "float32")
    assert_same(bnb.from_state_dict(bnb.to_state_dict({"w": odd}, "float16"))["w"], odd)


def test_the_result_shares_no_memory(state_dict):
    mine = {name: array.copy() for name, array in state_dict.items()}
    found = bnb.from_state_dict(mine)
    before = jax.tree.map(lambda a: np.array(a, copy=True), found)
    for array in mine.values():
        array[...] = 0
    assert_same(found, before)


def test_other_tensors_stay_what_they_are(tmp_path):
    tree = {
        "a": [jnp.arange(3), {"b": jnp.ones(2, jnp.bfloat16)}],
        "ids": np.array([2**40]),
        "empty": jnp.zeros((0, 3)),
        "scalar": jnp.float16(2),
        "bool": jnp.array([True, False]),
    }
    flat = {"a.0": tree["a"][0], "a.1.b": tree["a"][1]["b"]} | {
        k: tree[k] for k in tree if k != "a"
    }
    bnb.save_file(tree, tmp_path / "x", metadata={"format": "pt"})
    found = bnb.load_file(tmp_path / "x")
    assert_same(found, flat)
    assert isinstance(found["ids"], np.ndarray)  # as JAX it would be 32 bits
    library = {key: np.asarray(value) for key, value in flat.items()}
    safetensors.numpy.save_file(library, tmp_path / "y", metadata={"format": "pt"})
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def stack(lead):
    """A plain weight of 2 x 64 with these leading axes."""
    spec = QuantSpec("nf4", 64, 0, "float32", (2, 64))
    state = QuantState(np.ones((*lead, 2, 1), np.float32), None, None, spec)
    return Params4bit(np.zeros((*lead, 2, 32), np.uint8), state)


def test_as_many_axes_as_are_read_are_written(tmp_path):
    bnb.save_file({"x": stack((1,) * 6)}, tmp_path / "x")
    assert_same(bnb.load_file(tmp_path / "x"), {"x": stack((1,) * 6)})


@pytest.mark.parametrize(
    ("tree", "error", "message"),
    [
        (lambda w: nnx.Linear(2, 2, rngs=nnx.Rngs(0)), TypeError, "got a Linear"),
        (lambda w: {"a": 1.0}, TypeError, "a must be a Params4bit or an array, got float"),
        (lambda w: {"a": {"b": w}, "a.b": w}, ValueError, "two tensors .* 'a.b'"),
        (lambda w: {"a": w, "a.absmax": jnp.ones(1)}, ValueError, r"two .*\['a.absmax'\]"),
        (lambda w: {"a": w, "a.code": jnp.ones(1)}, ValueError, r"\['a.code'\]"),
        (lambda w: {"a.quant_map": jnp.ones(1)}, ValueError, "a 4-bit weight a that has no"),
        (lambda w: {"s": jax.tree.map(lambda a: jnp.stack([a]), w)}, ValueError, "s: a stacked"),
        (lambda w: {"x": Params4bit(w.packed[1:], w.quant_state)}, ValueError, "x: packed must"),
        (
            lambda w: {"x": stack((1,) * 7)},
            ValueError,
            r"x: shape .* up to 8 .*\[1, 1, 1, 1, 1, 1, 1, 2",
        ),
        (lambda w: {"x": stack((0,))}, ValueError, r"x: shape must hold positive .*\[0, 2, 64\]"),
        (lambda w: {"x": stack((2, 0))}, ValueError, r"x: shape must hold positive .*\[2, 0, 2"),
        (lambda w: {"__metadata__": jnp.ones(1)}, ValueError, "'__metadata__' is no name"),
        (lambda w: {"n" * 4090: w}, ValueError, r"is a name of 4\d\d\d characters"),
        (lambda w: {"k": jax.random.key(0)}, TypeError, "k: JAX array with PRNGKey dtype"),
    ],
)
def test_what_cannot_be_written(weight, tree, error, message, tmp_path):
    with pytest.raises(error, match=message):
        bnb.save_file(tree(weight), tmp_path / "x")
    with pytest.raises(error, match=message):
        huggingface.save_directory(tree(weight), tmp_path / "d", {})
    assert not list(tmp_path.iterdir())


def test_sharding_says_where_arrays_go(state_dict):
    asked = {}
    single = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def sharding(name, array):
        asked[name] = array
        return single

    found = bnb.from_state_dict(state_dict, sharding=sharding)
    parts = {"packed", "absmax", "nested_absmax", "offset"}
    assert set(asked) == {"layer.bias"} | {f"layer.weight.{part}" for part in parts}
    assert asked["layer.weight.packed"] == jax.ShapeDtypeStruct((96, 64), jnp.uint8)
    assert_same(found, bnb.from_state_dict(state_dict, sharding={"layer.bias": single}))
