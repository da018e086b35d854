"""What the examples and the benchmarks share: the model, its tokenizer, and windows of a text."""

import json
from pathlib import Path

import demo
import gguf_llama
import numpy as np
from tokenizers import Tokenizer

import q4jax
from q4jax.models import Llama, from_pretrained


def is_quantized(folder: str | None) -> bool:
    """Return whether a Hugging Face directory has 4-bit weights already."""
    config = {} if folder is None else json.loads(Path(folder, "config.json").read_text())
    return config.get("quantization_config") is not None


def load_model(folder: str | None, quantization: q4jax.QuantConfig | None = None) -> Llama:
    """Load the Hugging Face model in `folder`; None: the demo's SmolLM2.

    Weights that are not quantized yet are quantized one by one while they are read.
    """
    if folder is None:
        return gguf_llama.load(demo.model_file(), quantization)
    return from_pretrained(folder, None if is_quantized(folder) else quantization)


def load_tokenizer(folder: str | None) -> Tokenizer:
    """Load the tokenizer of the model that `load_model` loads."""
    if folder is None:
        return gguf_llama.load_tokenizer(demo.model_file())
    file = Path(folder, "tokenizer.json")
    if not file.is_file():
        raise FileNotFoundError(f"--model: there is no {file}")
    return Tokenizer.from_file(str(file))


def windows(tokens: np.ndarray, count: int, length: int) -> np.ndarray:
    """Return the first windows, int32 `[count, length]`; a short text gives less."""
    length = min(length, tokens.size)
    count = min(count, tokens.size // length)
    return tokens[: count * length].reshape(count, length)
