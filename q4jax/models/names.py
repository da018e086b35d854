"""How the variables of a Llama are called in Hugging Face checkpoints."""

from typing import Any

VariablePath = tuple[Any, ...]  # of attribute names

LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}


def tensor_names(path: VariablePath, layers: int) -> list[str]:
    """The tensors that make up the variable at `path`: one, or one a layer where it is stacked.

    >>> tensor_names(("embed_tokens", "embedding"), layers=2)
    ['model.embed_tokens.weight']
    >>> tensor_names(("layers", "mlp", "up_proj", "kernel"), layers=2)
    ['model.layers.0.mlp.up_proj.weight', 'model.layers.1.mlp.up_proj.weight']
    """
    *modules, leaf = map(str, path)
    if modules[0] != "layers":
        prefix = [] if modules[0] == "lm_head" else ["model"]
        return [".".join([*prefix, *modules, LEAVES[leaf]])]
    inner = ".".join([*modules[1:], LEAVES[leaf]])
    return [f"model.layers.{layer}.{inner}" for layer in range(layers)]


def is_stacked(path: VariablePath) -> bool:
    """Whether the variable has a leading layer axis."""
    return str(path[0]) == "layers"


def is_transposed(path: VariablePath) -> bool:
    """Whether the checkpoint has the variable as `[out, in]` and the model as `[in, out]`."""
    return str(path[-1]) == "kernel"
