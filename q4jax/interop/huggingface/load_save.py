"""Hugging Face directories, in and out: quantized by bitsandbytes, or in full precision."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from q4jax.convert.config import QuantConfig
from q4jax.convert.rules import QuantRule
from q4jax.core.spec import FLOAT_DTYPES
from q4jax.core.state import QuantState
from q4jax.interop.bitsandbytes.state_dict import to_state_dict
from q4jax.interop.bitsandbytes.tensors import Tree, flatten
from q4jax.interop.huggingface.checkpoint import Checkpoint
from q4jax.interop.huggingface.directory import write_directory
from q4jax.interop.placement import Placement, place
from q4jax.interop.progress import Progress
from q4jax.ops.params import Params4bit

__all__ = ["Checkpoint", "bnb_config", "is_linear", "load_directory", "save_directory"]

# Tables of rows to look up, which have the form of a linear layer's weight.
_EMBEDDING = re.compile(r"embed|\bw[tp]e\b")


def load_directory(
    path: str | os.PathLike[str],
    quantization: QuantConfig | None = None,
    *,
    select: Callable[[str, tuple[int, ...]], bool] | None = None,
    strict: bool = True,
    sharding: Placement | None = None,
    progress: bool | None = None,
) -> Tree:
    """The weights of a Hugging Face directory by name; see `q4jax.models` for whole models.

    Files are read tensor by tensor, and what is quantized on the way is dropped before the next is
    read: the host holds the result and little more than the largest tensor.

    Args:
      path: the directory.
      quantization: for a directory in full precision, how to quantize its linear layers; None:
        not at all.
      select: with `quantization`, whether a tensor of this name and shape becomes 4-bit; None:
        `is_linear`. What `quantization.skip` names stays as it is in any case.
      strict: as for `bitsandbytes.from_state_dict`.
      sharding: where arrays go, as for `bitsandbytes.from_state_dict`.
      progress: whether to draw a bar; None: where stderr is a terminal.

    Returns:
      name to `Params4bit` or array; 64-bit arrays stay numpy unless JAX holds 64 bits.

    Raises:
      FileNotFoundError: a file is not there.
      ValueError: a file is malformed, a weight incomplete or not finite; the directory is quantized
        already and `quantization` is given; nothing is to be quantized.
      NotImplementedError: LLM.int8, GPTQ, AWQ, or another method; it is named.

    Example:
      >>> import tempfile, jax.numpy as jnp, q4jax
      >>> from q4jax.interop import huggingface
      >>> path, tree = tempfile.mkdtemp(), {"up.weight": jnp.ones((32, 64)), "norm": jnp.ones(64)}
      >>> huggingface.save_directory(tree, path, {"model_type": "own"})
      >>> huggingface.load_directory(path, q4jax.QuantConfig())["up.weight"]
      Params4bit(uint8[32, 32], nf4_b64_n256_float32_32x64)
    """
    checkpoint = Checkpoint(path, strict=strict)
    if quantization is not None and checkpoint.quantization is not None:
        raise ValueError(f"{path} is quantized already; quantization must be None")
    select = select or is_linear
    found: Tree = {}
    with Progress("load", checkpoint.nbytes, progress) as bar:
        for name in checkpoint:
            value: Any = checkpoint.read(name, sharding)
            if not isinstance(value, Params4bit):
                skip = quantization is None or quantization.skips(name.rpartition(".")[0])
                if quantization is not None and not skip and select(name, value.shape):
                    value = _quantize(name, value, quantization, sharding)
                else:
                    value = place(name, value, sharding)
            found[name] = value
            bar.add(checkpoint.bytes_of(name))
    if quantization is not None and not any(isinstance(w, Params4bit) for w in found.values()):
        raise ValueError(f"{path} holds no weight to quantize among {sorted(found)[:5]}")
    return found


def is_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor looks like the weight of a linear layer: a matrix, and no embedding.

    >>> is_linear("model.layers.0.mlp.up_proj.weight", (8, 4))
    True
    >>> is_linear("model.embed_tokens.weight", (8, 4)), is_linear("model.norm.weight", (4,))
    (False, False)
    """
    return name.endswith(".weight") and len(shape) == 2 and not _EMBEDDING.search(name)


def save_directory(
    tree: Mapping[str, Any],
    path: str | os.PathLike[str],
    config: Mapping[str, Any],
    quant_storage: str = "uint8",
    *,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a directory that transformers, with bitsandbytes where weights are 4-bit, loads.

    Args:
      tree: name to `Params4bit` or array, under Hugging Face's names and in its orientation.
      path: the directory, made if it is not there; a checkpoint that is there is not replaced.
      config: the content of `config.json`; its `quantization_config` is written anew, where it has
        a `bnb_4bit_compute_dtype` that is kept.
      quant_storage: what holds the codes: "uint8", "bfloat16", "float16" or "float32".
      max_shard_bytes: size of a file.

    Raises:
      FileExistsError: a checkpoint is there already.
      ValueError: weights that one `quantization_config` cannot describe; as
        `bitsandbytes.to_state_dict`.

    Example:
      >>> import tempfile, jax.numpy as jnp, q4jax
      >>> from q4jax.interop import huggingface
      >>> path = tempfile.mkdtemp()
      >>> tree = {"up.weight": q4jax.Params4bit.quantize(jnp.ones((32, 64)))}
      >>> huggingface.save_directory(tree, path, {"model_type": "own"})
      >>> huggingface.load_directory(path)
      {'up.weight': Params4bit(uint8[32, 32], fp4_b64_n0_float32_32x64)}
    """
    flat = flatten(tree)
    previous = config.get("quantization_config") or {}
    config = {k: v for k, v in config.items() if k != "quantization_config"}
    entry = bnb_config(flat, quant_storage, previous.get("bnb_4bit_compute_dtype"))
    if entry is not None:
        config["quantization_config"] = entry
    tensors = to_state_dict(flat, quant_storage)
    quantized = [name for name, leaf in flat.items() if isinstance(leaf, Params4bit)]
    groups = {key: name for name in quantized for key in tensors if key.startswith(f"{name}.")}
    write_directory(Path(path), config, tensors, groups, max_shard_bytes)


def bnb_config(
    flat: Mapping[str, Any], quant_storage: str, compute_dtype: str | None
) -> dict[str, Any] | None:
    """The `quantization_config` of weights by name; None where none is 4-bit.

    Raises:
      ValueError: they differ in type or in double quantization.
    """
    quantized = {n: w.quant_state.spec for n, w in flat.items() if isinstance(w, Params4bit)}
    kinds = {(spec.quant_type, spec.nested) for spec in quantized.values()}
    if not kinds:
        return None
    if len(kinds) > 1:
        shown = {kind: next(n for n in quantized if _kind(quantized[n]) == kind) for kind in kinds}
        raise ValueError(f"one quantization_config cannot describe all of {shown}")
    ((quant_type, nested),) = kinds
    kept = [n for n, w in flat.items() if n not in quantized and is_linear(n, w.shape)]
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": nested,
        "bnb_4bit_compute_dtype": compute_dtype or next(iter(quantized.values())).dtype.name,
        "bnb_4bit_quant_storage": quant_storage,
        "llm_int8_skip_modules": [name.removesuffix(".weight") for name in kept] or None,
        "llm_int8_threshold": 6.0,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
    }


def _kind(spec: Any) -> tuple[str, bool]:
    return spec.quant_type, spec.nested


def quantize_tensor(name: str, tensor: np.ndarray, config: QuantConfig | QuantRule) -> Params4bit:
    """A weight `[out, in]` in 4 bits; ValueError, with its name, where it cannot be quantized."""
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name} is {tensor.dtype}, which cannot be quantized")
    try:
        return Params4bit.quantize(
            jax.device_put(tensor), config.blocksize, config.compress_statistics, config.quant_type
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _quantize(
    name: str, tensor: np.ndarray, config: QuantConfig, sharding: Placement | None
) -> Params4bit:
    weight = quantize_tensor(name, tensor, config)
    state = weight.quant_state
    names = ("absmax", "nested_absmax", "offset") if state.nested else ("absmax",)
    arrays = [place(f"{name}.{part}", getattr(state, part), sharding) for part in names]
    return Params4bit(
        place(f"{name}.packed", weight.packed, sharding),
        QuantState.tree_unflatten(state.spec, arrays),
    )
