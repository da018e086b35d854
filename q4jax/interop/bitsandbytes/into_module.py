"""A torch state dict into an NNX module: names, orientation, and what is quantized on the way."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax.numpy as jnp
from flax import nnx

from q4jax.interop.bitsandbytes.tensors import read_tensors, report_extra
from q4jax.interop.host_arrays import copy_to_numpy
from q4jax.nnx.linear import Embedding4bit, Linear4bit
from q4jax.nnx.traverse import replace_modules, walk_modules
from q4jax.nnx.variables import freeze, thaw
from q4jax.ops.params import Params4bit, quantize_stacked

M = TypeVar("M", bound=nnx.Module)

# Modules with weights of their own: torch's name of each attribute.
_NAMES: dict[type, dict[str, str]] = {
    Linear4bit: {"weight": "weight", "bias": "bias"},
    Embedding4bit: {"weight": "weight"},
    nnx.Linear: {"kernel": "weight", "bias": "bias"},
    nnx.Embed: {"embedding": "weight"},
    nnx.LayerNorm: {"scale": "weight", "bias": "bias"},
    nnx.RMSNorm: {"scale": "weight"},
}


def load_state_dict(
    model: M,
    state_dict: Mapping[str, Any],
    *,
    names: Callable[[str], str] = lambda path: path,
    strict: bool = True,
) -> M:
    """A model with the weights of a torch state dict, 4-bit or in full precision.

    A 4-bit weight goes into a 4-bit layer of the same description only. A full-precision one
    that goes into a 4-bit layer is cast to the layer's `param_dtype` and quantized.

    Args:
      model: an nnx module of `Linear4bit`, `Embedding4bit`, `nnx.Linear`, `nnx.Embed`,
        `nnx.LayerNorm` and `nnx.RMSNorm`; it is left as it was.
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

    Example:
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
    places = {}
    for path, module in walk_modules(model):
        for attribute, name in _parameters(path, module).items():
            places[path, attribute] = f"{names(path)}.{name}".removeprefix(".")
    missing = sorted(set(places.values()) - tensors.keys())
    if missing:
        raise ValueError(f"state_dict has no {missing}")
    report_extra(sorted(tensors.keys() - set(places.values())), strict, "keys the model lacks")

    def fill(path: str, module: nnx.Module) -> nnx.Module:
        for attribute in _parameters(path, module):
            name = places[path, attribute]
            new = _fitting(name, tensors[name], getattr(module, attribute), attribute)
            setattr(module, attribute, new)
        return module

    return replace_modules(model, fill)


def _parameters(path: str, module: nnx.Module) -> dict[str, str]:
    """Torch's name of each weight that a module itself holds."""
    kind = next((kind for kind in type(module).__mro__ if kind in _NAMES), None)
    known = _NAMES[kind] if kind is not None else {}
    for attribute, value in vars(module).items():
        if isinstance(value, nnx.Param) and attribute not in known:
            raise TypeError(
                f"{path}.{attribute} of a {type(module).__name__} has no name in a state dict"
            )
    return {a: name for a, name in known.items() if getattr(module, a, None) is not None}


def _fitting(name: str, tensor: Any, old: Any, attribute: str) -> Any:
    """What takes the place of the weight `old`; ValueError unless it is alike."""
    if isinstance(old, Params4bit):
        return freeze(_quantized(name, tensor, thaw(old)))
    if isinstance(tensor, Params4bit):
        raise ValueError(f"{name} is {tensor!r}, but the layer of the model is not 4-bit")
    value = tensor.T if attribute == "kernel" else tensor
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
