"""A manifest that lies, signed anew: one error names the checkpoint, before memory is taken."""

import copy
import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
from flax import nnx

import q4jax
from q4jax import checkpoint, checkpoint_v1
from q4jax.checkpoint import manifest
from q4jax.tree.fingerprint import _fingerprint_0_1

WEIGHT = q4jax.Params4bit.quantize(jnp.ones((4, 64)), compress_statistics=True)
TREE = {"w": WEIGHT, "n": np.arange(5), "l": [jnp.ones(3), 2.5], "k": jax.random.key(1), "s": 1}
WRONG = (None, -1, 1.5, "x", [], {}, True, [[300000000]], ["step", [300000000]], 10**40)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "c"
    checkpoint.save(path, TREE)
    return path, json.loads((path / "q4jax" / "metadata").read_text())


def refused(path, header):
    """The error of a header, signed unless it is a text."""
    if not isinstance(header, str):
        header = json.dumps(header | {"sha256": manifest._own_digest(header)})
    (path / "q4jax" / "metadata").write_text(header)
    with pytest.raises(ValueError, match=str(path)) as error:
        checkpoint.restore(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 700
    return str(error.value)


def assert_same(found, expected):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        one, other = (np.asarray(manifest.data_of(jnp.asarray(leaf))) for leaf in (one, other))
        np.testing.assert_array_equal(one, other, strict=True)


def set_at(header, at, value):
    header = copy.deepcopy(header)
    *parents, last = at
    node = header
    for key in parents:
        node = node[key]
    if value is KeyError:
        del node[last]
    else:
        node[last] = value
    return header


@pytest.mark.parametrize("name", ["path", "leaf", "kind", "data", "sha256", "impl", "value"])
def test_every_key_of_an_entry_must_be_what_it_was(saved, name):
    path, header = saved
    for number, entry in enumerate(header["leaves"]):
        if name not in entry:
            continue
        free = name == "value" and type(entry["value"])
        for value in (KeyError, *(w for w in WRONG if type(w) is not free)):
            refused(path, set_at(header, ("leaves", number, name), value))
        if isinstance(entry[name], str):
            refused(path, set_at(header, ("leaves", number, name), entry[name] * 2))


@pytest.mark.parametrize("name", ["format", "fingerprint", "leaves"])
def test_every_key_of_the_header_must_be_what_it_was(saved, name):
    path, header = saved
    for value in (KeyError, *WRONG):
        if (name, value) != ("fingerprint", None):
            refused(path, set_at(header, (name,), value))
    refused(path, header | {"more": 1})


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([[]], "a path must have 1 to 256 keys, got 0"),
        ([["a"] * 20_000], "a path must have 1 to 256 keys, got 20000"),
        ([["s"], ["s"]], "two leaves are named 's'"),
        ([["a", "b"], ["a.b"]], "two leaves are named 'a.b'"),
        ([["s"], ["s", "t"]], "'s.t' is below another leaf"),
        ([["step", [300_000_000]]], "its lists have 300000000 positions without a leaf"),
        ([["step", [2**40]]], "a key of path must be str, int or [index]"),
    ],
)
def test_paths_that_no_tree_has(saved, paths, message):
    path, header = saved
    scalar = next(entry for entry in header["leaves"] if entry["kind"] == "scalar")
    arrays = [entry for entry in header["leaves"] if entry["kind"] != "scalar"]
    found = [scalar | {"path": where} for where in paths]
    assert message in refused(path, header | {"leaves": [*arrays, *found]})


def test_headers_that_are_too_deep_or_no_json(saved):
    path, _ = saved
    deep = "[" * 20_000 + "]" * 20_000
    for text in ("", "[]", "3", deep, f'{{"format": 1, "leaves": {deep}}}', "9" * 5000):
        refused(path, text)


def test_an_array_is_not_larger_than_the_manifest_says(saved):
    """Files of arrays that say another size than the header are refused before they are read."""
    path, header = saved
    for name, larger in (("n", "int64[300000000]"), ("l.0", "float32[300000000]")):
        number = next(i for i, e in enumerate(header["leaves"]) if name.startswith(e["path"][0]))
        entry = header["leaves"][number] | {"data": larger, "leaf": larger}
        message = refused(path, set_at(header, ("leaves", number), entry))
        assert "its arrays cannot be read" in message


@pytest.fixture(scope="module")
def in_plain_files(tmp_path_factory):
    """A checkpoint with a file for each array, and the tree in it."""
    path = tmp_path_factory.mktemp("plain") / "c"
    handlers = {
        "arrays": ocp.PyTreeCheckpointHandler(use_ocdbt=False),
        "q4jax": ocp.JsonCheckpointHandler(),
    }
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as checkpointer:
        checkpointer.save(path, args=checkpoint.save_args(TREE))
    return path


@pytest.mark.parametrize("api", [checkpoint, checkpoint_v1])
def test_data_files_of_another_size_are_refused_by_name(in_plain_files, tmp_path, api):
    """The manifest is valid; the file of one array was cut, or has bytes more."""
    files = [file for file in (in_plain_files / "arrays").glob("*/*[0-9]") if file.is_file()]
    files = [file for file in files if file.parent.name != "array_metadatas"]
    arrays = [leaf for leaf in jax.tree.leaves(TREE) if hasattr(leaf, "dtype")]
    assert len(files) == len(arrays)
    path = tmp_path / "c"
    shutil.copytree(in_plain_files, path)
    for original in files:
        data, file = original.read_bytes(), path / original.relative_to(in_plain_files)
        for other in (b"", data[: len(data) // 2], data[:-1], data + b"\0", data + data):
            file.write_bytes(other)
            with pytest.raises(ValueError, match=f"{path} is corrupted .*{file}"):
                api.restore(path)
        file.write_bytes(data)
    assert_same(api.restore(path), TREE)


@pytest.mark.parametrize("api", [checkpoint, checkpoint_v1])
def test_a_joint_data_file_that_was_cut_is_refused_by_the_name_of_an_array(tmp_path, api):
    # Random bytes cannot be compressed, so a file with fewer bytes does not have the array.
    bits = jax.random.bits(jax.random.key(3), (256, 64), jnp.uint8)
    tree = {"bits": bits, "ones": jnp.ones(3)}
    path = tmp_path / "c"
    checkpoint.save(path, tree)
    file = max((path / "arrays").rglob("*"), key=lambda file: file.stat().st_size)
    data = file.read_bytes()
    assert len(data) > bits.nbytes
    for size in (0, 1, bits.nbytes // 2, bits.nbytes - 1):
        file.write_bytes(data[:size])
        with pytest.raises(ValueError, match=rf"{path} is corrupted .*bits"):
            api.restore(path)
    # Orbax reads ranges of the file, so bytes after them are in no array.
    file.write_bytes(data + data)
    assert_same(api.restore(path), tree)


@pytest.mark.parametrize("api", [checkpoint, checkpoint_v1])
@pytest.mark.parametrize("with_target", [False, True])
def test_arrays_of_another_size_are_refused_by_name(in_plain_files, tmp_path, api, with_target):
    """The manifest is valid; the file of one array says a shorter, longer or huge one."""
    path = tmp_path / "c"
    shutil.copytree(in_plain_files, path)
    for about in sorted((path / "arrays").glob("*/.zarray")):
        store = {"driver": "file", "path": str(about.parent)}
        array = tensorstore.open({"driver": "zarr", "kvstore": store}).result()
        text, shape = about.read_text(), array.shape
        for rows in [shape[0] - 1, shape[0] + 1, 3_000_000_000] if shape else []:
            other = (rows, *shape[1:])
            array.resize(exclusive_max=other, resize_metadata_only=True).result()
            with pytest.raises(ValueError, match=f"{path} is corrupted") as error:
                api.restore(path, TREE if with_target else None)
            expected = f"{about.parent.name} has shape {other} in its file, not {shape}"
            assert expected in str(error.value)
        about.write_text(text)
    assert_same(api.restore(path), TREE)


@pytest.mark.parametrize("api", [checkpoint, checkpoint_v1])
def test_a_manifest_that_was_cut_is_no_foreign_checkpoint(saved, tmp_path, api):
    path = tmp_path / "c"
    shutil.copytree(saved[0], path)
    file = path / "q4jax" / "metadata"
    text = json.dumps(saved[1])
    for other in ("", text[: len(text) // 2], text[:-1], text + "x"):
        file.write_text(other)
        with pytest.raises(ValueError, match=f"{path} is corrupted or incomplete") as error:
            api.restore(path)
        assert "\n" not in str(error.value)


def test_what_could_not_be_read_is_not_saved(tmp_path):
    deep = jnp.ones(1)
    for _ in range(257):
        deep = {"a": deep}
    for tree, error in (
        (deep, ValueError),
        ([None] * 1_000_002 + [jnp.ones(1)], ValueError),
        ({"x": jnp.ones(1), "n": 10**5000}, ValueError),
        ({"x": np.array([None])}, TypeError),
        ({"x": np.array(["text"])}, TypeError),
    ):
        with pytest.raises(error):
            checkpoint.save(tmp_path / "c", tree)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("api", [checkpoint, checkpoint_v1])
def test_a_part_is_restored_and_the_rest_named(tmp_path, caplog, api):
    tree = {"model": {"w": WEIGHT}, "opt": {"mu": jnp.ones(2), "nu": jnp.ones(3)}, "step": 3}
    checkpoint.save(tmp_path / "c", tree)
    target = {"model": {"w": WEIGHT}}
    with pytest.raises(ValueError, match=r"opt.mu is missing .*\(partial=True restores the target"):
        api.restore(tmp_path / "c", target)
    with caplog.at_level(logging.INFO, "q4jax"):
        found = api.restore(tmp_path / "c", target, partial=True)
    jax.tree.map(np.testing.assert_array_equal, found, target)
    named = [record.getMessage() for record in caplog.records if record.name == "q4jax"]
    assert named == [f"not restored from {tmp_path / 'c'}: {part}" for part in ("opt", "step")]
    assert api.restore(tmp_path / "c", {"step": 0}, partial=True) == {"step": 3}
    with pytest.raises(ValueError, match="more is float32"):
        api.restore(tmp_path / "c", target | {"more": jnp.ones(1)}, partial=True)
    with pytest.raises(ValueError, match="partial=True needs a target"):
        api.restore(tmp_path / "c", partial=True)


def test_adapters_saved_with_a_fingerprint_of_0_1_load():
    model = q4jax.add_lora(q4jax.LinearNF4(64, 32, rngs=nnx.Rngs(0)), rank=2, alpha=4)
    tree = checkpoint.adapter_state(model, base=_fingerprint_0_1(model))
    checkpoint.with_adapters(model, tree)
    with pytest.raises(ValueError, match="the adapters belong to base 000"):
        checkpoint.with_adapters(model, tree | {"base": "0" * 64})
