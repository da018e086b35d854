"""Checkpoints come back bit for bit, or not at all."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState

import q4jax
import q4jax.linen
from q4jax import checkpoint
from q4jax.checkpoint import orbax
from q4jax.nnx.variables import Frozen4bit
from q4jax.tree.fingerprint import fingerprint

W = jax.random.normal(jax.random.key(0), (64, 128))


def quantize(w=W, quant_type="nf4", compress_statistics=True, blocksize=64):
    return q4jax.Params4bit.quantize(
        w, quant_type=quant_type, compress_statistics=compress_statistics, blocksize=blocksize
    )


class Model(nnx.Module):
    def __init__(self, rngs, linear=q4jax.LinearNF4, **settings):
        self.embed = q4jax.EmbeddingFP4(16, 128, rngs=rngs)
        self.layers = nnx.List([linear(128, 128, rngs=rngs, **settings) for _ in range(2)])
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.lora = nnx.LoRAParam(jnp.full((3,), 0.5, jnp.bfloat16))

    def __call__(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = self.drop(layer(x))
        return x * self.lora.get_value().sum()


def assert_identical(found, expected):
    """Same structure, types, dtypes, shapes and bytes."""
    a, treedef_a = jax.tree.flatten(found)
    b, treedef_b = jax.tree.flatten(expected)
    assert treedef_a == treedef_b
    for x, y in zip(a, b, strict=True):
        assert isinstance(x, jax.Array) == isinstance(y, jax.Array), (x, y)
        if not hasattr(y, "dtype"):
            assert type(x) is type(y)
            assert x == y
            continue
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        if jnp.issubdtype(y.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def normal(*shape):
    return jax.random.normal(jax.random.key(len(shape)), shape)


MAKERS = {
    "nf4": lambda: quantize(),
    "fp4": lambda: quantize(quant_type="fp4"),
    "plain": lambda: quantize(compress_statistics=False),
    "blocksize": lambda: quantize(blocksize=32),
    "bfloat16": lambda: quantize(W.astype(jnp.bfloat16)),
    "float16": lambda: quantize(W.astype(jnp.float16)),
    "reshaped": lambda: quantize(W.reshape(32, 256)),
    "flat": lambda: quantize(normal(7, 33)),
    "joint": lambda: quantize(normal(3, 64, 128)),
    "stacked": lambda: jax.vmap(quantize)(normal(3, 64, 128)),
}


@functools.cache
def make(name):
    return MAKERS[name]()


def saved(**changes):
    """A tree, or one that differs from it under `a`."""
    return {"a": {"w": make("nf4"), "lora": jnp.ones((4, 2))} | changes, "step": 1}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("with_target", [False, True])
def test_round_trip_of_a_weight(tmp_path, name, with_target):
    tree = {"a": {"w": make(name)}, "b": [make(name), jnp.arange(3)]}
    checkpoint.save(tmp_path / "c", tree)
    target = jax.tree.map(jnp.zeros_like, tree) if with_target else None
    assert_identical(checkpoint.restore(tmp_path / "c", target), tree)


@pytest.mark.parametrize("with_target", [False, True])
def test_round_trip_of_every_kind_of_leaf(tmp_path, with_target):
    tree = {
        "step": 3,
        "big": 2**80,
        "lr": 0.1,
        "nan_free": True,
        "note": "π",
        "none": None,
        "key": jax.random.key(1),
        "keys": jax.random.split(jax.random.key(2, impl="rbg"), 3),
        "scalar": jnp.bfloat16(1.5),
        "numpy": np.arange(6.0).reshape(2, 3),
        "numpy64": np.int64(2**40),
        "bool": jnp.array([True, False]),
        "complex": jnp.array(1 + 2j),
        "nan": jnp.array([jnp.nan, -0.0, jnp.inf]),
        "list": [None, jnp.ones(1), {0: jnp.ones(2), 7: {"7": jnp.ones(3)}}],
    }
    checkpoint.save(tmp_path / "c", tree)
    tree["numpy64"] = np.asarray(tree["numpy64"])

    def blank(leaf):
        if isinstance(leaf, jax.Array):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        return np.zeros_like(leaf) if isinstance(leaf, np.ndarray) else type(leaf)()

    found = checkpoint.restore(tmp_path / "c", jax.tree.map(blank, tree) if with_target else None)
    if not with_target:
        del tree["none"]
    assert_identical(found, tree)


def test_a_weight_alone_and_tuples(tmp_path):
    checkpoint.save(tmp_path / "one", make("nf4"))
    assert_identical(checkpoint.restore(tmp_path / "one"), make("nf4"))
    checkpoint.save(tmp_path / "two", (make("nf4"), {"x": (jnp.ones(1),)}))
    assert_identical(checkpoint.restore(tmp_path / "two"), [make("nf4"), {"x": [jnp.ones(1)]}])


# NNX


def trained(model):
    """The model after two steps, so that nothing has the value it starts with."""
    optimizer = nnx.Optimizer(
        model, optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)), wrt=nnx.LoRAParam
    )
    step = nnx.value_and_grad(
        lambda m: (m(jnp.arange(4)) ** 2).mean(), argnums=nnx.DiffState(0, nnx.LoRAParam)
    )
    for _ in range(2):
        optimizer.update(model, step(model)[1])
    return optimizer


@pytest.mark.parametrize("cls", [q4jax.LinearNF4, q4jax.LinearFP4])
@pytest.mark.parametrize("abstract", [False, True])
def test_round_trip_of_a_module_and_its_optimizer(tmp_path, cls, abstract):
    model = Model(nnx.Rngs(0, dropout=1), cls)
    optimizer = trained(model)
    checkpoint.save(tmp_path / "c", {"model": model, "opt": nnx.state(optimizer), "step": 2})

    def fresh():
        other = Model(nnx.Rngs(7, dropout=8), cls)
        transform = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
        return other, nnx.Optimizer(other, transform, wrt=nnx.LoRAParam)

    target, new_optimizer = nnx.eval_shape(fresh) if abstract else fresh()
    target = {"model": target, "opt": new_optimizer, "step": 0}
    before = jax.tree.leaves(nnx.state(target["model"]))
    found = checkpoint.restore(tmp_path / "c", target)

    assert isinstance(found["model"], Model)
    assert isinstance(found["opt"], nnx.Optimizer)
    assert found["step"] == 2
    assert_identical(nnx.state(found["model"]), nnx.state(model))
    assert_identical(nnx.state(found["opt"]), nnx.state(optimizer))
    assert fingerprint(found["model"]) == fingerprint(model)
    # The dropout of the restored model goes on where that of the saved one does.
    assert_identical(found["model"](jnp.arange(4)), model(jnp.arange(4)))
    # Target untouched: the same arrays in the same Variables.
    assert found["model"] is not target["model"]
    after = jax.tree.leaves(nnx.state(target["model"]))
    assert all(a is b for a, b in zip(before, after, strict=True))


def test_a_module_can_be_the_tree(tmp_path):
    model = Model(nnx.Rngs(0))
    checkpoint.save(tmp_path / "c", model)
    found = checkpoint.restore(tmp_path / "c", nnx.eval_shape(lambda: Model(nnx.Rngs(1))))
    assert type(found.layers[1].weight.packed) is Frozen4bit
    assert_identical(nnx.state(found), nnx.state(model))


def test_module_state_and_pure_dict_are_one_checkpoint(tmp_path):
    model = Model(nnx.Rngs(0))
    checkpoint.save(tmp_path / "c", model)
    other = nnx.state(Model(nnx.Rngs(1)))
    assert_identical(checkpoint.restore(tmp_path / "c", other), nnx.state(model))
    pure = checkpoint.restore(tmp_path / "c", nnx.to_pure_dict(other))
    assert_identical(pure, nnx.to_pure_dict(nnx.state(model)))

    found = checkpoint.restore(tmp_path / "c")
    assert set(found) == {"embed", "layers", "drop", "lora"}
    assert list(found["layers"]) == [0, 1]
    weight = found["layers"][1]["weight"]
    assert isinstance(weight, q4jax.Params4bit)
    expected = model.layers[1].weight
    assert weight.quant_state.spec == expected.quant_state.spec
    assert_identical(
        jax.tree.leaves(weight),
        [
            v.get_value()
            for v in jax.tree.leaves(expected, is_leaf=lambda v: isinstance(v, nnx.Variable))
        ],
    )


def test_stacked_layers(tmp_path):
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs):
        return q4jax.LinearNF4(128, 64, rngs=rngs)

    model = make(nnx.Rngs(0))
    checkpoint.save(tmp_path / "c", model)
    found = checkpoint.restore(tmp_path / "c", make(nnx.Rngs(1)))
    assert_identical(nnx.state(found), nnx.state(model))
    assert checkpoint.restore(tmp_path / "c")["weight"].quant_state.shape == (3, 64, 128)


# Linen


def test_round_trip_of_a_linen_train_state(tmp_path):
    layer = q4jax.linen.Linear4bit(
        64,
        quant_type="nf4",
        kernel_init=nn.with_partitioning(nn.initializers.normal(), (None, "x")),
    )

    def state(seed):
        variables = layer.init(jax.random.key(seed), jnp.ones((1, 128)))
        train = TrainState.create(
            apply_fn=layer.apply, params=variables["params"], tx=optax.adam(1e-2)
        )
        grads = jax.tree.map(lambda p: jnp.full_like(p, seed + 1), train.params)
        return {"train": train.apply_gradients(grads=grads), "quant": variables["quant"]}

    saved, target = state(0), state(1)
    target["train"] = target["train"].replace(tx=saved["train"].tx)
    assert isinstance(saved["quant"]["weight"].packed, nn.Partitioned)
    checkpoint.save(tmp_path / "c", saved)
    assert_identical(checkpoint.restore(tmp_path / "c", target), saved)
    weight = checkpoint.restore(tmp_path / "c")["quant"]["weight"]
    assert_identical(weight, nn.unbox(saved["quant"]["weight"]))


# Wrong targets

TAG = "nf4_b64_n256_float32_64x128"


def with_leaf(name, change):
    """The target with one array of the weight changed."""

    def at(path, leaf):
        return change(leaf) if name in jax.tree_util.keystr(path) else leaf

    return jax.tree_util.tree_map_with_path(at, saved())


@pytest.mark.parametrize(
    ("target", "mine", "theirs"),
    [
        (
            lambda: saved(w=make("fp4")),
            "a.w.quant_state.absmax is uint8[64, 2] fp4_b64_n256_float32_64x128 in target",
            f"uint8[64, 2] {TAG} in the checkpoint",
        ),
        (
            lambda: saved(w=make("blocksize")),
            "a.w.quant_state.absmax is uint8[64, 4] nf4_b32_n256_float32_64x128 in target",
            f"uint8[64, 2] {TAG} in the checkpoint",
        ),
        (
            lambda: saved(w=make("plain")),
            "a.w.quant_state.absmax is float32[64, 2] nf4_b64_n0_float32_64x128 in target",
            "a.w.quant_state.nested_absmax is missing in target, "
            f"float32[1] {TAG} in the checkpoint",
        ),
        (
            lambda: saved(w=make("bfloat16")),
            "a.w.quant_state.absmax is uint8[64, 2] nf4_b64_n256_bfloat16_64x128 in target",
            f"uint8[64, 2] {TAG} in the checkpoint",
        ),
        (
            lambda: saved(w=make("reshaped")),
            "a.w.packed is uint8[32, 128] in target",
            "uint8[64, 64] in the checkpoint",
        ),
        (
            lambda: saved(w=make("stacked")),
            "a.w.packed is uint8[3, 64, 64] in target",
            "uint8[64, 64] in the checkpoint",
        ),
        (
            lambda: saved(w=W),
            "a.w is float32[64, 128] in target, missing in the checkpoint",
            "a.w.packed is missing in target, uint8[64, 64] in the checkpoint",
        ),
        (
            lambda: saved(lora=jnp.ones((4, 2), jnp.bfloat16)),
            "a.lora is bfloat16[4, 2] in target",
            "float32[4, 2] in the checkpoint",
        ),
        (
            lambda: saved(lora=jnp.ones((2, 4))),
            "a.lora is float32[2, 4] in target",
            "float32[4, 2] in the checkpoint",
        ),
        (
            lambda: saved(bias=jnp.ones(3)),
            "a.bias is float32[3] in target",
            "missing in the checkpoint",
        ),
        (
            lambda: saved(lora=None),
            "a.lora is missing in target",
            "float32[4, 2] in the checkpoint",
        ),
        (
            lambda: saved() | {"step": jnp.array(1)},
            "step is int32[] in target",
            "int in the checkpoint",
        ),
        (dict, "a.lora is missing in target, float32[4, 2] in the checkpoint", "and 3 more"),
    ],
    ids=lambda value: value.partition(" in ")[0] if isinstance(value, str) else "",
)
@pytest.mark.parametrize("abstract", [False, True])
def test_a_wrong_target_is_refused_before_an_array_is_read(
    monkeypatch, saved_once, target, mine, theirs, abstract
):
    target = target()
    if abstract:
        target = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype) if hasattr(a, "dtype") else a, target
        )
    monkeypatch.setattr(orbax, "_restore_args", lambda *args: pytest.fail("arrays were read"))
    with pytest.raises(ValueError, match=r"^target does not match the checkpoint: ") as error:
        checkpoint.restore(saved_once, target)
    message = str(error.value)
    assert mine in message
    assert theirs in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("target", "mine"),
    [
        (
            lambda: with_leaf("packed", lambda a: a.astype(jnp.bfloat16)),
            rf"packed must be uint8\[64, 64\] for {TAG}, got bfloat16\[64, 64\]",
        ),
        (
            lambda: with_leaf("['w'].quant_state.absmax", lambda a: a.astype(jnp.float32)),
            rf"absmax must be uint8\[64, 2\] for {TAG}, got float32\[64, 2\]",
        ),
        (
            lambda: with_leaf("offset", lambda a: a.astype(jnp.bfloat16)),
            rf"offset must be float32 .*, got bfloat16\[\] for {TAG}",
        ),
    ],
    ids=["packed", "absmax", "offset"],
)
@pytest.mark.parametrize("abstract", [False, True])
def test_a_target_that_contradicts_itself(monkeypatch, saved_once, target, mine, abstract):
    target = target()
    if abstract:
        target = jax.eval_shape(lambda tree: tree, target)
    monkeypatch.setattr(orbax, "_restore_args", lambda *args: pytest.fail("arrays were read"))
    with pytest.raises(ValueError, match=f"^a.w: {mine}"):
        checkpoint.restore(saved_once, target)


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "c"
    checkpoint.save(path, saved())
    return path


@pytest.mark.parametrize(
    ("wrong", "mine"),
    [
        (
            {"linear": q4jax.LinearFP4},
            "layers.0.weight.quant_state.absmax is uint8[128, 2] fp4_b64_",
        ),
        ({"blocksize": 128}, "layers.0.weight.quant_state.absmax is uint8[128, 1] nf4_b128_"),
        (
            {"compress_statistics": False},
            "0.weight.quant_state.absmax is float32[128, 2] nf4_b64_n0_",
        ),
        ({"use_bias": False}, "layers.0.bias is missing in target"),
    ],
)
@pytest.mark.parametrize("abstract", [False, True])
def test_a_wrong_module_is_refused_and_untouched(tmp_path, wrong, mine, abstract):
    checkpoint.save(tmp_path / "c", Model(nnx.Rngs(0)))

    def make():
        return Model(nnx.Rngs(1), **wrong)

    target = nnx.eval_shape(make) if abstract else make()
    before = jax.tree.leaves(nnx.state(target))
    with pytest.raises(ValueError, match=re.escape(mine)):
        checkpoint.restore(tmp_path / "c", target)
    after = jax.tree.leaves(nnx.state(target))
    assert all(a is b for a, b in zip(before, after, strict=True))


def test_a_joint_weight_is_no_stacked_one(tmp_path):
    w = jax.random.normal(jax.random.key(2), (4, 128, 128))
    joint = quantize(w)
    checkpoint.save(tmp_path / "c", {"w": joint})
    with pytest.raises(
        ValueError, match=r"nested_absmax is float32\[4, 1\] nf4.* in target, float32\[4\]"
    ):
        checkpoint.restore(tmp_path / "c", {"w": joint.unstack()})


# Refusals of save


def test_nothing_is_written_or_removed_by_a_refused_save(tmp_path):
    path = tmp_path / "c"
    cast = jax.tree.map(lambda a: a.astype(jnp.bfloat16), make("nf4"))
    refused = [
        ({"w": cast}, ValueError, r"w: packed must be uint8"),
        ({"f": jnp.sin}, TypeError, "f must be an array, a PRNG key, bool, int, float or str, got"),
        (jax.eval_shape(lambda: {"x": W}), TypeError, "x must be .* got ShapeDtypeStruct"),
        (jnp.ones(3), TypeError, r"tree must be a container of arrays, got float32\[3\]"),
        ({"step": 1}, ValueError, "tree holds no array to save"),
        ({"a.b": W, "a": {"b": W}}, ValueError, "two leaves of the tree are named 'a.b'"),
    ]
    for tree, error, match in refused:
        with pytest.raises(error, match=match):
            checkpoint.save(path, tree)
    assert os.listdir(tmp_path) == []
    checkpoint.save(path, saved())
    for tree, error, match in refused:
        with pytest.raises(error, match=match):
            checkpoint.save(path, tree, force=True)
    assert_identical(checkpoint.restore(path, saved()), saved())


def test_an_existing_path_needs_force(tmp_path):
    path = tmp_path / "parents" / "are" / "made"
    checkpoint.save(path, {"x": jnp.zeros(2)})
    with pytest.raises(FileExistsError, match=f"path {path} exists already"):
        checkpoint.save(path, {"x": jnp.ones(2)})
    assert_identical(checkpoint.restore(path), {"x": jnp.zeros(2)})
    checkpoint.save(path, {"x": jnp.ones(2)}, force=True)
    assert_identical(checkpoint.restore(path), {"x": jnp.ones(2)})
    assert os.listdir(path.parent) == ["made"]


def test_force_replaces_nothing_but_checkpoints(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")
    with pytest.raises(FileExistsError, match="replaces checkpoints of q4jax only"):
        checkpoint.save(tmp_path / "home", saved(), force=True)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years"


def test_relative_paths_and_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    checkpoint.save("c", {"x": jnp.zeros(2)})
    assert_identical(checkpoint.restore("~/c"), {"x": jnp.zeros(2)})


# Refusals of restore


def test_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no checkpoint at {tmp_path}/c$"):
        checkpoint.restore(tmp_path / "c")
    with pytest.raises(FileNotFoundError, match=f"no checkpoint at {tmp_path}/a/b/c$"):
        checkpoint.restore(tmp_path / "a" / "b" / "c")


def test_not_a_checkpoint_of_q4jax(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty is not a checkpoint of q4jax: no item 'q4jax'"):
        checkpoint.restore(tmp_path / "empty")
    with ocp.StandardCheckpointer() as plain:
        plain.save(tmp_path / "plain", {"x": jnp.ones(2)})
    with pytest.raises(ValueError, match="plain is not a checkpoint of q4jax: no item 'q4jax'"):
        checkpoint.restore(tmp_path / "plain")


def edit_header(path, change):
    file = path / "q4jax" / "metadata"
    header = json.loads(file.read_text())
    change(header)
    file.write_text(json.dumps(header))


def test_a_changed_header_is_found(tmp_path):
    def save(name):
        checkpoint.save(tmp_path / name, saved())
        return tmp_path / name

    def set_step(header):
        (step,) = (entry for entry in header["leaves"] if entry["path"] == ["step"])
        step["value"] = 2

    edit_header(save("step"), set_step)
    with pytest.raises(ValueError, match="its header is not the one saved"):
        checkpoint.restore(tmp_path / "step")
    (save("text") / "q4jax" / "metadata").write_text("{")
    with pytest.raises(ValueError, match="text is corrupted or incomplete: "):
        checkpoint.restore(tmp_path / "text")


def test_a_format_of_the_future_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("q4jax.checkpoint.manifest.FORMAT", 2)
        checkpoint.save(tmp_path / "c", saved())
    with pytest.raises(ValueError, match="has format 2, this q4jax reads 1"):
        checkpoint.restore(tmp_path / "c")


def test_other_arrays_under_the_same_header_are_found(tmp_path):
    checkpoint.save(tmp_path / "a", {"w": quantize(), "lora": jnp.ones(2)})
    others = {
        "codes": {"w": quantize(-W), "lora": jnp.ones(2)},
        "lora": {"w": quantize(), "lora": jnp.zeros(2)},
        "dtype": {"w": quantize(), "lora": jnp.ones(2, jnp.bfloat16)},
    }
    for name, tree in others.items():
        path = tmp_path / name
        checkpoint.save(path, tree)
        shutil.rmtree(path / "q4jax")
        shutil.copytree(tmp_path / "a" / "q4jax", path / "q4jax")
    for name, leaf in {"codes": "w.packed", "lora": "lora", "dtype": "lora"}.items():
        with pytest.raises(ValueError, match=f"{name} is corrupted: {leaf}, "):
            checkpoint.restore(tmp_path / name)
    # Without verification only dtypes and shapes are compared.
    with pytest.raises(ValueError, match="dtype is corrupted: lora, "):
        checkpoint.restore(tmp_path / "dtype", verify=False)
    assert_identical(checkpoint.restore(tmp_path / "lora", verify=False), others["lora"])


def test_64_bits_need_x64(tmp_path):
    tree = {"x": np.arange(3) + 2**40}
    checkpoint.save(tmp_path / "c", tree)
    assert_identical(checkpoint.restore(tmp_path / "c", tree), tree)
    with pytest.raises(
        ValueError, match=r"x is int64\[3\], which JAX holds with jax_enable_x64 only"
    ):
        checkpoint.restore(tmp_path / "c", {"x": jax.ShapeDtypeStruct((3,), np.int64)})


# CheckpointManager


def test_checkpoint_manager_async_and_keep_n(tmp_path):
    model = Model(nnx.Rngs(0))
    optimizer = trained(model)
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=True)
    expected = {}
    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        for step in range(4):
            tree = {"model": nnx.state(model), "opt": nnx.state(optimizer), "step": step}
            assert manager.save(step, args=checkpoint.save_args(tree))
            expected[step] = jax.tree.map(lambda a: a, tree)
            model.lora[...] += 1  # while the save goes on
    with ocp.CheckpointManager(tmp_path) as manager:
        assert list(manager.all_steps()) == [2, 3]
        target = {"model": nnx.state(model), "opt": nnx.state(optimizer), "step": 0}
        found = checkpoint.restore_step(manager, target=target)
        assert_identical(found, expected[3])
        assert found["model"]["lora"].get_value()[0] != model.lora.get_value()[0]
        assert checkpoint.restore_step(manager, 2, target)["step"] == 2
        assert checkpoint.restore_step(manager, 2)["step"] == 2
        assert checkpoint.restore(tmp_path / "2", target)["step"] == 2
        with pytest.raises(FileNotFoundError, match="no step 1 in"):
            checkpoint.restore_step(manager, 1)
        target["model"] = nnx.state(Model(nnx.Rngs(0), q4jax.LinearFP4))
        with pytest.raises(ValueError, match=r"fp4_b64_.* in target"):
            checkpoint.restore_step(manager, target=target)


def test_items_of_ones_own_beside_ours(tmp_path):
    args = checkpoint.save_args({"w": quantize()})
    with ocp.CheckpointManager(tmp_path) as manager:
        with pytest.raises(FileNotFoundError, match="no step None in"):
            checkpoint.restore_step(manager)
        manager.save(0, args=ocp.args.Composite(**args, data=ocp.args.JsonSave({"epoch": 1})))
        manager.wait_until_finished()
        assert_identical(checkpoint.restore_step(manager), {"w": quantize()})
        data = manager.restore(0, args=ocp.args.Composite(data=ocp.args.JsonRestore()))
        assert data.data == {"epoch": 1}


# Other processes

PREAMBLE = """
import os, signal, sys
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
import q4jax
from q4jax import checkpoint
from q4jax.checkpoint import orbax
from q4jax.tree.fingerprint import fingerprint
path = sys.argv[1]
"""


def start(code, *args, devices=1):
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    env["PYTHONPATH"] = str(Path(q4jax.__file__).parents[1])
    command = [sys.executable, "-c", PREAMBLE + textwrap.dedent(code), *map(str, args)]
    return subprocess.Popen(command, env=env, text=True, stdout=-1, stderr=-1)


def finish(process, returncode=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == returncode, err
    return out


@pytest.mark.slow
def test_another_process_rebuilds_without_a_target(tmp_path):
    checkpoint.save(tmp_path / "c", {"layers": [make("nf4"), make("joint")]})
    code = """
    tree = checkpoint.restore(path)
    print(tree["layers"])
    print(fingerprint(tree))
    y = q4jax.matmul_4bit(jnp.ones((2, 128)), tree["layers"][0])
    print(np.asarray(y).tobytes().hex())
    """
    weights, digest, y = finish(start(code, tmp_path / "c")).splitlines()
    assert weights == str([make("nf4"), make("joint")])
    assert digest == fingerprint({"layers": [make("nf4"), make("joint")]})
    expected = q4jax.matmul_4bit(jnp.ones((2, 128)), make("nf4"))
    assert y == np.asarray(expected).tobytes().hex()


@pytest.mark.slow
def test_restore_onto_another_mesh(tmp_path):
    checkpoint.save(tmp_path / "one", {"w": make("nf4"), "key": jax.random.key(3)})
    code = """
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    one = checkpoint.restore(path + "/one")
    assert one["w"].packed.sharding == jnp.zeros(()).sharding

    def on(mesh, spec):
        # Codes and scales have the axes of the weight, the rest is replicated.
        def place(a):
            s = NamedSharding(mesh, spec if a.ndim == 2 else P())
            return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)
        return jax.tree.map(place, one)

    def assert_as(found, target):
        for a, t in zip(jax.tree.leaves(found), jax.tree.leaves(target), strict=True):
            assert a.sharding == t.sharding and a.dtype == t.dtype, (a.sharding, t.sharding)
        assert fingerprint(found) == fingerprint(one)

    devices = np.array(jax.devices())
    assert len(devices) == 8
    eight = on(Mesh(devices, ("x",)), P("x"))
    found = checkpoint.restore(path + "/one", eight)
    assert_as(found, eight)
    assert len(found["w"].packed.addressable_shards) == 8
    assert found["w"].packed.addressable_shards[0].data.shape == (8, 64)

    checkpoint.save(path + "/eight", found)
    four = on(Mesh(devices[:4].reshape(2, 2), ("a", "b")), P("a", "b"))
    assert_as(checkpoint.restore(path + "/eight", four), four)
    assert_as(checkpoint.restore(path + "/eight", found), eight)  # arrays as the target
    from q4jax import checkpoint_v1
    assert_as(checkpoint_v1.restore(path + "/eight", four), four)

    class M(nnx.Module):
        def __init__(self, seed):
            self.w = q4jax.LinearNF4(128, 64, rngs=nnx.Rngs(seed))
    model = M(0)
    checkpoint.save(path + "/model", model)
    abstract = nnx.eval_shape(lambda: M(1))
    graphdef, state = nnx.split(abstract)
    mesh = Mesh(devices, ("x",))
    state = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(
            a.shape, a.dtype, sharding=NamedSharding(mesh, P("x") if a.ndim == 2 else P())),
        state)
    restored = checkpoint.restore(path + "/model", nnx.merge(graphdef, state))
    assert len(restored.w.weight.packed.get_value().addressable_shards) == 8
    assert fingerprint(restored) == fingerprint(model)
    x = jnp.ones((2, 128))
    assert np.allclose(restored.w(x), model.w(x), atol=1e-5)
    print("done")
    """
    assert finish(start(code, tmp_path, devices=8)) == "done\n"
    # And back, from eight devices to one.
    found = checkpoint.restore(tmp_path / "eight")
    assert_identical(found, {"w": make("nf4"), "key": jax.random.key(3)})


@pytest.mark.slow
def test_a_flipped_byte_anywhere_on_disk_is_never_silent(tmp_path):
    # Random codes cannot be compressed: they are on disk as they are.
    codes = jax.random.bits(jax.random.key(5), (64, 64), jnp.uint8)
    weight = q4jax.Params4bit(codes, make("nf4").quant_state)
    tree = {"w": weight, "lora": jax.random.normal(jax.random.key(6), (8, 8)), "step": 1}
    checkpoint.save(tmp_path / "c", tree)
    # In a process of its own, for Orbax leaves coroutines behind when a read fails.
    code = """
    from pathlib import Path
    tree = checkpoint.restore(path)
    bits = lambda tree: [np.asarray(a).tobytes() for a in jax.tree.leaves(tree)]
    codes = np.asarray(tree["w"].packed).tobytes()

    def flip(file, position):
        data = bytearray(original)
        data[position] ^= 0x10
        file.write_bytes(data)
        try:
            same = bits(checkpoint.restore(path, tree)) == bits(tree)
            return "unused" if same else "SILENT"
        except Exception as error:
            return "named" if "c is corrupted: w.packed, uint8[64, 64]" in str(error) else "error"

    for file in sorted(p for p in Path(path).rglob("*") if p.is_file()):
        original = file.read_bytes()
        for position in {0, len(original) // 3, len(original) // 2, len(original) - 1}:
            print("any", flip(file, position))
        if codes[:32] in original:
            print("codes", flip(file, original.find(codes[:32]) + 5))
        file.write_bytes(original)
    print("restored", bits(checkpoint.restore(path)) == bits(tree))
    """
    lines = finish(start(code, tmp_path / "c")).splitlines()
    assert lines[-1] == "restored True"
    assert "any SILENT" not in lines
    assert lines.count("any error") > 10
    assert [line for line in lines if line.startswith("codes")] == ["codes named"]


KILLED = """
import json
from q4jax.checkpoint import replacement

def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)

def half_a_swap(path, folder, local):
    path.rename(folder / "old")
    die()

def die_at_the_header(args):
    dumps = json.dumps
    json.dumps = lambda x, **settings: die() if "fingerprint" in x else dumps(x, **settings)
    return args

x = jax.random.normal(jax.random.key(0), (64, 128))
point = sys.argv[2]
if point != "first":
    checkpoint.save(path, {"w": q4jax.Params4bit.quantize(x), "x": x, "step": 1})
if point in ("first", "writing"):  # while Orbax writes
    save_args = orbax.save_args
    orbax.save_args = lambda tree: die_at_the_header(save_args(tree))
else:
    replacement._exchange = {"staged": die, "swapping": half_a_swap}[point]
checkpoint.save(path, {"w": q4jax.Params4bit.quantize(-x), "x": -x, "step": 2}, force=True)
"""


@pytest.mark.slow
def test_a_save_that_is_killed_loses_nothing(tmp_path):
    points = ["first", "writing", "staged", "swapping"]
    for point in points:
        (tmp_path / point).mkdir()
    for pair in (points[:2], points[2:]):
        running = [start(KILLED, tmp_path / point / "c", point) for point in pair]
        for process in running:
            finish(process, returncode=-9)

    def tree(x, step):
        return {"w": q4jax.Params4bit.quantize(x), "x": x, "step": step}

    # Nothing complete: an error that names what is left.
    path = tmp_path / "first" / "c"
    (left,) = os.listdir(path.parent)
    with pytest.raises(FileNotFoundError, match=f"no checkpoint at {path}; .* left {left}"):
        checkpoint.restore(path)
    # The old one while the new one is not complete, or not in its place yet.
    for point in ("writing", "staged"):
        path = tmp_path / point / "c"
        assert len(os.listdir(path.parent)) == 2
        assert_identical(checkpoint.restore(path), tree(W, 1))
    # The new one, complete, when the old one is out of the way.
    path = tmp_path / "swapping" / "c"
    assert os.listdir(path.parent) == [".c.unfinished"]
    assert_identical(checkpoint.restore(path), tree(-W, 2))
    with pytest.raises(FileExistsError, match=r"c exists already"):
        checkpoint.save(path, tree(W, 3))
    # The next save cleans up.
    for point in points:
        path = tmp_path / point / "c"
        checkpoint.save(path, {"x": jnp.ones(2)}, force=True)
        assert_identical(checkpoint.restore(path), {"x": jnp.ones(2)})
        assert os.listdir(path.parent) == ["c"]
