"""Save a Llama as a Hugging Face directory."""

import os
from typing import Any

import jax
import numpy as np
from flax import nnx

from q4jax.interop.huggingface.load_save import save_directory
from q4jax.interop.huggingface.tokenizer import tokenizer_files
from q4jax.models.decoder.decoder import Llama
from q4jax.models.decoder.tensor_names import Source, TensorNames
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
    dense_experts: bool = False,
    tokenizer: Any = None,
) -> None:
    """Save a model, dense or with 4-bit layers, for `from_pretrained` and transformers.

    The directory appears whole, or not at all.

    4-bit experts are written one by one, under the names of full-precision checkpoints.
    transformers 5 refuses these, since it keeps experts dense beside 4-bit layers; for it, pass
    `dense_experts`.

    Args:
      model: a Llama without adapters; `merge_lora` merges them, `interop.peft` writes them.
      path: the directory; created if missing. A checkpoint in it is not replaced.
      max_shard_bytes: the largest size of a file of more than one weight.
      quant_storage: dtype that holds 4-bit codes: "uint8", "bfloat16", "float16" or "float32".
      dense_experts: whether to write 4-bit experts in the dtype of the weights that were quantized.
        The directory, and the host while it is written, then hold them in full.
      tokenizer: the tokenizer to write beside the model: the directory that the model was loaded
        from, a tokenizer of transformers, or a `tokenizers.Tokenizer`; None: none is written.

    Raises:
      TypeError: a variable of the model is no weight of a Llama; the message names it; or
        `tokenizer` is none of these.
      FileNotFoundError: `tokenizer` is a directory without one.
      FileExistsError: the directory holds a checkpoint, or another thread or process is writing it.
      ValueError: one `quantization_config` cannot describe the 4-bit layers; the `model_type` has
        no entries for the config; or 4-bit experts belong in one tensor (gpt-oss, Llama 4, Granite)
        and `dense_experts` is False.
    """
    config = model.config
    entries = config.to_hf()
    files = {} if tokenizer is None else tokenizer_files(tokenizer)
    tree: dict[str, Any] = {}
    names = TensorNames.of(model)
    norms: set[str] = set()
    for module_path, module in iter_modules(model):
        at = tuple(module_path.split(".")) if module_path else ()
        if isinstance(module, Linear4bit):
            source = names.source((*at, "kernel"))
            weight = from_variables(module.weight)
            write = _dense_experts if dense_experts and "experts" in at else _matrices
            tree |= zip(source.names, write(module_path, weight, source), strict=True)
        for leaf, variable in vars(module).items():
            if not isinstance(variable, nnx.Variable):
                continue
            if type(variable) is not nnx.Param:
                raise TypeError(
                    f"save_pretrained writes plain models; {module_path}.{leaf} is a "
                    f"{type(variable).__name__}: merge adapters first"
                )
            source = names.source((*at, leaf))
            value = np.asarray(variable[...])
            parts = value.reshape(-1, *value.shape[len(source.lead) :])
            for name, part in zip(source.names, parts, strict=True):
                tree[name] = np.swapaxes(part, -1, -2) if source.transposed else part
                if value.dtype == np.float32:
                    norms.add(name)
    stored = np.dtype(tree[names.source(("embed_tokens", "embedding")).names[0]].dtype)
    for name in norms:
        tree[name] = _scale(tree[name], stored)
    entries["dtype"] = stored.name
    compute = model.embed_tokens.dtype
    if compute is not None:
        entries["quantization_config"] = {"bnb_4bit_compute_dtype": np.dtype(compute).name}
    save_directory(tree, path, entries, quant_storage, max_shard_bytes=max_shard_bytes, files=files)


def _scale(scale: np.ndarray, stored: np.dtype[Any]) -> np.ndarray:
    """Return a norm scale in the dtype of the weights if the cast is exact.

    transformers computes in the dtype of a scale and expects one dtype in a checkpoint.
    """
    cast = scale.astype(stored)
    return cast if np.array_equal(cast.astype(np.float32), scale) else scale


def _matrices(path: str, weight: Params4bit, source: Source) -> list[Params4bit]:
    """Return the weights of the layers, or of all their experts."""
    lead = weight.packed.ndim - len(weight.quant_state.spec.packed_shape)
    if lead > len(source.lead):
        raise ValueError(
            f"{path} is 4-bit, but {source.names[0]} is one tensor of all experts, which "
            "checkpoints have in full precision only: pass dense_experts=True"
        )
    return [jax.tree.map(lambda a, at=at: a[at], weight) for at in np.ndindex(*source.lead)]


def _dense_experts(path: str, weight: Params4bit, source: Source) -> list[np.ndarray]:
    """Return the dequantized tensors of experts: of each one, or of all in a layer."""
    found = []
    for at in np.ndindex(*source.lead):
        matrices = np.asarray(jax.tree.map(lambda a, at=at: a[at], weight).dequantize())
        found.append(matrices if source.transposed else np.swapaxes(matrices, -1, -2))
    return found
