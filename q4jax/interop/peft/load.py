"""Load PEFT's LoRA adapters into a model."""

import os
from typing import Any, TypeVar

import numpy as np
from flax import nnx

from q4jax.interop.peft.config import AdapterConfig
from q4jax.interop.peft.names import Index
from q4jax.interop.peft.placing import Layers, Values
from q4jax.interop.peft.tensors import read_files
from q4jax.interop.peft.tied import untie
from q4jax.interop.peft.whole_modules import load_whole
from q4jax.nnx.traverse import replace_modules

M = TypeVar("M", bound=nnx.Module)


def load_adapters(
    model: M,
    path: str | os.PathLike[str],
    *,
    prefix: str = "model.",
    train: bool = False,
    rngs: nnx.Rngs | None = None,
) -> M:
    """Return a copy of a model with the adapters of a PEFT directory.

    Args:
      model: a module with layers that `add_lora` can adapt, 4-bit or dense, named as in the model
        that PEFT adapted. A stack of layers takes the adapters of `layers.0`, `layers.1`, …, all
        or some of them, each with its own rank and alpha. It is not modified.
      path: the directory.
      prefix: start of the names in the files that the model's names lack.
      train: whether dropout is active, as after `model.train()`.
      rngs: streams for dropout; None: `nnx.Rngs(0)`.

    Returns:
      The new model. `merge_lora` merges its adapters, `save_adapters` writes them. Modules that
      PEFT trained as a whole (`modules_to_save`) have the weights of the files, in full precision;
      `save_adapters` writes these too.

    Raises:
      ValueError: the model has no layer for an adapter, or one of another shape; the adapters of a
        stack differ in dtype; the files hold a weight of the base model that is not the model's.
      FileNotFoundError: `read_adapters` raises it.
      NotImplementedError: a variant of LoRA that is not read; the message names it. With `train`,
        also dropout for a layer of a registered class.

    Examples:
      >>> import tempfile, q4jax
      >>> from flax import nnx
      >>> from q4jax.interop import peft
      >>> model = nnx.Dict(q_proj=q4jax.LinearNF4(64, 32, rngs=nnx.Rngs(0)))
      >>> path = tempfile.mkdtemp()
      >>> peft.save_adapters(q4jax.add_lora(model, rank=4, alpha=8), path)
      >>> peft.load_adapters(model, path).q_proj.scale
      2.0
    """
    files = untie(model, read_files(path))
    layers = Layers(model, prefix)
    found = layers.place(files)
    settings: dict[str, Any] = {"rngs": nnx.Rngs(0) if rngs is None else rngs}
    base = load_whole(model, files, prefix)

    def replace(path: str, module: nnx.Module) -> nnx.Module:
        if path in found and not layers.targets[path].weights:
            return _adapt(layers, path, module, found[path], files.config, settings, train)
        for at in (p for p in found if p.rpartition(".")[0] == path and layers.targets[p].weights):
            _adapt(layers, at, module, found[at], files.config, settings, train)
        return module

    return replace_modules(base, replace)


def _adapt(
    layers: Layers,
    path: str,
    module: Any,
    found: dict[Index, Values],
    config: AdapterConfig,
    settings: dict[str, Any],
    train: bool,
) -> Any:
    """Return a module with the adapters that were found for each layer of its stack."""
    target, values = layers.targets[path], list(found.values())
    dtypes = {v.a.dtype for v in values}
    if len(dtypes) > 1:
        raise ValueError(
            f"{path}: the adapters of a stack differ in dtype: {sorted(map(str, dtypes))}"
        )
    rank = max(v.rank for v in values)
    settings = settings | {"rank": rank, "alpha": values[0].alpha, "rslora": config.rslora}
    # A weight that is adapted by itself has no dropout, which matters in training only.
    in_place = bool(target.weights)
    settings |= {
        "param_dtype": dtypes.pop(),
        "dropout": 0.0 if in_place and not train else config.dropout,
    }
    if config.dora:
        settings["dora"] = True
    adapted = target.adapt(module, path, settings)
    adapter: Any = getattr(adapted, next(iter(target.weights))) if in_place else adapted
    _fill(adapter, path, found)
    if adapter.dropout is not None:
        adapter.dropout.deterministic = not train
    return adapted


def _fill(adapter: Any, path: str, found: dict[Index, Values]) -> None:
    """Write the values of the files into an adapter, zeros where a layer has none."""
    lead, inputs, outputs = adapter.sizes()
    every = list(np.ndindex(*lead))
    if not found.keys() <= set(every):
        names = sorted({v.name for v in found.values()})
        raise ValueError(f"{path} has the leading axes {lead}, the adapters are {names}")
    a, b = (np.zeros(v.shape, v.dtype) for v in (adapter.lora_a, adapter.lora_b))
    magnitude = None if adapter.magnitude is None else np.array(adapter.magnitude[...])
    for index, v in found.items():
        if (v.a.shape[0], v.b.shape[1]) != (inputs, outputs):
            raise ValueError(
                f"{v.name}: lora_A {list(v.a.T.shape)} and lora_B {list(v.b.T.shape)} do not fit "
                f"a layer of {inputs} in and {outputs} out"
            )
        a[index][:, : v.rank], b[index][: v.rank] = v.a, v.b
        if magnitude is not None and v.magnitude is not None:
            magnitude[index] = v.magnitude.reshape(-1)
    adapter.lora_a[...], adapter.lora_b[...] = a, b
    if magnitude is not None:
        adapter.magnitude[...] = magnitude
    parts = [(found[i].rank, found[i].alpha) if i in found else (0, 0.0) for i in every]
    if len(set(parts)) > 1:
        adapter.set_parts(tuple(parts))
