"""Convert state dicts and files from and to bitsandbytes' format, byte for byte."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from q4jax.interop.bitsandbytes.tensors import (
    CONTAINERS,
    Tree,
    read_spec,
    read_tensors,
    write_weight,
)
from q4jax.interop.bitsandbytes.weight_keys import group_keys
from q4jax.interop.host_arrays import copy_to_numpy
from q4jax.interop.placement import Placement
from q4jax.interop.safetensors.reader import TensorFile
from q4jax.interop.safetensors.writer import write_file
from q4jax.interop.tree import flatten
from q4jax.ops.params import Params4bit


def from_state_dict(
    state_dict: Mapping[str, Any], *, strict: bool = True, sharding: Placement | None = None
) -> Tree:
    """Return the tensors of a state dict, each 4-bit weight as one `Params4bit`.

    `weight`, `weight.absmax`, `weight.quant_map`, … become one `Params4bit` under `weight`. Dense
    tensors stay arrays under their names. Codes may be in any `quant_storage`.

    Args:
      state_dict: NumPy, JAX or CPU torch arrays by name. They are copied.
      strict: whether unknown keys below a 4-bit weight are an error; False: they are skipped with a
        UserWarning. All other errors are raised in any case.
      sharding: a sharding for all arrays, a mapping from names to shardings, or a function from
        name and `jax.ShapeDtypeStruct` to a sharding; None: the default device.

    Returns:
      `Params4bit` or array by name. 64-bit arrays stay NumPy arrays unless `jax_enable_x64` is set.

    Raises:
      ValueError: a weight is incomplete, a statistic is malformed, a table (`quant_map`) is not the
        standard one, or a key is unknown. The message names the key.
      NotImplementedError: there are tensors of LLM.int8, GPTQ or AWQ.
      TypeError: a value is not an array.

    Examples:
      >>> import jax.numpy as jnp, q4jax
      >>> from q4jax.interop import bitsandbytes as bnb
      >>> weight = q4jax.Params4bit.quantize(jnp.ones((2, 64)), quant_type="nf4")
      >>> state_dict = weight.state_dict("layer.weight") | {"layer.bias": jnp.zeros(2)}
      >>> bnb.from_state_dict(state_dict)
      {'layer.weight': Params4bit(uint8[2, 32], nf4_b64_n0_float32_2x64),
       'layer.bias': Array([0., 0.], dtype=float32)}
    """
    tensors = copy_to_numpy(state_dict)
    return read_tensors(tensors, tensors, strict, sharding)


def load_file(
    path: str | os.PathLike[str], *, strict: bool = True, sharding: Placement | None = None
) -> Tree:
    """Load a safetensors file as `from_state_dict` does, reading one tensor at a time.

    Args:
      path: the file.
      strict: whether unknown keys below a 4-bit weight are an error; False: they are skipped with a
        UserWarning.
      sharding: where arrays are placed, as in `from_state_dict`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not a safetensors file, or `from_state_dict` refuses its tensors.
      NotImplementedError: there are tensors of LLM.int8, GPTQ or AWQ.

    Examples:
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
    """Return the state dict that bitsandbytes writes for weights; inverts `from_state_dict`.

    Args:
      tree: `Params4bit` or array by name. Dicts and lists may be nested; names are joined by dots.
      quant_storage: dtype that holds the codes: "uint8", "bfloat16", "float16" or "float32".

    Returns:
      NumPy array by name.

    Raises:
      ValueError: `quant_storage` is unknown, or the codes of a weight do not fill it; a stacked
        weight has double quantization (bitsandbytes has one offset a weight: index or `unstack`
        it); a weight has more than eight axes or no elements; two tensors have one name, or a name
        that would be read as a statistic.
      TypeError: a leaf is not an array, or the tree is a module.

    Examples:
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
            try:
                new = {name: np.asarray(leaf)}
            except TypeError as error:  # a typed key
                raise TypeError(f"{name}: {error}") from None
        else:
            raise TypeError(f"{name} must be a Params4bit or an array, got {type(leaf).__name__}")
        twice = sorted(new.keys() & tensors.keys())
        if twice:
            raise ValueError(f"two tensors of the tree are named {twice}")
        tensors |= new
    # Nothing is written that could not be read back.
    keys = group_keys(tensors)
    if keys.extra or len(keys.weights) != weights:
        raise ValueError(f"keys below 4-bit weights cannot be read back: {keys.extra}")
    for weight in keys.weights.values():
        read_spec(weight, tensors)
    return tensors


def save_file(
    tree: Mapping[str, Any],
    path: str | os.PathLike[str],
    quant_storage: str = "uint8",
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Save the state dict of `to_state_dict` as a safetensors file, whole or not at all.

    Args:
      tree: `Params4bit` or array by name, as in `to_state_dict`.
      path: the file; an existing one is replaced, and its permissions are kept. A link is replaced,
        and not the file that it points to.
      quant_storage: dtype that holds the codes, as in `to_state_dict`.
      metadata: texts by name for the file's header.

    Raises:
      ValueError: `to_state_dict` raises it, or `load_file` would refuse the file: metadata that is
        not text, a tensor named `__metadata__`, a name of more than 4,096 characters, more than 32
        axes; nothing is written.
      TypeError: `to_state_dict` raises it; nothing is written.
      FileExistsError: another thread or process is writing the file, or it is no regular file.
      OSError: from the file system; an existing file is unchanged.
    """
    write_file(path, to_state_dict(tree, quant_storage), metadata=metadata)
