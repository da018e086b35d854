"""bitsandbytes' state dicts and files, in and out, byte for byte."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from q4jax.interop.bitsandbytes.into_module import load_state_dict
from q4jax.interop.bitsandbytes.tensors import Tree, flatten, own_copy, read_tensors
from q4jax.interop.bitsandbytes.weight_keys import CONTAINERS, sort_names, write_weight
from q4jax.interop.placement import Placement
from q4jax.interop.safetensors.reader import TensorFile
from q4jax.interop.safetensors.writer import Layout, write_file
from q4jax.ops.params import Params4bit

__all__ = ["from_state_dict", "load_file", "load_state_dict", "save_file", "to_state_dict"]


def from_state_dict(
    state_dict: Mapping[str, Any], *, strict: bool = True, sharding: Placement | None = None
) -> Tree:
    """The tensors of a state dict, with each 4-bit weight rebuilt.

    `weight`, `weight.absmax`, `weight.quant_map`, … become one `Params4bit` under `weight`; what
    is not quantized stays an array under its name. Codes may be in any `quant_storage`.

    Args:
      state_dict: name to array: numpy, JAX, or torch on the CPU. It is copied.
      strict: False: keys below a 4-bit weight that mean nothing are left out and reported in a
        UserWarning. Nothing else is forgiven.
      sharding: where arrays go: a function of name and `jax.ShapeDtypeStruct`, a mapping from
        names, or one sharding. None: the default device.

    Returns:
      name to `Params4bit` or array. 64-bit arrays stay numpy unless JAX holds 64 bits.

    Raises:
      ValueError: a weight is incomplete; a statistic is not what bitsandbytes writes; a table
        (`quant_map`) is not the standard one; keys that mean nothing. The message names them.
      NotImplementedError: tensors of LLM.int8, GPTQ or AWQ.
      TypeError: a value is not an array.

    Example:
      >>> import jax.numpy as jnp, q4jax
      >>> from q4jax.interop import bitsandbytes as bnb
      >>> weight = q4jax.Params4bit.quantize(jnp.ones((2, 64)), quant_type="nf4")
      >>> state_dict = weight.state_dict("layer.weight") | {"layer.bias": jnp.zeros(2)}
      >>> bnb.from_state_dict(state_dict)
      {'layer.weight': Params4bit(uint8[2, 32], nf4_b64_n0_float32_2x64),
       'layer.bias': Array([0., 0.], dtype=float32)}
    """
    tensors = {name: own_copy(name, value) for name, value in state_dict.items()}
    return read_tensors(
        tensors, {name: Layout.of(t) for name, t in tensors.items()}, strict, sharding
    )


def load_file(
    path: str | os.PathLike[str], *, strict: bool = True, sharding: Placement | None = None
) -> Tree:
    """`from_state_dict` of a safetensors file, which is read tensor by tensor.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not a safetensors file, or as `from_state_dict`.
      NotImplementedError: as `from_state_dict`.

    Example:
      >>> import tempfile, jax.numpy as jnp, q4jax
      >>> from q4jax.interop import bitsandbytes as bnb
      >>> path = tempfile.mkdtemp() + "/weights.safetensors"
      >>> bnb.save_file({"w": q4jax.Params4bit.quantize(jnp.ones((2, 64)))}, path)
      >>> bnb.load_file(path)
      {'w': Params4bit(uint8[2, 32], fp4_b64_n0_float32_2x64)}
    """
    file = TensorFile(path)
    return read_tensors(file, file.entries, strict, sharding)


def to_state_dict(tree: Mapping[str, Any], quant_storage: str = "uint8") -> dict[str, np.ndarray]:
    """The state dict that bitsandbytes writes for these weights: the inverse of `from_state_dict`.

    Args:
      tree: name to `Params4bit` or array; dicts and lists may be nested, names are joined by dots.
      quant_storage: what holds the codes: "uint8", "bfloat16", "float16" or "float32".

    Returns:
      name to numpy array.

    Raises:
      ValueError: another quant_storage, or one that the bytes of a weight do not fill; a stacked
        weight with double quantization (bitsandbytes has one offset a weight: index or `unstack`
        it); two tensors of one name, or a name that would be read as something else.
      TypeError: a leaf is not an array; the tree is a module.

    Example:
      >>> import jax.numpy as jnp, q4jax
      >>> from q4jax.interop import bitsandbytes as bnb
      >>> tree = {"layer": {"weight": q4jax.Params4bit.quantize(jnp.ones((2, 64)))}}
      >>> {k: (v.dtype.name, v.shape) for k, v in bnb.to_state_dict(tree, "float16").items()}
      {'layer.weight': ('float16', (32, 1)), 'layer.weight.absmax': ('float32', (2,)),
       'layer.weight.quant_map': ('float32', (16,)),
       'layer.weight.quant_state.bitsandbytes__fp4': ('uint8', (76,))}
    """
    if quant_storage not in CONTAINERS:
        raise ValueError(f"quant_storage must be one of {list(CONTAINERS)}, got {quant_storage!r}")
    tensors: dict[str, np.ndarray] = {}
    weights = 0
    for name, leaf in flatten(tree).items():
        if isinstance(leaf, Params4bit):
            weights += 1
            new = write_weight(name, leaf, quant_storage)
        elif hasattr(leaf, "dtype") and hasattr(leaf, "shape"):
            new = {name: np.asarray(leaf)}
        else:
            raise TypeError(f"{name} must be a Params4bit or an array, got {type(leaf).__name__}")
        twice = sorted(new.keys() & tensors.keys())
        if twice:
            raise ValueError(f"two tensors of the tree are named {twice}")
        tensors |= new
    # What cannot be read back must not be written.
    found = sort_names({name: Layout.of(tensor) for name, tensor in tensors.items()})
    if found.extra or len(found.weights) != weights:
        raise ValueError(f"names below those of 4-bit weights, which nothing reads: {found.extra}")
    return tensors


def save_file(
    tree: Mapping[str, Any],
    path: str | os.PathLike[str],
    quant_storage: str = "uint8",
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """`to_state_dict` into a safetensors file, which appears when all of it is written.

    Args:
      tree: as for `to_state_dict`.
      path: the file; one that is there is replaced.
      quant_storage: as for `to_state_dict`.
      metadata: texts for the file's header.

    Raises:
      ValueError, TypeError: as `to_state_dict`, before anything is written.
      OSError: the system's; what was at `path` is still there.
    """
    write_file(path, to_state_dict(tree, quant_storage), metadata=metadata)
