"""Llama models to Hugging Face directories."""

import os
from typing import Any

import jax
import numpy as np
from flax import nnx

from q4jax.frozen import thaw
from q4jax.interop.huggingface import save_directory
from q4jax.layers import Linear4bit
from q4jax.models.llama import Llama
from q4jax.models.names import LEAVES, is_stacked, is_transposed, tensor_names
from q4jax.params import Params4bit
from q4jax.walk import walk_modules


def save_pretrained(
    model: Llama,
    path: str | os.PathLike[str],
    max_shard_bytes: int = 5_000_000_000,
    *,
    quant_storage: str = "uint8",
) -> None:
    """Writes a Llama as `from_pretrained` and transformers read it, dense or with 4-bit layers.

    Args:
      model: without adapters: `interop.peft` writes these, `merge_lora` merges them.
      path: the directory, made if it is not there; a checkpoint that is there is not replaced.
      max_shard_bytes: size of a file.
      quant_storage: what holds 4-bit codes: "uint8", "bfloat16", "float16" or "float32".

    Raises:
      TypeError: the model holds variables that are no weights of a Llama; the message names one.
      FileExistsError: a checkpoint is there already.
      ValueError: 4-bit layers that one `quantization_config` cannot describe.
    """
    layers = model.config.num_hidden_layers
    tree: dict[str, Any] = {}
    for path_of, module in walk_modules(model):
        at = tuple(path_of.split("."))
        if isinstance(module, Linear4bit):
            names = tensor_names((*at, "kernel"), layers)
            tree |= dict(zip(names, _layers(thaw(module.weight), is_stacked(at)), strict=True))
        for leaf, variable in vars(module).items():
            if not isinstance(variable, nnx.Variable):
                continue
            if type(variable) is not nnx.Param or leaf not in LEAVES:
                raise TypeError(
                    f"save_pretrained writes plain models; {path_of}.{leaf} is a "
                    f"{type(variable).__name__}: merge adapters first"
                )
            value = np.asarray(variable[...])
            parts = value if is_stacked(at) else value[None]
            for name, part in zip(tensor_names((*at, leaf), layers), parts, strict=True):
                tree[name] = part.T if is_transposed((*at, leaf)) else part
    stored = np.dtype(tree["model.embed_tokens.weight"].dtype)
    for name, leaf in tree.items():
        if name.endswith("norm.weight"):
            tree[name] = _scale(leaf, stored)
    config = model.config.to_hf() | {"dtype": stored.name}
    compute = model.embed_tokens.dtype
    if compute is not None:
        config["quantization_config"] = {"bnb_4bit_compute_dtype": np.dtype(compute).name}
    save_directory(tree, path, config, quant_storage, max_shard_bytes=max_shard_bytes)


def _scale(scale: np.ndarray, stored: np.dtype[Any]) -> np.ndarray:
    """A norm scale, float32 in the model, in the dtype of the weights, if that holds its values.

    transformers computes in the dtype of a scale and expects one dtype throughout.
    """
    cast = scale.astype(stored)
    return cast if np.array_equal(cast.astype(np.float32), scale) else scale


def _layers(weight: Params4bit, stacked: bool) -> list[Params4bit]:
    """The weight of each layer."""
    if not stacked:
        return [weight]
    count = weight.packed.shape[0]
    return [jax.tree.map(lambda a, i=i: a[i], weight) for i in range(count)]
