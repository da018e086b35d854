"""`fingerprint` sees every bit of every 4-bit weight, and nothing else."""

import hashlib
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import q4jax
from q4jax.nnx.variables import to_variables
from q4jax.tree.fingerprint import fingerprint, has_fingerprint

W = jax.random.normal(jax.random.key(0), (64, 128))


def quantize(w=W, quant_type="nf4", compress_statistics=True, blocksize=64):
    return q4jax.Params4bit.quantize(
        w, quant_type=quant_type, compress_statistics=compress_statistics, blocksize=blocksize
    )


class Block(nnx.Module):
    def __init__(self, rngs):
        self.proj = q4jax.LinearNF4(128, 64, rngs=rngs)
        self.norm = nnx.LayerNorm(64, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = q4jax.EmbeddingFP4(16, 128, rngs=rngs)
        self.layers = nnx.List([Block(rngs), Block(rngs)])


@pytest.fixture(scope="module")
def model():
    return Model(nnx.Rngs(0))


def plain(model):
    """The Params4bit of the model at the same paths, as a plain pytree."""
    array = nnx.to_pure_dict(nnx.state(model))

    def weight(d):
        keys = sorted(d["quant_state"])  # absmax, nested_absmax, offset
        spec = q4jax.QuantSpec.parse(keys[0].partition("__")[2])
        scales = [d["quant_state"][key] for key in keys]
        return q4jax.Params4bit(d["packed"], q4jax.QuantState(*scales, spec))

    layers = [{"proj": {"weight": weight(d["proj"]["weight"])}} for d in array["layers"].values()]
    return {"layers": layers, "embed": {"weight": weight(array["embed"]["weight"])}}


def test_the_container_does_not_count(model):
    expected = fingerprint(model)
    assert len(expected) == 64
    assert fingerprint(nnx.state(model)) == expected
    assert fingerprint(nnx.to_pure_dict(nnx.state(model))) == expected
    assert fingerprint(plain(model)) == expected
    assert fingerprint(nnx.merge(*nnx.split(model))) == expected
    assert fingerprint({"model": model}) == fingerprint({"model": nnx.state(model)}) == expected


def test_the_public_name_is_the_function_whatever_was_imported_before():
    importlib.import_module("q4jax.checkpoint.orbax")
    assert q4jax.fingerprint is fingerprint


def test_linen_boxes_do_not_count():
    weight = quantize()
    boxed = jax.tree.map(lambda a: nn.Partitioned(a, (None,) * a.ndim), weight)
    assert fingerprint({"a": boxed}) == fingerprint({"a": weight})


def test_other_leaves_do_not_count(model):
    tree = plain(model)
    assert fingerprint(tree | {"step": 3, "lora": jnp.ones(2)}) == fingerprint(tree)


@pytest.mark.parametrize("leaf", range(4))
def test_every_bit_of_every_array_counts(leaf):
    weight = quantize()
    arrays, treedef = jax.tree.flatten(weight)
    before = fingerprint([weight])
    raw = np.array(arrays[leaf])
    raw.reshape(-1).view(np.uint8)[-1] ^= 1
    arrays[leaf] = jnp.asarray(raw)
    assert fingerprint([jax.tree.unflatten(treedef, arrays)]) != before


def test_dtype_shape_and_tag_count():
    codes = jnp.zeros((64, 64), jnp.uint8)
    absmax = jnp.ones((64, 2))

    def of(shape, dtype, quant_type, codes=codes, absmax=absmax):
        spec = q4jax.QuantSpec(quant_type, 64, 0, dtype, shape)
        return fingerprint([q4jax.Params4bit(codes, q4jax.QuantState(absmax, None, None, spec))])

    digests = [
        of((64, 128), "float32", "nf4"),
        of((64, 128), "bfloat16", "nf4"),
        of((64, 128), "float32", "fp4"),
        of((32, 256), "float32", "nf4", codes=codes.reshape(32, 128), absmax=absmax.reshape(32, 4)),
        of((64, 128), "float32", "nf4", codes=jnp.stack([codes] * 2), absmax=jnp.ones((2, 64, 2))),
    ]
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize("compress_statistics", [False, True])
def test_names_and_stacking_do_not_count(compress_statistics):
    w = jax.random.normal(jax.random.key(1), (3, 256, 64))

    def make(w):
        return quantize(w, compress_statistics=compress_statistics)

    layers = [make(layer) for layer in w]
    expected = fingerprint(layers)
    assert fingerprint({"a": layers[2], "b.c": layers[0], "d": [layers[1]]}) == expected
    assert fingerprint({"stack": jax.vmap(make)(w)}) == expected
    assert fingerprint([jax.vmap(make)(w[:1]), jax.vmap(make)(w[1:])]) == expected
    again = jax.vmap(jax.vmap(make))(w.reshape(1, 3, 256, 64))
    assert fingerprint({"stacks": again}) == expected
    assert fingerprint(layers[:2]) != expected
    assert fingerprint([*layers, layers[0]]) != expected


@pytest.mark.parametrize("compress_statistics", [False, True])
def test_a_joint_weight_counts_as_its_matrices_where_it_can_be_divided(compress_statistics):
    for rows in (256, 8):  # 256 blocks a matrix, or 8 that share a scale of scales
        joint = quantize(
            jax.random.normal(jax.random.key(1), (2, rows, 64)),
            compress_statistics=compress_statistics,
        )
        whole = fingerprint([joint])
        if rows == 8 and compress_statistics:
            with pytest.raises(ValueError, match="cannot unstack"):
                joint.unstack()
        else:
            stack = joint.unstack()
            assert fingerprint([jax.tree.map(lambda a, i=i: a[i], stack) for i in (1, 0)]) == whole


def test_the_digest_is_what_it_was():
    """Checkpoints hold it, so the way in which it is made must never change."""
    spec = q4jax.QuantSpec("nf4", 32, 0, "float32", (2, 32))
    codes, absmax = np.arange(32, dtype=np.uint8).reshape(2, 16), np.ones((2, 1), np.float32)
    weight = q4jax.Params4bit(codes, q4jax.QuantState(absmax, None, None, spec))

    def sha256(data):
        return hashlib.sha256(data).hexdigest()

    arrays = b"uint8[2, 16]" + codes.tobytes() + b"float32[2, 1]" + absmax.tobytes()
    line = f"nf4_b32_n0_float32_2x32 {sha256(arrays)}\n"
    assert fingerprint({"layers": [weight]}) == sha256(line.encode())

    # That of 0.1, by which its files and its users know a model.
    a = sha256(b"uint8[2, 16]" + codes.tobytes())
    b = sha256(b"float32[2, 1]" + absmax.tobytes())
    lines = f"layers.0.packed {a}\nlayers.0.quant_state.absmax__nf4_b32_n0_float32_2x32 {b}\n"
    assert has_fingerprint({"layers": [weight]}, sha256(lines.encode()))
    assert has_fingerprint({"layers": [weight]}, sha256(line.encode()))
    assert not has_fingerprint({"layer": [weight]}, sha256(lines.encode()))
    assert not has_fingerprint({"layers": [weight]}, "0" * 64)


def test_numpy_and_jax_arrays_are_alike():
    weight = quantize()
    assert fingerprint([jax.tree.map(np.asarray, weight)]) == fingerprint([weight])


def test_no_weight_is_no_fingerprint(model):
    with pytest.raises(ValueError, match="tree holds no 4-bit weight"):
        fingerprint({"lora": jnp.ones(3), "step": 1})
    with pytest.raises(ValueError, match="tree holds no 4-bit weight"):
        fingerprint(nnx.state(model, nnx.Param))


def test_abstract_and_traced_weights_are_refused():
    with pytest.raises(TypeError, match=r"0\.packed must be an array .* got ShapeDtypeStruct"):
        fingerprint(jax.eval_shape(lambda: [quantize()]))
    with pytest.raises(TypeError, match=r"0\.packed must be an array .* got DynamicJaxprTracer"):
        jax.jit(lambda w: fingerprint([w]))(quantize())


def test_codes_apart_from_their_scales_are_refused():
    weight = quantize()
    match = r"the scales at w\.1 have no codes beside them"
    with pytest.raises(ValueError, match=match):
        fingerprint({"w": (weight.packed, weight.quant_state)})
    with pytest.raises(ValueError, match="the scales at quant_state have no codes"):
        fingerprint({"quant_state": weight.quant_state})


def test_incomplete_or_cast_weights_are_refused(model):
    tag = "nf4_b64_n256_float32_64x128"
    pure = nnx.to_pure_dict(nnx.state(model))
    del pure["layers"][1]["proj"]["weight"]["quant_state"][f"offset__{tag}"]
    match = rf"layers\.1\.proj\.weight\.quant_state must hold .*offset__{tag}; got"
    with pytest.raises(ValueError, match=match):
        fingerprint(pure)
    cast = jax.tree.map(lambda a: a.astype(jnp.bfloat16), quantize())
    match = r"w: packed must be uint8\[64, 64\] .*got bfloat16"
    with pytest.raises(ValueError, match=match):
        fingerprint({"w": cast})
    with pytest.raises(ValueError, match="w must hold arrays, got str"):
        fingerprint({"w": jax.tree.map(lambda a: "x", quantize())})


def test_a_state_merged_into_another_module_is_refused():
    def layer(quant_type):
        weight = to_variables(quantize(quant_type=quant_type))
        return nnx.Dict(weight=weight)

    graphdef, _ = nnx.split(layer("fp4"))
    broken = nnx.merge(graphdef, nnx.state(layer("nf4")))
    match = r"the module expects a weight fp4_b64.*, its state holds nf4_b64"
    with pytest.raises(ValueError, match=match):
        fingerprint(broken)
    match = r"the module expects a weight fp4_b64.*, its state holds nf4_b64"
    with pytest.raises(ValueError, match=match):
        fingerprint(nnx.state(broken))


def test_two_leaves_of_one_name_are_refused():
    match = r"two leaves of the tree are named 'a\.b'"
    with pytest.raises(ValueError, match=match):
        fingerprint({"a.b": jnp.ones(1), "a": {"b": jnp.ones(1)}, "w": quantize()})


def test_keys_that_no_file_can_hold_are_refused():
    with pytest.raises(TypeError, match="keys of a tree must be str or int, got \\(1, 2\\)"):
        fingerprint({(1, 2): quantize()})
