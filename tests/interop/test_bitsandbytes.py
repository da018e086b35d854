"""State dicts and files: bitsandbytes' bytes, in and out; half of a weight is an error."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import q4jax
from q4jax import Params4bit
from q4jax.interop import bitsandbytes as bnb
from q4jax.nnx.variables import thaw
from tests.support.vectors import GOLDEN, MANIFEST, tensors

STORAGES = ("uint8", "bfloat16", "float16", "float32")
STATE = "layer.weight.quant_state.bitsandbytes__nf4"


def assert_same(found, expected):
    """Trees of one structure, with equal bytes."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture(scope="module")
def weight():
    w = jax.random.normal(jax.random.key(0), (96, 128))
    return Params4bit.quantize(w, quant_type="nf4", compress_statistics=True)


@pytest.fixture(scope="module")
def state_dict(weight):
    return weight.state_dict("layer.weight") | {"layer.bias": np.ones(96, np.float32)}


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


def change(**changes):
    """A state dict with keys of the layer exchanged; None removes one."""

    def apply(d):
        d = d | {f"layer.{key}": value(d[f"layer.{key}"]) for key, value in changes.items()}
        return {key: value for key, value in d.items() if value is not None}

    return apply


def gone(_):
    return None


def scalars(**values):
    def edit(array):
        fields = json.loads(array.tobytes()) | values
        return np.frombuffer(json.dumps(fields).encode(), np.uint8)

    return lambda d: d | {STATE: edit(d[STATE])}


def text(content):
    return lambda d: d | {STATE: np.frombuffer(content, np.uint8)}


def rename(old, new):
    return lambda d: {new if key == old else key: value for key, value in d.items()}


DEFECTS = {
    "codes": (change(weight=gone), "layer.weight has statistics but no codes"),
    "quant_state": (lambda d: {k: v for k, v in d.items() if k != STATE}, "has no quant_state"),
    "absmax": (change(**{"weight.absmax": gone}), "layer.weight: missing keys .*absmax"),
    "quant_map": (change(**{"weight.quant_map": gone}), "missing keys .*quant_map"),
    "nested_absmax": (change(**{"weight.nested_absmax": gone}), "missing .*nested_absmax"),
    "statistics": (
        lambda d: {"layer.weight": d["layer.weight"]},
        r"layer.weight is uint8\[6144, 1\], as 4-bit codes are, but has no statistics",
    ),
    "table": (change(**{"weight.quant_map": lambda a: a + 1e-6}), "quant_map is not the standard"),
    "reversed": (
        change(**{"weight.quant_map": lambda a: a[::-1]}),
        "quant_map is not the standard",
    ),
    "nested table": (
        change(**{"weight.nested_quant_map": lambda a: a * 2}),
        "nested_quant_map is not the standard table",
    ),
    "fewer codes": (change(weight=lambda a: a[:-1]), "codes must be 6144 bytes .*, got 6143"),
    "flat codes": (change(weight=np.ravel), r"codes must be \[n, 1\] .* got uint8\[6144\]"),
    "container": (change(weight=lambda a: a.astype(np.int32)), r"got int32\[6144, 1\]"),
    "fewer scales": (change(**{"weight.absmax": lambda a: a[:-1]}), "absmax must be .* 192 el"),
    "scales": (change(**{"weight.absmax": lambda a: a.astype("f4")}), "absmax must be uint8"),
    "axes": (change(**{"weight.absmax": lambda a: a[None]}), "absmax must have one axis"),
    "repacked": (
        change(**{"weight.absmax": lambda a: a.reshape(96, 2).T.astype(ml_dtypes.bfloat16)}),
        "bitsandbytes repacked this weight for its CPU",
    ),
    "shape": (scalars(shape=[128, 128]), "absmax must be uint8 of 256 elements"),
    "more axes": (scalars(shape=[1] * 9), "shape must be a list of up to 8 integers"),
    "negative": (scalars(shape=[-96, -128]), "shape must hold positive integers"),
    "huge": (scalars(shape=[2**60, 128]), "shape must hold positive integers"),
    "float": (scalars(shape=[96.0, 128]), "shape must hold positive integers"),
    "blocksize": (scalars(blocksize=32), "absmax must be uint8 of 384 elements"),
    "no blocksize": (scalars(blocksize=True), "blocksize must be an integer, got True"),
    "other type": (scalars(quant_type="fp4"), "holds quant_type 'fp4'"),
    "dtype": (scalars(dtype="float64"), "dtype must be float32, float16 or bfloat16"),
    "offset": (scalars(nested_offset=float("nan")), "nested_offset must be a finite number"),
    "unknown": (scalars(extra=1), r"unknown keys in a quant state: \['extra'\]"),
    "no json": (text(b"{"), "is not JSON"),
    "no text": (text(b"\xff{}"), "is not JSON"),
    "no object": (text(b"[]"), "must be a JSON object, got list"),
    "twice": (text(b'{"shape": [1], "shape": [2]}'), "key 'shape' is given twice"),
    "deep": (text(b"[" * 4000), "is not JSON"),
    "long": (text(b" " * 5000), "at most 4096 bytes of JSON"),
    "two types": (
        lambda d: d | {STATE[:-3] + "fp4": d[STATE]},
        "exactly one quant_state item expected for layer.weight",
    ),
    "renamed": (rename(STATE, STATE[:-3] + "fp4"), "holds quant_type 'nf4'"),
    "int4": (rename(STATE, STATE[:-3] + "int4"), "quant_type must be 'nf4' or 'fp4', got 'int4'"),
    "swapped prefix": (rename("layer.weight.absmax", "other.weight.absmax"), "missing .*absmax"),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", DEFECTS)
def test_defects_are_named(state_dict, name, strict, tmp_path):
    defect, message = DEFECTS[name]
    broken = defect(state_dict)
    with pytest.raises(ValueError, match=message):
        bnb.from_state_dict(broken, strict=strict)
    contiguous = {key: np.ascontiguousarray(value) for key, value in broken.items()}
    safetensors.numpy.save_file(contiguous, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=message):
        bnb.load_file(tmp_path / "x.safetensors", strict=strict)


def test_extra_keys_are_reported(state_dict, weight):
    extra = state_dict | {"layer.weight.code": np.ones(1)}
    with pytest.raises(ValueError, match=r"unknown keys .*\['layer.weight.code'\]"):
        bnb.from_state_dict(extra)
    with pytest.warns(UserWarning, match=r"left out unknown keys .*\['layer.weight.code'\]"):
        found = bnb.from_state_dict(extra, strict=False)
    assert set(found) == {"layer.weight", "layer.bias"}
    assert_same(found["layer.weight"], weight)


@pytest.mark.parametrize(
    ("names", "method"),
    [(["l.weight", "l.SCB"], "LLM.int8"), (["l.qweight", "l.qzeros", "l.scales"], "GPTQ and AWQ")],
)
def test_other_methods_are_refused_by_name(names, method):
    with pytest.raises(NotImplementedError, match=f"{names[1]}: {method}|{names[0]}: {method}"):
        bnb.from_state_dict({name: np.ones((2, 2), np.int8) for name in names})


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
    ],
)
def test_what_cannot_be_written(weight, tree, error, message, tmp_path):
    with pytest.raises(error, match=message):
        bnb.save_file(tree(weight), tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_the_old_file(weight, tmp_path, monkeypatch):
    path = tmp_path / "x"
    bnb.save_file({"w": weight}, path)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        bnb.save_file({"w": jnp.ones(3)}, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


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


# Into a model


def model(linear=q4jax.LinearNF4):
    rngs = nnx.Rngs(0)
    layers = [linear(128, 96, rngs=rngs), nnx.RMSNorm(96, rngs=rngs), nnx.Linear(96, 5, rngs=rngs)]
    return nnx.Sequential(*layers)


def strip(path):
    return path.removeprefix("layers.")


@pytest.fixture(scope="module")
def full():
    rng = np.random.default_rng(3)
    shapes = {"0.weight": (96, 128), "0.bias": (96,), "1.weight": (96,), "2.weight": (5, 96)}
    arrays = {name: rng.normal(size=shape).astype("f4") for name, shape in shapes.items()}
    return arrays | {"2.bias": np.ones(5, np.float32)}


def test_full_precision_is_quantized_on_load(full):
    before = model()
    found = bnb.load_state_dict(before, full, names=strip)
    quantized = Params4bit.quantize(jnp.asarray(full["0.weight"]), 64, True, "nf4")
    assert_same(thaw(found.layers[0].weight), quantized)
    np.testing.assert_array_equal(found.layers[2].kernel[...], full["2.weight"].T)
    assert q4jax.fingerprint(before) == q4jax.fingerprint(model())
    # And what was quantized goes into another model as it is.
    mixed = full | quantized.state_dict("0.weight")
    assert q4jax.fingerprint(bnb.load_state_dict(before, mixed, names=strip)) == (
        q4jax.fingerprint(found)
    )
    x = jnp.ones((2, 128))
    dense = q4jax.dequantize_model(found)
    np.testing.assert_allclose(found(x), dense(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.pop("0.bias"), r"state_dict has no \['0.bias'\]"),
        (lambda d: d.update(other=np.ones(1)), r"unknown keys the model lacks: \['other'\]"),
        (lambda d: d.update({"0.weight": d["0.weight"].T}), r"0.weight is float32\[128, 96\]"),
        (lambda d: d.update({"2.weight": d["2.weight"].T}), r"2.weight is float32\[96, 5\]"),
        (lambda d: d.update({"1.weight": np.ones(96, int)}), r"1.weight is int64\[96\]"),
        (lambda d: d["0.weight"].__setitem__(0, np.nan), "0.weight holds NaN"),
        (
            lambda d: d.update(Params4bit.quantize(jnp.ones((96, 128))).state_dict("0.weight")),
            "0.weight is .*fp4_b64_n0_.*, the model's is .*nf4_b64_n256",
        ),
        (
            lambda d: d.update(Params4bit.quantize(jnp.ones((5, 96))).state_dict("2.weight")),
            "the layer of the model is not 4-bit",
        ),
    ],
)
def test_a_state_dict_that_does_not_fit_the_model(full, edit, message):
    state_dict = {name: array.copy() for name, array in full.items()}
    edit(state_dict)
    with pytest.raises(ValueError, match=message):
        bnb.load_state_dict(model(), state_dict, names=strip)


def test_extra_keys_for_a_model_are_reported(full):
    with pytest.warns(UserWarning, match=r"keys the model lacks: \['other'\]"):
        bnb.load_state_dict(model(), full | {"other": np.ones(1)}, names=strip, strict=False)


def test_variables_without_a_name_in_torch(full):
    with pytest.raises(TypeError, match=r"conv.bias of a Conv has no name"):
        bnb.load_state_dict(nnx.Dict(conv=nnx.Conv(1, 1, (1,), rngs=nnx.Rngs(0))), full)
