"""Load and save the weights of Hugging Face directories, 4-bit or in full precision."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from q4jax.convert.config import QuantConfig, list_paths, module_paths
from q4jax.convert.rules import QuantRule
from q4jax.core.spec import FLOAT_DTYPES
from q4jax.interop.bitsandbytes.state_dict import to_state_dict
from q4jax.interop.bitsandbytes.tensors import Tree
from q4jax.interop.bitsandbytes.weight_keys import group_keys
from q4jax.interop.huggingface.checkpoint import Checkpoint
from q4jax.interop.huggingface.directory import CONFIG, write_directory
from q4jax.interop.huggingface.linear_layers import choose_layers
from q4jax.interop.huggingface.quantization_config import bnb_config, read_quantization
from q4jax.interop.placement import Placement, place, place_weight
from q4jax.interop.progress import Progress
from q4jax.interop.tree import flatten
from q4jax.ops.params import Params4bit


def load_directory(
    path: str | os.PathLike[str],
    quantization: QuantConfig | None = None,
    *,
    select: Callable[[str, tuple[int, ...]], bool] | None = None,
    strict: bool = True,
    sharding: Placement | None = None,
    progress: bool | None = None,
) -> Tree:
    """Load the weights of a Hugging Face directory by name.

    Tensors are read and quantized one at a time: the host holds the result and little more than the
    largest tensor. `q4jax.models.from_pretrained` loads whole models.

    Args:
      path: the directory.
      quantization: how to quantize the linear layers of a directory in full precision; None: not
        at all. They are those that transformers would quantize: `ARCHITECTURES` knows them for each
        `model_type`. Kernels `[in, out]` (GPT-2) become `[out, in]`, as bitsandbytes has them.
      select: whether to quantize a tensor of this name and shape, for architectures that the table
        does not know. Layers in `quantization.skip` are never quantized.
      strict: whether unknown keys below 4-bit weights are an error; False: they are skipped with a
        UserWarning.
      sharding: a sharding for all arrays, a mapping from names to shardings, or a function from
        name and `jax.ShapeDtypeStruct` to a sharding; None: the default device.
      progress: whether to draw a progress bar; None: only if stderr is a terminal.

    Returns:
      `Params4bit` or array by name. 64-bit arrays stay NumPy arrays unless `jax_enable_x64` is set.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is malformed; a weight is incomplete or not finite; `quantization` is given
        for a directory that is quantized, or nothing is quantized; an entry of `quantization.skip`
        matches no module.
      NotImplementedError: the directory is in LLM.int8, GPTQ, AWQ or another quantization method;
        without `select`, which layers of the architecture are linear is not known. The message
        names it.

    Examples:
      >>> import tempfile, jax.numpy as jnp, q4jax
      >>> from q4jax.interop import huggingface
      >>> path, name = tempfile.mkdtemp(), "layers.0.mlp.up_proj.weight"
      >>> huggingface.save_directory({name: jnp.ones((32, 64))}, path, {"model_type": "llama"})
      >>> huggingface.load_directory(path, q4jax.QuantConfig())[name]
      Params4bit(uint8[32, 32], nf4_b64_n256_float32_32x64)
    """
    checkpoint = Checkpoint(path, strict=strict)
    if quantization is not None and checkpoint.quantization is not None:
        raise ValueError(f"{path} is quantized already; quantization must be None")
    if quantization is not None:
        quantization.require_skips(module_paths(name.split(".") for name in checkpoint))
    shapes = {name: entry.shape for name, entry in checkpoint.tensors.layouts.items()}
    layers = choose_layers(checkpoint.config, shapes, quantization, select)
    if quantization is not None and not layers:
        what = "weight to quantize" + ("" if select is None else " that is selected")
        raise ValueError(f"{path} holds no {what} among {list_paths(sorted(shapes))}")
    found: Tree = {}
    with Progress("load", checkpoint.nbytes, progress) as bar:
        for name in checkpoint:
            value: Any = checkpoint.read(name, sharding)
            if quantization is not None and name in layers:
                kernel = value.T if layers[name] == "transposed" else value
                value = place_weight(name, quantize_tensor(name, kernel, quantization), sharding)
            elif not isinstance(value, Params4bit):
                value = place(name, value, sharding)
            found[name] = value
            bar.add(checkpoint.bytes_of(name))
    return found


def save_directory(
    tree: Mapping[str, Any],
    path: str | os.PathLike[str],
    config: Mapping[str, Any],
    quant_storage: str = "uint8",
    *,
    max_shard_bytes: int = 5_000_000_000,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Save weights as a directory that transformers and bitsandbytes load, whole or not at all.

    Args:
      tree: `Params4bit` or array by Hugging Face's name, in Hugging Face's orientation.
      path: the directory; created if missing. A checkpoint in it is not replaced.
      config: the content of `config.json`. Its `quantization_config` is replaced; only a
        `bnb_4bit_compute_dtype` in it is kept.
      quant_storage: dtype that holds the codes: "uint8", "bfloat16", "float16" or "float32".
      max_shard_bytes: the largest size of a file of more than one weight.
      files: the content of other files of the directory by name, such as `tokenizer.json`.

    Raises:
      FileExistsError: the directory holds a checkpoint or one of the files, or another thread or
        process is writing it.
      TypeError: the config holds a value that JSON has not, or a leaf is not an array.
      ValueError: one `quantization_config` cannot describe the weights, or
        `bitsandbytes.to_state_dict` or `bitsandbytes.save_file` refuses them.

    Examples:
      >>> import tempfile, jax.numpy as jnp, q4jax
      >>> from q4jax.interop import huggingface
      >>> path = tempfile.mkdtemp()
      >>> tree = {"up.weight": q4jax.Params4bit.quantize(jnp.ones((32, 64)))}
      >>> huggingface.save_directory(tree, path, {"model_type": "own"})
      >>> huggingface.load_directory(path)
      {'up.weight': Params4bit(uint8[32, 32], fp4_b64_n0_float32_32x64)}
    """
    if not isinstance(config, Mapping):
        raise TypeError(f"config must be the content of {CONFIG}, got {type(config).__name__}")
    flat = flatten(tree)
    previous = config.get("quantization_config") or {}
    if not isinstance(previous, Mapping):
        raise ValueError(f"config: quantization_config must be an object, got {previous!r}")
    config = {k: v for k, v in config.items() if k != "quantization_config"}
    entry = bnb_config(flat, quant_storage, previous.get("bnb_4bit_compute_dtype"), config)
    if entry is not None:
        config["quantization_config"] = entry
    # Nothing is written that could not be read back.
    read_quantization(config, Path(CONFIG))
    tensors = to_state_dict(flat, quant_storage)
    weights = group_keys(tensors).weights.values()
    groups = {key: weight.name for weight in weights for key in weight.statistics.values()}
    write_directory(Path(path), config, tensors, groups, max_shard_bytes, files or {})


def quantize_tensor(name: str, tensor: np.ndarray, config: QuantConfig | QuantRule) -> Params4bit:
    """Quantize a weight `[out, in]`; ValueError, with its name, if that is impossible."""
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name} is {tensor.dtype}, which cannot be quantized")
    try:
        return Params4bit.quantize(
            jax.device_put(tensor), config.blocksize, config.compress_statistics, config.quant_type
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
