"""Save a Llama as a Hugging Face directory."""

import os
from typing import Any

import jax
import numpy as np
from flax import nnx

from q4jax.interop.huggingface.load_save import save_directory
from q4jax.models.llama.decoder import Llama
from q4jax.models.llama.tensor_names import LEAVES, is_transposed, lead_shape, tensor_names
from q4jax.nnx.linear import Linear4bit
from q4jax.nnx.traverse import iter_modules
from q4jax.nnx.variables import from_variables
from q4jax.ops.params import Params4bit


def save_pretrained(
    model: Llama,
    path: str | os.PathLike[str],
    max_shard_bytes: int = 5_000_000_000,
    *,
    quant_storage: str = "uint8",
) -> None:
    """Save a model, dense or with 4-bit layers, for `from_pretrained` and transformers.

    4-bit experts are written one by one, under the names of full-precision checkpoints.
    transformers 5 refuses these, since it keeps experts dense beside 4-bit layers.

    Args:
      model: a Llama without adapters; `merge_lora` merges them, `interop.peft` writes them.
      path: the directory; created if missing. A checkpoint in it is not replaced.
      max_shard_bytes: the largest size of a file of more than one weight.
      quant_storage: dtype that holds 4-bit codes: "uint8", "bfloat16", "float16" or "float32".

    Raises:
      TypeError: a variable of the model is no weight of a Llama; the message names it.
      FileExistsError: the directory holds a checkpoint.
      ValueError: one `quantization_config` cannot describe the 4-bit layers, or the `model_type`
        has no entries for the config.
    """
    config = model.config
    entries = config.to_hf()
    tree: dict[str, Any] = {}
    for module_path, module in iter_modules(model):
        at = tuple(module_path.split("."))
        if isinstance(module, Linear4bit):
            names = tensor_names((*at, "kernel"), config)
            weights = _matrices(from_variables(module.weight), lead_shape(at, config))
            tree |= dict(zip(names, weights, strict=True))
        for leaf, variable in vars(module).items():
            if not isinstance(variable, nnx.Variable):
                continue
            if type(variable) is not nnx.Param or leaf not in LEAVES:
                raise TypeError(
                    f"save_pretrained writes plain models; {module_path}.{leaf} is a "
                    f"{type(variable).__name__}: merge adapters first"
                )
            value = np.asarray(variable[...])
            parts = value.reshape(-1, *value.shape[len(lead_shape(at, config)) :])
            for name, part in zip(tensor_names((*at, leaf), config), parts, strict=True):
                tree[name] = part.T if is_transposed((*at, leaf)) else part
    stored = np.dtype(tree["model.embed_tokens.weight"].dtype)
    for name, leaf in tree.items():
        if name.endswith("norm.weight"):
            tree[name] = _scale(leaf, stored)
    entries["dtype"] = stored.name
    compute = model.embed_tokens.dtype
    if compute is not None:
        entries["quantization_config"] = {"bnb_4bit_compute_dtype": np.dtype(compute).name}
    save_directory(tree, path, entries, quant_storage, max_shard_bytes=max_shard_bytes)


def _scale(scale: np.ndarray, stored: np.dtype[Any]) -> np.ndarray:
    """Return a norm scale in the dtype of the weights if the cast is exact.

    transformers computes in the dtype of a scale and expects one dtype in a checkpoint.
    """
    cast = scale.astype(stored)
    return cast if np.array_equal(cast.astype(np.float32), scale) else scale


def _matrices(weight: Params4bit, lead: tuple[int, ...]) -> list[Params4bit]:
    """Return the weights of the layers, or of all their experts."""
    return [jax.tree.map(lambda a, at=at: a[at], weight) for at in np.ndindex(*lead)]
