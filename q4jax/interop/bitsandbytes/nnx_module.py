"""Load a torch state dict into an NNX module, and name a module's weights as torch does."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from q4jax.interop.bitsandbytes.tensors import read_tensors, report_extra
from q4jax.interop.host_arrays import copy_to_numpy
from q4jax.nnx.converters import converter_for
from q4jax.nnx.quantized_variable import QuantizedVariable
from q4jax.nnx.traverse import check_module, holds, iter_modules, replace_modules
from q4jax.nnx.variables import from_variables, to_variables
from q4jax.ops.params import Params4bit, quantize_stacked

M = TypeVar("M", bound=nnx.Module)
_STORED = (nnx.Param, nnx.BatchStat, QuantizedVariable)


def load_state_dict(
    model: M,
    state_dict: Mapping[str, Any],
    *,
    names: Callable[[str], str] = lambda path: path,
    strict: bool = True,
) -> M:
    """Return a model with the weights of a torch state dict, 4-bit or in full precision.

    A 4-bit weight goes into a 4-bit layer of the same description only. A full-precision one
    that goes into a 4-bit layer is cast to the layer's `param_dtype` and quantized.

    Args:
      model: an nnx module of `Linear4bit`, `Embedding4bit`, `nnx.Linear`, `nnx.Embed`,
        `nnx.LayerNorm` and `nnx.RMSNorm`; it is not changed.
      state_dict: name to array, as for `from_state_dict`.
      names: torch's name of a module by its dotted path in `model`.
      strict: False: keys that the model has no place for are reported in a UserWarning. Keys that
        are missing are an error in any case.

    Returns:
      The new model.

    Raises:
      ValueError: keys are missing, or unknown; a weight differs from the model's in its
        description, dtype or shape. All are named, and nothing is loaded.
      TypeError: a variable of the model has no name in torch.

    Examples:
      >>> import jax.numpy as jnp, numpy as np, q4jax
      >>> from flax import nnx
      >>> from q4jax.interop import bitsandbytes as bnb
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(q4jax.LinearNF4(64, 32, rngs=rngs), nnx.relu)
      >>> full = {"0.weight": np.ones((32, 64), np.float16), "0.bias": np.ones(32, np.float32)}
      >>> strip = lambda path: path.removeprefix("layers.")
      >>> bnb.load_state_dict(model, full, names=strip)(jnp.ones((1, 64)))[0, 0]
      Array(65., dtype=float32)
    """
    arrays = copy_to_numpy(state_dict)
    tensors = read_tensors(arrays, arrays, strict, None)
    names_of: dict[tuple[str, str], str] = {}
    for path, module in iter_modules(model):
        for attribute, name in _parameters(path, module).items():
            names_of[path, attribute] = f"{names(path)}.{name}".removeprefix(".")
    missing = sorted(set(names_of.values()) - tensors.keys())
    if missing:
        raise ValueError(f"state_dict has no {missing}")
    report_extra(sorted(tensors.keys() - set(names_of.values())), strict, "keys the model lacks")

    def fill(path: str, module: nnx.Module) -> nnx.Module:
        for attribute in _parameters(path, module):
            name = names_of[path, attribute]
            new = _fitting(name, tensors[name], getattr(module, attribute), attribute)
            setattr(module, attribute, new)
        return module

    return replace_modules(model, fill)


def named_parameters(
    model: nnx.Module, *, names: Callable[[str], str] = lambda path: path
) -> dict[str, Any]:
    """Return the weights of a model under torch's names and in torch's orientation.

    `to_state_dict`, `save_file` and `huggingface.save_directory` take them; `load_state_dict`, with
    the same `names`, puts them back.

    Args:
      model: an nnx module of the layers of `load_state_dict`. Merge adapters first (`merge_lora`).
      names: torch's name of a module by its dotted path in `model`.

    Returns:
      `Params4bit` or array by name: kernels are `[out, in]`.

    Raises:
      TypeError: a variable of the model has no name in torch, or `model` is not an nnx module.
      ValueError: two weights have one name.

    Examples:
      >>> import q4jax
      >>> from flax import nnx
      >>> from q4jax.interop import bitsandbytes as bnb
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Dict(up=nnx.Linear(64, 32, rngs=rngs), norm=nnx.RMSNorm(32, rngs=rngs))
      >>> weights = bnb.named_parameters(q4jax.quantize_model(model))
      >>> sorted(weights)
      ['norm.weight', 'up.bias', 'up.weight']
      >>> weights["up.weight"]
      Params4bit(uint8[32, 32], nf4_b64_n256_float32_32x64)
    """
    check_module(model)
    found: dict[str, Any] = {}
    for path, module in iter_modules(model):
        for attribute, name in _parameters(path, module).items():
            full, value = f"{names(path)}.{name}".removeprefix("."), getattr(module, attribute)
            if full in found:
                raise ValueError(f"two weights of the model are named {full!r}")
            if isinstance(value, Params4bit):
                found[full] = from_variables(value)
            else:
                array = value[...]
                found[full] = jnp.swapaxes(array, -1, -2) if attribute == "kernel" else array
    return found


def _parameters(path: str, module: nnx.Module) -> dict[str, str]:
    """Return torch's name of each parameter that a module itself has."""
    converter = converter_for(module)
    known = {} if converter is None else converter.names_in_torch(module)
    for attribute, value in vars(module).items():
        if holds(_STORED, value) and attribute not in known:
            raise TypeError(
                f"{path}.{attribute}".removeprefix(".")
                + f" of a {type(module).__name__} has no name in a state dict"
            )
    return {a: name for a, name in known.items() if getattr(module, a, None) is not None}


def _fitting(name: str, tensor: Any, old: Any, attribute: str) -> Any:
    """Return the new value of the weight `old`; ValueError unless it is alike."""
    if isinstance(old, Params4bit):
        return to_variables(_quantized(name, tensor, from_variables(old)))
    if isinstance(tensor, Params4bit):
        raise ValueError(f"{name} is {tensor!r}, but the layer of the model is not 4-bit")
    kernel = attribute == "kernel" and tensor.ndim > 1
    value = np.swapaxes(tensor, -1, -2) if kernel else tensor
    if value.shape != old.shape or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(
            f"{name} is {tensor.dtype}{list(tensor.shape)}, the model has {attribute} "
            f"{old.dtype}{list(old.shape)}"
        )
    return old.replace(jnp.asarray(value, old.dtype))


def _quantized(name: str, tensor: Any, old: Params4bit) -> Params4bit:
    spec, lead = old.quant_state.spec, old.quant_state.lead
    if isinstance(tensor, Params4bit):
        found = tensor.quant_state
        if (found.spec, found.lead) != (spec, lead):
            raise ValueError(f"{name} is {tensor!r}, the model's is {old!r}")
        return tensor
    if tensor.shape != old.quant_state.shape or not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise ValueError(
            f"{name} is {tensor.dtype}{list(tensor.shape)}, the model's is {spec.tag()}"
        )
    return quantize_stacked(
        jnp.asarray(tensor, spec.dtype),
        name,
        quant_type=spec.quant_type,
        blocksize=spec.blocksize,
        compress_statistics=spec.nested,
    )
