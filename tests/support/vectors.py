"""What bitsandbytes computed: `golden/README.md` says what each file holds."""

import functools
import json
from pathlib import Path

import numpy as np
from safetensors.flax import load_file

from tests.support.oracle import DTYPES

GOLDEN = Path(__file__).parents[1] / "golden"
MANIFEST = json.loads((GOLDEN / "manifest.json").read_text())
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def decode(array, dtype):
    """Bfloat16 is stored as its bit pattern."""
    return array.view(DTYPES[dtype]) if dtype == "bfloat16" else array


@functools.cache
def npz(name):
    with np.load(GOLDEN / name) as file:
        return dict(file)


@functools.cache
def tensors(name):
    """A safetensors file as numpy arrays."""
    file = load_file(GOLDEN / "linear4bit" / f"{name}.safetensors")
    return {key: np.asarray(value) for key, value in file.items()}


def under(prefix, d):
    """The entries of `d` below `prefix`, without it."""
    return {key[len(prefix) :]: value for key, value in d.items() if key.startswith(prefix)}


DYNAMIC_MAP = npz("quant/blockwise8_dynamic.npz")["dynamic_map"]
