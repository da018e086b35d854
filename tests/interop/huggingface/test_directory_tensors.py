"""Which tensors of a directory are taken, by its index and without."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

import q4jax
from q4jax.interop import huggingface
from q4jax.interop.huggingface.directory import DirectoryTensors


def shards(folder, files, index, stem="model"):
    """Write shards, `{file: {tensor: value}}`, and the index of the tensors."""
    for file, tensors in files.items():
        save_file({n: np.full(2, v, np.float32) for n, v in tensors.items()}, folder / file)
    text = json.dumps({"weight_map": index})
    (folder / f"{stem}.safetensors.index.json").write_text(text)
    return folder


def test_tensors_that_the_index_does_not_list_are_taken(tmp_path):
    files = {
        "a.safetensors": {"x": 1, "y": 2},
        "b.safetensors": {"z": 3},
        "c.safetensors": {"w": 4},
    }
    folder = shards(tmp_path, files, {"x": "a.safetensors", "z": "b.safetensors"})
    found = DirectoryTensors(folder)
    assert {name: found[name][0] for name in found} == {"x": 1, "y": 2, "z": 3}


def test_a_tensor_of_two_shards_is_the_one_of_the_index(tmp_path):
    files = {"a.safetensors": {"x": 1, "y": 2}, "b.safetensors": {"x": 3, "z": 4}}
    for home, value in (("a", 1), ("b", 3)):
        index = {"x": f"{home}.safetensors", "y": "a.safetensors", "z": "b.safetensors"}
        assert DirectoryTensors(shards(tmp_path, files, index))["x"][0] == value
    folder = shards(tmp_path, files, {"y": "a.safetensors", "z": "b.safetensors"})
    with pytest.raises(ValueError, match=r"a.safetensors and b.safetensors both hold 'x'"):
        DirectoryTensors(folder)


def test_what_the_index_lists_must_be_there(tmp_path):
    folder = shards(tmp_path, {"a.safetensors": {"x": 1}}, {"x": "a.safetensors"})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "a.safetensors"}}))
    with pytest.raises(ValueError, match=r"names tensors that no shard holds: \['y'\]"):
        DirectoryTensors(folder)
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"lists shards that are not in .*b.safetensors"):
        DirectoryTensors(folder)


@pytest.mark.parametrize("sharded", [False, True])
def test_the_names_of_diffusers_are_read(tmp_path, sharded):
    weight = q4jax.Params4bit.quantize(np.ones((2, 64), np.float32))
    huggingface.save_directory({"to_q.weight": weight}, tmp_path, {"model_type": "own"})
    stem = "diffusion_pytorch_model"
    file = stem + ("-00001-of-00001" if sharded else "") + ".safetensors"
    (tmp_path / "model.safetensors").rename(tmp_path / file)
    if sharded:
        shards(tmp_path, {}, {"to_q.weight": file}, stem)
    found = huggingface.load_directory(tmp_path)
    assert q4jax.fingerprint(found) == q4jax.fingerprint({"to_q.weight": weight})
