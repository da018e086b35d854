"""Writing directories: what is refused, what it costs, and two writers of one path."""

import os
import threading
import time

import numpy as np
import pytest

import q4jax
from q4jax.interop import bitsandbytes, huggingface

SPEC = q4jax.QuantSpec("nf4", 64, 0, "float32", (4, 64))


def weight(version=0):
    state = q4jax.QuantState(np.full((4, 1), version, np.float32), None, None, SPEC)
    return q4jax.Params4bit(np.full((4, 32), version, np.uint8), state)


@pytest.fixture
def no_fsync(monkeypatch):
    """It would take most of the time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def cyclic():
    config = {}
    config["self"] = config
    return config


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (None, TypeError, "config must be the content of config.json, got NoneType"),
        ({"quantization_config": 5}, ValueError, "quantization_config must be an object, got 5"),
        ({"a": object()}, TypeError, "config.json cannot be written as JSON: Object of type obj"),
        ({"a": np.float32(1)}, TypeError, "config.json cannot be written as JSON: .* float32"),
        ({"a": {1: 2, "1": 3}}, ValueError, "config.json is not JSON: key '1' is given twice"),
        (cyclic(), ValueError, "config.json cannot be written as JSON"),
        (
            {"quantization_config": {"bnb_4bit_compute_dtype": "int7"}},
            ValueError,
            "config.json: .*int7",
        ),
    ],
)
def test_configs_that_would_not_be_read_are_not_written(tmp_path, config, error, message):
    with pytest.raises(error, match=message):
        huggingface.save_directory({"w": weight()}, tmp_path / "d", config)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["config.json", "x.safetensors", "model.safetensors.index.json", "a/b", "..", "", "/x"]
)
def test_other_files_are_plain_ones(tmp_path, name):
    with pytest.raises(ValueError, match=f"files must not name '{name}'"):
        huggingface.save_directory({"w": weight()}, tmp_path / "d", {}, files={name: b""})
    assert not list(tmp_path.iterdir())


def test_what_is_in_the_directory_is_kept(tmp_path):
    (tmp_path / "tokenizer.json").write_text("kept")
    with pytest.raises(FileExistsError, match="tokenizer.json exists already"):
        huggingface.save_directory({"w": weight()}, tmp_path, {}, files={"tokenizer.json": b""})
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    huggingface.save_directory({"w": weight()}, tmp_path, {}, files={"vocab.json": b"{}"})
    assert (tmp_path / "tokenizer.json").read_text() == "kept"
    assert (tmp_path / "vocab.json").read_bytes() == b"{}"
    assert huggingface.load_directory(tmp_path)["w"].quant_state.spec == SPEC


def test_shards_hold_whole_weights(tmp_path):
    tree = {name: weight() for name in ("a", "a.b", "b.quant_state.x")} | {"b": np.ones(2)}
    huggingface.save_directory(tree, tmp_path, {}, max_shard_bytes=1)
    shards = [bitsandbytes.load_file(path) for path in sorted(tmp_path.glob("*.safetensors"))]
    assert [list(shard) for shard in shards] == [["a"], ["a.b"], ["b.quant_state.x"], ["b"]]


def test_the_cost_is_linear(tmp_path):
    """Comparing each of 20,000 tensors with each of 5,000 weights would take 10 s."""
    tree = {f"model.layers.{n}.weight": weight() for n in range(5000)}
    start = time.process_time()
    huggingface.save_directory(tree, tmp_path / "d", {})
    assert time.process_time() - start < 5


def race(tmp_path, save, load, rounds=10):
    """Two threads save at once: what is there is whole and of one that succeeded."""
    told = 0
    for number in range(rounds):
        path, start, won = tmp_path / str(number), threading.Barrier(2), []

        def work(version, path=path, start=start, won=won):
            tree = {f"{n}": weight(version) for n in range(30)}
            start.wait()
            try:
                save(tree, path)
                won.append(version)
            except FileExistsError:
                pass

        threads = [threading.Thread(target=work, args=(version,)) for version in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = {int(w.packed[0, 0]) for w in load(path).values()}
        assert len(found) == 1
        assert found <= set(won)
        told += len(won) == 1
    assert not list(tmp_path.glob(".*"))
    return told


def test_one_of_two_directories_wins(tmp_path, no_fsync):
    def save(tree, path):
        huggingface.save_directory(tree, path, {}, max_shard_bytes=1000)

    assert race(tmp_path, save, huggingface.load_directory) == 10


def test_one_of_two_files_wins(tmp_path, no_fsync):
    race(tmp_path, bitsandbytes.save_file, bitsandbytes.load_file)


def test_a_reader_gets_the_old_file_or_the_new_one(tmp_path, no_fsync):
    path, stop, seen = tmp_path / "x", threading.Event(), set()
    trees = [{f"{n}": weight(version) for n in range(20)} for version in (1, 2)]
    bitsandbytes.save_file(trees[0], path)

    def replace():
        while not stop.is_set():
            for tree in trees[::-1]:
                bitsandbytes.save_file(tree, path)

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        for _ in range(100):
            (version,) = {int(w.packed[0, 0]) for w in bitsandbytes.load_file(path).values()}
            seen.add(version)
    finally:
        stop.set()
        thread.join()
    assert seen == {1, 2}
