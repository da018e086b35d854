"""Weights that a name, a shape and a seed determine: what the vectors are made with."""

import json
import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from q4jax.models.decoder.describe import describe

VECTORS = Path(__file__).parents[1] / "models" / "vectors"
CASES = sorted(file.stem for file in VECTORS.glob("*.safetensors"))


def random_weights(shapes, seed):
    """float32 arrays by name: norm scales around 1, all else around 0."""
    found = {}
    for name, shape in shapes.items():
        values = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape)
        scaled = 1 + 0.3 * values if name.endswith("norm.weight") else 0.2 * values
        found[name] = np.asarray(scaled, np.float32)
    return found


def write_directory(case, folder):
    """The directory that transformers wrote, with its weights; returns what it computes there."""
    file = VECTORS / f"{case}.safetensors"
    with safe_open(file, "np") as opened:
        metadata = opened.metadata()
    weights = random_weights(json.loads(metadata["shapes"]), int(metadata["seed"]))
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(metadata["config"])
    return load_file(file)


def logits_of(model, vectors, forward):
    """float32 `[real tokens, vocab_size]`."""
    ids, mask = jnp.asarray(vectors["input_ids"]), jnp.asarray(vectors["attention_mask"])
    return np.asarray(forward(model, ids, attention_mask=mask))[vectors["attention_mask"] == 1]


def entries_of(case):
    """The `config.json` of a case."""
    with safe_open(VECTORS / f"{case}.safetensors", "np") as opened:
        return json.loads(opened.metadata()["config"])


def entries_read(kind):
    """The entries of a family's `config.json` that decide what its models compute."""
    given = [config for config in map(entries_of, CASES) if config["model_type"] == kind]
    # Some are looked up only where others are missing.
    missing = ("layer_types", "no_rope_layers", "moe_layers")
    given.append({name: value for name, value in given[0].items() if name not in missing})
    return set().union(*(describe(config)[1] for config in given))
