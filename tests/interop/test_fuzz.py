"""Malformed input is refused by a documented error, or read as by the reference reader.

Each mutant has a number, and the same number is the same mutant everywhere.
"""

import json
import os
import random
import shutil
import time
import tracemalloc
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import q4jax
from q4jax.interop import bitsandbytes as bnb
from q4jax.interop import huggingface, peft
from q4jax.models import LlamaConfig, from_pretrained
from tests.support.fuzz import mutants, reader
from tests.support.random_weights import CASES, entries_of
from tests.support.vectors import GOLDEN

REFUSED = (ValueError, NotImplementedError, FileNotFoundError)
QUICK, FULL = 300, 10_000
# Of one mutant: processor time, and memory beyond that of its own bytes.
SECONDS, BYTES = 2.0, 8_000_000


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return the bytes of valid files."""
    folder = GOLDEN / "linear4bit"
    found = [path.read_bytes() for path in folder.glob("*.state_dict.safetensors")]
    w = jnp.linspace(-1, 1, 3 * 33).reshape(3, 33)
    tree = {
        "a.weight": q4jax.Params4bit.quantize(w, quant_type="nf4"),
        "b.weight": q4jax.Params4bit.quantize(jnp.ones((2, 64)), 32, True),
        "b.bias": jnp.arange(3.0, dtype=jnp.bfloat16),
        "ids": np.arange(4),
    }
    path = tmp_path_factory.mktemp("fuzz") / "mixed"
    bnb.save_file(tree, path, metadata={"format": "pt"})
    return [*found, path.read_bytes(), path.read_bytes()]


@pytest.fixture(scope="module", autouse=True)
def measured():
    tracemalloc.start()
    yield
    tracemalloc.stop()


def attempt(number, size, load, seconds=SECONDS):
    """Return the result of `load`, or None if it refused; check time and memory."""
    tracemalloc.clear_traces()
    start = time.process_time()
    try:
        found = load()
    except REFUSED as error:
        found, message = None, str(error)
        if not message or len(message) > 10_000:
            raise AssertionError(f"mutant {number}: {message[:100]!r}") from None
    elapsed, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
    assert elapsed < seconds, f"mutant {number} took {elapsed:.1f} s"
    assert peak < 30 * size + BYTES, f"mutant {number} of {size} bytes took {peak} bytes"
    return found


def run_files(files, folder, numbers):
    """Return the number of mutants that were read; compare each with the reference reader."""
    path, loaded = folder / "mutant.safetensors", 0
    for number in numbers:
        rng = random.Random(number)
        data = mutants.mutate(rng.choice(files), rng)
        path.write_bytes(data)
        tree = attempt(number, len(data), lambda: bnb.load_file(path))
        if tree is not None:
            loaded += 1
            assert reader.describe(tree) == reader.read(data), f"mutant {number} is another tree"
    return loaded


def test_good_files_are_read_as_by_the_reader(files, tmp_path):
    for data in files:
        (tmp_path / "x").write_bytes(data)
        assert reader.describe(bnb.load_file(tmp_path / "x")) == reader.read(data)


def test_some_malformed_files(files, tmp_path):
    # Flipped bits of the payload, and tensors of no weight, are read; nearly all else is refused.
    assert 0.02 * QUICK < run_files(files, tmp_path, range(QUICK)) < 0.3 * QUICK


@pytest.mark.heavy
def test_malformed_files(files, tmp_path):
    assert 0.02 * FULL < run_files(files, tmp_path, range(QUICK, QUICK + FULL)) < 0.3 * FULL


LLAMA = GOLDEN / "llama_tiny_bnb4"
PATHS = [
    *(
        "../model.safetensors",
        "/etc/passwd",
        "model.safetensors/..",
        "a/b.safetensors",
        ".safetensors",
    ),
    *(
        "C:\\x.safetensors",
        "..",
        "",
        "\x00.safetensors",
        "model.safetensors\n",
        "missing.safetensors",
    ),
    *("~/x.safetensors", "folder.safetensors", "link.safetensors", "pipe.safetensors"),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Write a directory of two shards, with a folder, a dangling link and a pipe."""
    folder = tmp_path_factory.mktemp("hf")
    tree = {
        "up.weight": q4jax.Params4bit.quantize(jnp.ones((2, 64)), quant_type="nf4"),
        "down.weight": q4jax.Params4bit.quantize(jnp.ones((2, 64)), quant_type="nf4"),
        "norm.weight": jnp.ones(4),
    }
    config = json.loads((LLAMA / "config.json").read_text())
    huggingface.save_directory(tree, folder / "good", config, max_shard_bytes=300)
    (folder / "good" / "folder.safetensors").mkdir()
    (folder / "good" / "link.safetensors").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "good" / "pipe.safetensors")
    return folder / "good"


def change_directory(folder, good, rng):
    """Mutate one file of a directory; return the shard that may have changed."""
    index_path = folder / "model.safetensors.index.json"
    index = json.loads((good / index_path.name).read_text())
    config = json.loads((good / "config.json").read_text())
    shard = rng.choice(sorted(set(index["weight_map"].values())))
    case = rng.randrange(6)
    if case == 0:
        index["weight_map"][rng.choice(list(index["weight_map"]))] = rng.choice(PATHS)
    elif case == 1:
        index = mutants.mutate_json(index, rng)
    elif case == 2:
        index["weight_map"] = mutants.mutate_json(index["weight_map"], rng)
    elif case == 3:
        entry = mutants.mutate_json(config["quantization_config"], rng)
        config["quantization_config"] = entry
    elif case == 4:
        config = mutants.mutate_json(config, rng)
    else:
        (folder / shard).write_bytes(mutants.mutate((good / shard).read_bytes(), rng))
    index_path.write_bytes(mutants.json_text(index, rng))
    (folder / "config.json").write_bytes(mutants.json_text(config, rng))
    return shard


def run_directories(directory, folder, numbers):
    shutil.copytree(directory, folder / "m", symlinks=True, copy_function=copy_regular)
    expected = reader.describe(huggingface.load_directory(directory))
    size = sum(path.stat().st_size for path in directory.glob("model-*"))
    for number in numbers:
        rng = random.Random(number)
        shard = change_directory(folder / "m", directory, rng)
        tree = attempt(
            number, size, lambda: huggingface.load_directory(folder / "m", progress=False)
        )
        if tree is not None:
            parts = [
                reader.read((folder / "m" / name.name).read_bytes())
                for name in directory.glob("model-*")
            ]
            mutant = {name: value for part in parts for name, value in part.items()}
            assert reader.describe(tree) in (mutant, expected), f"mutant {number}"
        shutil.copyfile(directory / shard, folder / "m" / shard)


def copy_regular(source, target):
    if Path(source).is_file():
        shutil.copyfile(source, target)


def run_configs(numbers):
    configs = [json.loads((LLAMA / "config.json").read_text())]
    configs += map(entries_of, CASES)
    for number in numbers:
        rng = random.Random(number)
        config = configs[number % len(configs)]
        mutant = json.loads(mutants.json.dumps(mutants.mutate_json(config, rng)))
        if isinstance(mutant, dict):
            found = attempt(number, 2000, lambda mutant=mutant: LlamaConfig.from_hf(mutant))
            assert found is None or LlamaConfig.from_hf(found.to_hf()) == found


def run_adapters(folder, numbers):
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"q": 2},
        "bias": "none",
    }
    names = [f"base_model.model.model.q.lora_{side}.weight" for side in "AB"]
    save_file(
        dict(zip(names, (np.ones((2, 8), "f4"), np.ones((8, 2), "f4")), strict=True)),
        folder / "good",
    )
    good = (folder / "good").read_bytes()
    for number in numbers:
        rng = random.Random(number)
        changed = rng.random() < 0.5
        data = mutants.mutate(good, rng) if changed else good
        text = json.dumps(config).encode()
        if not changed:
            text = mutants.json_text(mutants.mutate_json(config, rng), rng)
        (folder / "adapter_model.safetensors").write_bytes(data)
        (folder / "adapter_config.json").write_bytes(text)
        found = attempt(number, len(data) + len(text), lambda: peft.read_adapters(folder))
        if found is not None:
            tensors = reader.read_tensors(data)
            pairs = {
                f"base_model.model.{name}.lora_{side}.weight": array
                for name, pair in found[1].items()
                for side, array in zip("AB", pair, strict=True)
            }
            assert pairs.keys() == tensors.keys()
            assert all(pairs[n].tobytes() == tensors[n].tobytes() for n in tensors)


def test_some_malformed_directories(directory, tmp_path):
    run_directories(directory, tmp_path, range(QUICK))


def test_some_malformed_configs_and_adapters(tmp_path):
    run_configs(range(QUICK))
    run_adapters(tmp_path, range(QUICK))


@pytest.mark.heavy
def test_malformed_directories_configs_and_adapters(directory, tmp_path):
    numbers = range(QUICK, QUICK + FULL // 5)
    run_directories(directory, tmp_path, numbers)
    run_configs(numbers)
    run_adapters(tmp_path, numbers)


def run_models(folder, numbers):
    """Load mutated models; each one that loads has the weights of its file."""
    shutil.copytree(LLAMA, folder / "m")
    config = json.loads((LLAMA / "config.json").read_text())
    good = (LLAMA / "model.safetensors").read_bytes()
    for number in numbers:
        rng = random.Random(number)
        changed = rng.random() < 0.5
        mutant = config if changed else mutants.mutate_json(config, rng)
        data = mutants.mutate(good, rng) if changed else good
        (folder / "m" / "config.json").write_bytes(mutants.json_text(mutant, rng))
        (folder / "m" / "model.safetensors").write_bytes(data)
        # To trace the model takes seconds, whatever is in the files.
        model = attempt(
            number, len(data), lambda: from_pretrained(folder / "m", progress=False), seconds=20
        )
        if model is not None:
            stored = reader.read_tensors(data)
            up = np.stack(
                [stored[f"model.layers.{i}.mlp.up_proj.weight"].ravel() for i in range(2)]
            )
            packed = np.asarray(model.layers.mlp.up_proj.weight.packed[...])
            assert packed.tobytes() == up.tobytes()
            head = np.asarray(model.lm_head.kernel[...]).T
            assert head.tobytes() == stored["lm_head.weight"].tobytes()


@pytest.mark.heavy
def test_malformed_models(tmp_path):
    run_models(tmp_path, range(200))
