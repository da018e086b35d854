"""Save the LoRA adapters of a model as PEFT reads them."""

import os
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from q4jax.convert.config import HEAD
from q4jax.disk import new_file, whole_directory
from q4jax.interop.files import encode_json
from q4jax.interop.peft.config import AdapterConfig
from q4jax.interop.peft.names import stacks_of
from q4jax.interop.peft.naming import Named, Names, name_adapters, names_of
from q4jax.interop.peft.patterns import shortest
from q4jax.interop.peft.tensors import CONFIG, ROOT, TENSORS
from q4jax.interop.peft.tied import EMBEDDING, is_tied
from q4jax.interop.peft.whole_modules import whole_weights
from q4jax.interop.safetensors.writer import layout_of, plan_file
from q4jax.lora.adapter import Adapter, LoRALinear4bit
from q4jax.lora.targets import target_of
from q4jax.nnx.traverse import iter_modules


def save_adapters(
    model: nnx.Module,
    path: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    revision: str | None = None,
    prefix: str = "model.",
    stack: str = "layers",
    names: Names = lambda path: path,
) -> None:
    """Save the adapters of a model, and nothing else, as PEFT reads them; whole or not at all.

    The matrices of a layer whose kernel has more than two axes are written as those of a linear
    layer, `[rank, in]` and `[out, rank]`, with its input and its output axes in one each. Experts
    are written as adapters of the parameters in which transformers stacks them
    (`target_parameters`); the first two layers of an expert share one there, so their ranks add up
    unless they have one `lora_a`.

    Args:
      model: a module with adapters from `add_lora` or `load_adapters`.
      path: the directory; created if missing. Adapters in it are not replaced.
      base_model: value of `base_model_name_or_path`.
      revision: that of the base on the hub, which PEFT loads then; None: the main branch.
      prefix: text before the model's names in the files. Heads, such as "lm_head", have none.
      stack: the name that a layer number follows, if layers are stacked.
      names: a function from the dotted path of a module to its name in the files, without the
        prefix, for a model that does not have transformers' names. It returns several names for a
        layer that is several modules there, one after the other along its output, such as keys
        and values; each gets the same `lora_A`.

    Raises:
      FileExistsError: the directory holds adapters, or another thread or process is writing it.
      ValueError: the model has no adapters, or one config cannot describe them: they differ in
        dropout, `rslora` or DoRA; the outputs of a layer are not even parts for its names.
      NotImplementedError: PEFT has no such adapter, as DoRA for experts.
    """
    modules = dict(iter_modules(model))
    adapters = {p: m for p, m in modules.items() if isinstance(m, Adapter)}
    if not adapters:
        raise ValueError("the model has no adapter to save; add_lora makes them")
    named = name_adapters(modules, adapters, prefix, stack, stacks_of(model), names)
    config = _common_config(model, adapters, named)
    tensors: dict[str, np.ndarray] = {}
    for entry in named:
        for suffix, array in entry.tensors().items():
            tensors[f"{ROOT}{entry.module}.{suffix}"] = array
    weights = whole_weights(model)
    tensors |= {f"{ROOT}{name}": array for name, array in weights.items()}
    if config.tied and any(e.of_embedding for e in named):
        first = next(e for e in named if e.of_embedding)
        tensors[f"{ROOT}{HEAD}.lora_A.weight"] = first.b
        tensors[f"{ROOT}{HEAD}.lora_B.weight"] = first.a
    text = encode_json(
        config.to_json(_targets(model, adapters, named, names), base_model, revision), CONFIG
    )
    layouts = {name: layout_of(tensor) for name, tensor in tensors.items()}
    plan = plan_file(layouts, {"format": "pt"})
    folder = Path(path)
    with whole_directory(folder, last=CONFIG) as new:
        for name in (CONFIG, TENSORS):
            if (folder / name).exists():
                raise FileExistsError(
                    f"{folder / name} exists already; give a directory without it"
                )
        with new_file(new / TENSORS) as file:
            plan.write(file, tensors)
        with new_file(new / CONFIG) as file:
            file.write(text)


def _common_config(
    model: nnx.Module, adapters: dict[str, Any], named: list[Named]
) -> AdapterConfig:
    """Return the config that all adapters share; ValueError if they differ."""
    # Adapters of embeddings and of single weights have no dropout, whatever the others have.
    linear = [m for m in adapters.values() if isinstance(m, LoRALinear4bit)]
    rates = {0.0 if m.dropout is None else m.dropout.rate for m in linear} or {0.0}
    kinds = (
        {m.rslora for m in adapters.values()},
        {m.magnitude is not None for m in adapters.values()},
    )
    if len(rates) > 1 or max(map(len, kinds)) > 1:
        raise ValueError(
            f"adapters differ in dropout {sorted(rates)}, rslora {sorted(kinds[0])} or dora "
            f"{sorted(kinds[1])}; one config cannot describe them"
        )
    dropout, parameters = rates.pop(), sorted({e.parameter for e in named if e.parameter})
    if dropout and parameters:
        warnings.warn(
            f"PEFT has no dropout for adapters of parameters ({parameters[0]}); dropout={dropout} "
            f"is written as 0",
            UserWarning,
            stacklevel=3,
        )
        dropout = 0.0
    rank = Counter(e.rank for e in named).most_common(1)[0][0]
    alpha = Counter(e.alpha for e in named).most_common(1)[0][0]
    saved = {name.rpartition(".")[0] for name in whole_weights(model)}
    tied = is_tied(model) and (
        any(e.of_embedding for e in named) or any(name.endswith(EMBEDDING) for name in saved)
    )
    return AdapterConfig(
        rank,
        alpha,
        rslora=kinds[0].pop(),
        dropout=dropout,
        ranks=shortest({e.key: e.rank for e in named}, rank),
        alphas=shortest({e.key: e.alpha for e in named}, alpha),
        parameters=tuple(parameters),
        saved=tuple(sorted(saved)),
        dora=kinds[1].pop(),
        tied=tied,
    )


def _targets(
    model: nnx.Module, adapters: dict[str, Any], named: list[Named], names: Names
) -> list[str]:
    """Return the adapted modules: by their last names where these mean no other module."""
    modules = [e.module for e in named if not e.parameter]
    others = {
        name.rpartition(".")[2]
        for path, module in iter_modules(model)
        for name in names_of(path, names)
        if target_of(module) is not None
        and not any(f"{path}.".startswith(f"{p}.") for p in adapters)
    }
    partial = {e.module.rpartition(".")[2] for e in named if e.is_partial}
    ends = {name.rpartition(".")[2] for name in modules} - others - partial
    return sorted({end if (end := name.rpartition(".")[2]) in ends else name for name in modules})
