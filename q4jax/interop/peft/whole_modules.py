"""Weights of the base model in PEFT's files: of modules trained as a whole, or copies."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from q4jax.interop.peft.names import Place, locate, stacks_of
from q4jax.interop.peft.patterns import is_saved
from q4jax.interop.peft.tensors import WRAPPED, AdapterFiles
from q4jax.nnx.converters import is_quantized, to_dense
from q4jax.nnx.traverse import iter_modules, replace_modules
from q4jax.nnx.variables import from_variables
from q4jax.ops.params import Params4bit

M = TypeVar("M", bound=nnx.Module)

# Where Flax's modules hold what torch names "weight".
_WEIGHTS = ("kernel", "embedding", "scale", "weight")
# The attribute of a module that the files hold as a whole: its names there, and their indices.
_MARK = "peft_names"


def load_whole(model: M, files: AdapterFiles, prefix: str) -> M:
    """Return a model with the modules that the files hold as a whole; others must be unchanged.

    Raises:
      ValueError: the model has no module for a weight, or one of another shape; a weight that is
        no module's in `modules_to_save` differs from the model's; a module of `modules_to_save`
        has no weight in the files.
    """
    modules = dict(iter_modules(model))
    places: dict[tuple[str, str], Place] = {}
    for name, part in files.weights:
        place = locate(name.removesuffix(WRAPPED), prefix, modules, stacks_of(model))
        if place is None:
            raise ValueError(f"the model has no module for {name}.{part}")
        places[name, part] = place
    whole: dict[str, list[tuple[str, str]]] = {}
    for key, place in places.items():
        name, part = key
        if not name.endswith(WRAPPED) and is_saved(name, files.config.saved):
            whole.setdefault(place.path, []).append(key)
        elif not _is_same(modules[place.path], part, place.at, files.weights[key]):
            raise ValueError(
                f"{name}.{part} is a copy of the base model's weight that differs from the "
                f"model's: the base was changed when the adapters were trained (modules_to_save="
                f"{list(files.config.saved)})"
            )
    for entry in files.config.saved:
        if not any(is_saved(name, (entry,)) for name, _ in files.weights):
            raise ValueError(f"modules_to_save={entry!r}: the files have no weight of it")

    def replace(path: str, module: nnx.Module) -> Any:
        if path not in whole:
            return module
        dense: Any = to_dense(module) if is_quantized(module) else module
        for key in whole[path]:
            _write(dense, key[1], places[key].at, files.weights[key], ".".join(key))
        setattr(
            dense,
            _MARK,
            tuple({name: places[name, part].at for name, part in whole[path]}.items()),
        )
        return dense

    return replace_modules(model, replace) if whole else model


def whole_weights(model: nnx.Module) -> dict[str, np.ndarray]:
    """Return the weights of the modules that `load_whole` replaced, by name in the files."""
    found: dict[str, np.ndarray] = {}
    for _, module in iter_modules(model):
        for name, index in getattr(module, _MARK, ()):
            for part in ("weight", "bias"):
                variable = _variable(module, part)
                if variable is not None:
                    found[f"{name}.{part}"] = _to_torch(variable[0], variable[1][...], index)
    return found


def _variable(module: Any, part: str) -> tuple[str, Any] | None:
    """Return the name and Variable of what torch names `part`; None where there is none."""
    names = _WEIGHTS if part == "weight" else ("bias",)
    found = ((name, getattr(module, name, None)) for name in names)
    return next(((n, v) for n, v in found if isinstance(v, nnx.Variable)), None)


def _to_torch(name: str, array: Any, index: tuple[int, ...]) -> np.ndarray:
    array = np.asarray(array[index])
    return array.T if name == "kernel" else array


def _write(module: Any, part: str, index: tuple[int, ...], array: np.ndarray, name: str) -> None:
    """Write a weight of the files into a dense module."""
    found = _variable(module, part)
    if found is None:
        raise ValueError(f"{name}: a {type(module).__name__} has no {part}")
    own, variable = found
    array = array.T if own == "kernel" else array
    if variable[...][index].shape != array.shape:
        raise ValueError(
            f"{name} is {list(array.shape)}, the model's is {list(variable[...][index].shape)}"
        )
    new = variable[...].at[index].set(jnp.asarray(array).astype(variable.dtype))
    setattr(module, own, variable.replace(new))


def _is_same(module: Any, part: str, index: tuple[int, ...], array: np.ndarray) -> bool:
    """Return whether a weight of the files is the module's."""
    weight = getattr(module, "weight", None)
    if part == "weight" and isinstance(weight, Params4bit):
        return _is_quantized_from(from_variables(weight), index, array)
    found = _variable(module, part)
    if found is None:
        return False
    own = _to_torch(found[0], found[1][...], index)
    return own.shape == array.shape and np.array_equal(own.astype(array.dtype), array)


def _is_quantized_from(weight: Params4bit, index: tuple[int, ...], array: np.ndarray) -> bool:
    """Return whether 4-bit codes are those of an array, which may be codes itself."""
    weight = jax.tree.map(lambda leaf: leaf[index], weight)
    if array.dtype == np.uint8:
        return np.array_equal(np.ravel(weight.packed), array.ravel())
    spec = weight.quant_state.spec
    if array.ndim != 2 or tuple(array.shape) != tuple(spec.shape):
        return False
    again = Params4bit.quantize(
        jnp.asarray(array).astype(spec.dtype),
        quant_type=spec.quant_type,
        blocksize=spec.blocksize,
        compress_statistics=spec.nested,
    )
    # Codes alone do not tell a weight from its multiples.
    return np.array_equal(weight.dequantize(), again.dequantize())
