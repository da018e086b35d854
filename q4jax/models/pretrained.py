"""Llama models from and to local Hugging Face directories, in full precision."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from q4jax.config import QuantConfig
from q4jax.convert import quantize_model
from q4jax.models.config import LlamaConfig
from q4jax.models.files import TensorFiles, write_tensors
from q4jax.models.llama import Llama
from q4jax.models.names import LEAVES, VariablePath, is_stacked, is_transposed, tensor_names

# Buffers that old checkpoints carry and that follow from the config.
_DERIVED = re.compile(r"rotary_emb\.inv_freq$")
_FLOATS = ("float32", "float16", "bfloat16")


def from_pretrained(
    path: str | os.PathLike[str],
    quantization: QuantConfig | None = None,
    dtype: DTypeLike | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Llama:
    """Loads a Llama from a directory with `config.json` and safetensors in f32, f16 or bf16.

    Args:
      path: the directory; `model.safetensors`, or `model.safetensors.index.json` and its
        shards.
      quantization: how to quantize the projections to 4 bits; None: not at all.
      dtype: compute dtype; None: the `dtype` of `config.json`, else that of the weights.
        Weights keep the dtype they are stored in, norm scales become float32.
      mesh: not implemented yet.

    Raises:
      NotImplementedError: `mesh`, a checkpoint quantized already, or a model that is not a plain
        Llama.
      FileNotFoundError, ValueError: files or tensors are missing, unexpected, of the wrong shape or
        dtype, or (when quantizing) not finite. The message names them.
    """
    if mesh is not None:
        raise NotImplementedError("mesh: from_pretrained loads onto one device; pass mesh=None")
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is no Hugging Face model: it has no config.json")
    hf_config = json.loads((folder / "config.json").read_text())
    if hf_config.get("quantization_config"):
        method = hf_config["quantization_config"].get("quant_method")
        raise NotImplementedError(
            f"{folder} is quantized already (quant_method={method!r}); from_pretrained reads "
            "full-precision checkpoints and quantizes them: quantization=q4jax.QuantConfig(...)"
        )
    config = LlamaConfig.from_hf(hf_config)
    stored = hf_config.get("dtype") or hf_config.get("torch_dtype")
    return from_tensors(config, TensorFiles(folder), quantization, dtype or stored)


def from_tensors(
    config: LlamaConfig,
    tensors: Mapping[str, np.ndarray],
    quantization: QuantConfig | None = None,
    dtype: DTypeLike | None = None,
) -> Llama:
    """Builds a Llama from arrays under Hugging Face's names, projections as `[out, in]`.

    `tensors` may read lazily: each is looked up once, and dropped before the next. Other
    arguments and errors are those of `from_pretrained`.
    """
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0), **_dtypes(tensors, dtype)))
    graphdef, state = nnx.split(model)
    flat = dict(nnx.to_flat_state(state))
    _check_names(config, flat, tensors)

    loaded = {}
    for path, variable in flat.items():
        value = _assemble(path, variable.shape, tensors, config, quantization is not None)
        loaded[path] = variable.replace(jnp.array(value))
    model = nnx.merge(graphdef, nnx.from_flat_state(loaded))
    return model if quantization is None else quantize_model(model, quantization)


def save_pretrained(
    model: Llama, path: str | os.PathLike[str], max_shard_bytes: int = 5_000_000_000
) -> None:
    """Writes a dense Llama as `from_pretrained` and transformers read it.

    Raises:
      TypeError: the model holds variables that are not dense weights; the message names one.
    """
    tensors: dict[str, np.ndarray] = {}
    for variable_path, variable in nnx.to_flat_state(nnx.state(model)):
        if type(variable) is not nnx.Param or variable_path[-1] not in LEAVES:
            raise TypeError(
                f"save_pretrained writes dense models; {'.'.join(map(str, variable_path))} is a "
                f"{type(variable).__name__}: merge adapters and dequantize first"
            )
        names = tensor_names(variable_path, model.config.num_hidden_layers)
        value = np.asarray(variable[...])
        parts = value if is_stacked(variable_path) else value[None]
        for name, part in zip(names, parts, strict=True):
            tensors[name] = part.T if is_transposed(variable_path) else part

    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(tensors, folder, max_shard_bytes)
    stored = tensors["model.embed_tokens.weight"].dtype
    config = model.config.to_hf() | {"dtype": str(stored)}
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _dtypes(tensors: Mapping[str, np.ndarray], dtype: DTypeLike | None) -> dict[str, Any]:
    """The dtypes to build the model with: the embedding's stands for that of all weights."""
    embedding = tensors.get("model.embed_tokens.weight", np.empty(0, np.float32))
    return {"param_dtype": embedding.dtype, "dtype": jnp.dtype(dtype or embedding.dtype)}


def _check_names(
    config: LlamaConfig, variables: Mapping[VariablePath, Any], tensors: Mapping[str, np.ndarray]
) -> None:
    """Raises unless the model's tensors and the checkpoint's have the same names."""
    expected = {n for path in variables for n in tensor_names(path, config.num_hidden_layers)}
    found = {name for name in tensors if not _DERIVED.search(name)}
    missing, unexpected = sorted(expected - found), sorted(found - expected)
    tied = "lm_head.weight"
    if (
        config.tie_word_embeddings
        and tied in unexpected
        and np.array_equal(tensors[tied], tensors["model.embed_tokens.weight"])
    ):
        unexpected.remove(tied)
    if missing or unexpected:
        raise ValueError(f"tensors missing: {missing}; tensors unexpected: {unexpected}")


def _assemble(
    path: VariablePath,
    shape: tuple[int, ...],
    tensors: Mapping[str, np.ndarray],
    config: LlamaConfig,
    check_finite: bool,
) -> np.ndarray:
    """The value of one variable: its tensor, or its layers' stacked; transposed if need be."""
    value, stored = np.empty(0), None
    for index, name in enumerate(tensor_names(path, config.num_hidden_layers)):
        tensor = tensors[name]
        if tensor.dtype.name not in _FLOATS:
            raise ValueError(f"{name} is {tensor.dtype}; allowed are {', '.join(_FLOATS)}")
        if check_finite and not np.isfinite(tensor).all():
            raise ValueError(f"{name} has NaN or inf, which cannot be quantized")
        part = tensor.T if is_transposed(path) else tensor
        wanted = shape[1:] if is_stacked(path) else shape
        if part.shape != wanted:
            right = wanted[::-1] if is_transposed(path) else wanted
            raise ValueError(f"{name} is {tensor.shape}; the config asks for {right}")
        if index == 0:
            stored = tensor.dtype
            value = np.empty(shape, np.float32 if path[-1] == "scale" else stored)
        if tensor.dtype != stored:
            raise ValueError(
                f"{name} is {tensor.dtype}, but the same weight of layer 0 is {stored}"
            )
        (value[index] if is_stacked(path) else value)[...] = part
    return value
