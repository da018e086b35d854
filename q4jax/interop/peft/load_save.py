"""Load and save PEFT's LoRA adapters: `adapter_config.json`, `adapter_model.safetensors`."""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from q4jax.core.spec import FLOAT_DTYPES
from q4jax.interop.files import read_json, write_json
from q4jax.interop.peft.config import AdapterConfig
from q4jax.interop.safetensors.reader import TensorFile
from q4jax.interop.safetensors.writer import write_file
from q4jax.lora.adapter import Adapter, LoRALinear4bit
from q4jax.nnx.linear import Linear4bit
from q4jax.nnx.traverse import iter_modules, replace_modules

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
M = TypeVar("M", bound=nnx.Module)
Pairs = dict[str, tuple[np.ndarray, np.ndarray]]

_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_INDEX = re.compile(r"\.(\d{1,6})(?=\.)")


def read_adapters(path: str | os.PathLike[str]) -> tuple[AdapterConfig, Pairs]:
    """Read a directory of adapters without a model.

    Returns:
      The config, and for each module, under PEFT's name, `lora_A` `[rank, in]` and `lora_B`
      `[out, rank]` as NumPy arrays.

    Raises:
      FileNotFoundError: one of the two files is missing.
      ValueError: a file is malformed; an adapter has one matrix only, another rank than the config
        says, or no float dtype.
      NotImplementedError: the adapters are not LoRA, or a variant that is not implemented; the
        message names it.
    """
    folder = Path(path)
    config = AdapterConfig.from_json(read_json(folder / CONFIG))
    file = TensorFile(folder / TENSORS)
    halves: dict[str, dict[str, np.ndarray]] = {}
    for name in file:
        match = _NAME.fullmatch(name)
        if match is None:
            raise NotImplementedError(f"{name} is not a LoRA matrix of a linear layer")
        halves.setdefault(match[1], {})[match[2]] = file[name]
    pairs = {}
    for module, half in halves.items():
        if half.keys() != {"A", "B"}:
            raise ValueError(f"{module} has lora_{''.join(half)} only")
        a, b = half["A"], half["B"]
        rank = config.rank_of(module)
        if a.ndim != 2 or b.ndim != 2 or not a.shape[0] == b.shape[1] == rank:
            raise ValueError(
                f"{module}: lora_A {list(a.shape)}, lora_B {list(b.shape)} are not of rank {rank}"
            )
        if a.dtype not in FLOAT_DTYPES or a.dtype != b.dtype:
            raise ValueError(f"{module}: lora_A is {a.dtype}, lora_B is {b.dtype}")
        pairs[module] = a, b
    if not pairs:
        raise ValueError(f"{folder / TENSORS} holds no adapter")
    return config, pairs


def load_adapters(
    model: M,
    path: str | os.PathLike[str],
    *,
    prefix: str = "model.",
    train: bool = False,
    rngs: nnx.Rngs | None = None,
) -> M:
    """Return a copy of a 4-bit model with the adapters of a PEFT directory.

    Args:
      model: a module with `Linear4bit` layers, named as in the model that PEFT adapted. A stack of
        layers takes the adapters of `layers.0`, `layers.1`, …. It is not modified.
      path: the directory.
      prefix: start of the names in the files that the model's names lack.
      train: whether dropout is active, as after `model.train()`.
      rngs: streams for dropout; None: `nnx.Rngs(0)`.

    Returns:
      The new model. `merge_lora` merges its adapters, `save_adapters` writes them.

    Raises:
      ValueError: the model has no 4-bit layer for an adapter, or one of another shape; the layers
        of a stack do not all have adapters of the same rank, alpha and dtype.
      FileNotFoundError: `read_adapters` raises it.
      NotImplementedError: `read_adapters` raises it.

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
    config, pairs = read_adapters(path)
    groups = _by_path(model, pairs, prefix)
    streams = nnx.Rngs(0) if rngs is None else rngs

    def replace(path: str, module: nnx.Module) -> nnx.Module:
        if path not in groups or not isinstance(module, Linear4bit):
            return module
        names = groups[path]
        rank, alpha = config.rank_of(names[0]), config.alpha_of(names[0])
        a, b = _stack(module, path, [pairs[name] for name in names])
        if any((config.rank_of(n), config.alpha_of(n)) != (rank, alpha) for n in names):
            raise ValueError(f"{path}: the layers of a stack must have one rank and one alpha")
        adapted = LoRALinear4bit(
            module,
            rank,
            alpha,
            rslora=config.rslora,
            dropout=config.dropout,
            param_dtype=a.dtype,
            rngs=streams,
        )
        adapted.lora_a[...], adapted.lora_b[...] = jnp.asarray(a), jnp.asarray(b)
        if adapted.dropout is not None:
            adapted.dropout.deterministic = not train
        return adapted

    return replace_modules(model, replace)


def _by_path(model: nnx.Module, pairs: Pairs, prefix: str) -> dict[str, list[str]]:
    """Return the names of the adapters of each layer by path, ordered by layer number."""
    layers = {p: m for p, m in iter_modules(model) if isinstance(m, Linear4bit)}
    if any(isinstance(m, Adapter) for _, m in iter_modules(model)):
        raise ValueError("model has adapters already")
    found: dict[str, dict[int | None, str]] = {}
    for name in pairs:
        path, index = name.removeprefix(prefix), None
        number = _INDEX.search(path)
        if path not in layers and number is not None:
            index = int(number[1])
            path = path[: number.start()] + path[number.end() :]
        if path not in layers:
            raise ValueError(f"the model has no 4-bit linear layer for the adapter of {name}")
        if index in found.setdefault(path, {}):
            raise ValueError(f"{name} and {found[path][index]} are adapters of one layer")
        found[path][index] = name
    groups = {}
    for path, names in found.items():
        lead = layers[path].weight.quant_state.lead
        expected: list[int | None] = [*range(lead[0])] if lead else [None]
        if len(lead) > 1 or set(names) != set(expected):
            raise ValueError(
                f"{path} has the leading axes {lead}, the adapters are {sorted(names.values())}"
            )
        groups[path] = [names[index] for index in expected]
    return groups


def _stack(
    layer: Linear4bit, path: str, pairs: list[tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the factors `[*lead, in, rank]` and `[*lead, rank, out]` of one layer."""
    for a, b in pairs:
        if (a.shape[1], b.shape[0]) != (layer.in_features, layer.out_features):
            raise ValueError(
                f"{path}: lora_A {list(a.shape)} and lora_B {list(b.shape)} do not fit a layer of "
                f"{layer.in_features} in and {layer.out_features} out"
            )
        if (a.shape, a.dtype) != (pairs[0][0].shape, pairs[0][0].dtype):
            raise ValueError(
                f"{path}: the layers of a stack must have adapters of one shape and dtype"
            )
    if not layer.weight.quant_state.lead:
        ((a, b),) = pairs
        return a.T, b.T
    return np.stack([a.T for a, _ in pairs]), np.stack([b.T for _, b in pairs])


def save_adapters(
    model: nnx.Module,
    path: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    prefix: str = "model.",
    stack: str = "layers",
) -> None:
    """Save the adapters of a model, and nothing else, as PEFT reads them.

    Args:
      model: a module with adapters from `add_lora` or `load_adapters`.
      path: the directory; created if missing. Adapters in it are not replaced.
      base_model: value of `base_model_name_or_path`.
      prefix: text before the model's names in the files.
      stack: the name that a layer number follows, if layers are stacked.

    Raises:
      FileExistsError: the directory holds adapters.
      ValueError: the model has no adapters, or one config cannot describe them.
      NotImplementedError: an adapter belongs to another layer than `Linear4bit` and `nnx.Linear`.
    """
    adapters = {p: m for p, m in iter_modules(model) if isinstance(m, Adapter)}
    if not adapters:
        raise ValueError("the model has no adapter to save; add_lora makes them")
    for at, module in adapters.items():
        if not isinstance(module.base, Linear4bit | nnx.Linear):
            raise NotImplementedError(
                f"{at}: an adapter of a {type(module.base).__name__} is not written; PEFT's "
                "files hold adapters of linear layers only"
            )
    config = _common_config(adapters)
    tensors: dict[str, np.ndarray] = {}
    for at, module in adapters.items():
        a, b = np.asarray(module.lora_a[...]), np.asarray(module.lora_b[...])
        for name, one, other in _layers(f"{prefix}{at}", a, b, stack):
            tensors[f"base_model.model.{name}.lora_A.weight"] = one.T
            tensors[f"base_model.model.{name}.lora_B.weight"] = other.T
    folder = Path(path)
    for file in (CONFIG, TENSORS):
        if (folder / file).exists():
            raise FileExistsError(f"{folder / file} exists already; give a directory without it")
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / TENSORS, tensors, metadata={"format": "pt"})
    targets = sorted({at.rpartition(".")[2] for at in adapters})
    write_json(folder / CONFIG, config.to_json(targets, base_model))


def _common_config(adapters: Mapping[str, Adapter]) -> AdapterConfig:
    """Return the config that all adapters share; ValueError if they differ."""
    rates = {0.0 if m.dropout is None else m.dropout.rate for m in adapters.values()}
    scales = {m.rslora for m in adapters.values()}
    if len(rates) > 1 or len(scales) > 1:
        raise ValueError(f"adapters differ in dropout {sorted(rates)} or rslora {sorted(scales)}")
    first = next(iter(adapters.values()))
    names: Any = {m.rank: p for p, m in adapters.items()}, {m.alpha: p for p, m in adapters.items()}
    if len(names[0]) > 1 or len(names[1]) > 1:
        raise ValueError(f"adapters differ in rank {sorted(names[0])} or alpha {sorted(names[1])}")
    return dataclasses.replace(
        AdapterConfig(first.rank, first.alpha), rslora=first.rslora, dropout=rates.pop()
    )


def _layers(
    name: str, a: np.ndarray, b: np.ndarray, stack: str
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Return name and factors of one adapter, or of each layer of a stacked one."""
    if a.ndim == 2:
        return [(name, a, b)]
    head, mark, tail = f".{name}.".partition(f".{stack}.")
    if a.ndim != 3 or not mark:
        raise ValueError(f"{name} is stacked, but has no part {stack!r} to number: pass stack=")
    return [(f"{head}.{stack}.{i}.{tail}".strip("."), a[i], b[i]) for i in range(a.shape[0])]
