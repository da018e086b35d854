"""Names of a Llama's variables in Hugging Face checkpoints."""

from typing import Any

import numpy as np

from q4jax.models.llama.architectures import ARCHITECTURES
from q4jax.models.llama.config import LlamaConfig

VariablePath = tuple[Any, ...]  # of attribute names

LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}


def tensor_names(path: VariablePath, config: LlamaConfig) -> list[str]:
    """Return the tensors of the variable at `path`, in the order of its leading axes.

    >>> config = LlamaConfig(64, 32, 48, 2, 4, 4, 8)
    >>> tensor_names(("embed_tokens", "embedding"), config)
    ['model.embed_tokens.weight']
    >>> tensor_names(("layers", "mlp", "up_proj", "kernel"), config)
    ['model.layers.0.mlp.up_proj.weight', 'model.layers.1.mlp.up_proj.weight']
    """
    *modules, leaf = map(str, path)
    if modules[0] != "layers":
        prefix = [] if modules[0] == "lm_head" else ["model"]
        return [".".join([*prefix, *modules, LEAVES[leaf]])]
    in_experts = "experts" in modules
    renamed = ARCHITECTURES[config.model_type].expert_names if config.experts is not None else {}
    inner = ".".join(renamed.get(m, m) if in_experts or m == "mlp" else m for m in modules[1:])
    template = f"model.layers.{{}}.{inner}.{LEAVES[leaf]}"
    if in_experts:
        template = template.replace(".experts.", ".experts.{}.")
    lead = lead_shape(path, config)
    return [template.format(*index) for index in np.ndindex(*lead)]


def lead_shape(path: VariablePath, config: LlamaConfig) -> tuple[int, ...]:
    """Return the leading axes of the variable: layers, then experts."""
    if str(path[0]) != "layers":
        return ()
    if config.experts is None or "experts" not in map(str, path):
        return (config.num_hidden_layers,)
    return config.num_hidden_layers, config.experts.num_experts


def is_transposed(path: VariablePath) -> bool:
    """Return whether the checkpoint stores the variable as `[out, in]`, not `[in, out]`."""
    return str(path[-1]) == "kernel"
