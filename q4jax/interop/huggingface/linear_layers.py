"""Which weights of a Hugging Face directory bitsandbytes quantizes through transformers."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from q4jax.convert.config import HEAD, QuantConfig
from q4jax.interop.huggingface.architectures import (
    ARCHITECTURES,
    CLASSIFIERS,
    KEPT,
    Architecture,
)
from q4jax.ops.params import Params4bit

Role = Literal["linear", "transposed", "head", "kept"]
Select = Callable[[str, tuple[int, ...]], bool]
_MANUAL = "name the layers instead: `select=`, or --modules REGEX in a shell"
# Embedding tables are matrices too, but no linear layers.
_EMBEDDING = re.compile(r"embed|\bw[tp]e\b")


def is_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether a tensor looks like the weight of a linear layer.

    Examples:
      >>> is_linear("model.layers.0.mlp.up_proj.weight", (8, 4))
      True
      >>> is_linear("model.embed_tokens.weight", (8, 4)), is_linear("model.norm.weight", (4,))
      (False, False)
    """
    return name.endswith(".weight") and len(shape) == 2 and not _EMBEDDING.search(name)


def find_architectures(config: Mapping[str, Any]) -> list[Architecture]:
    """Return the table's entries for a `config.json`: the model's, then those of its parts.

    Raises:
      NotImplementedError: the table does not have the model type.
    """
    model_type = config.get("model_type")
    found = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    if found is None:
        raise NotImplementedError(
            f"which layers of model_type {model_type!r} are linear is not known; {_MANUAL}"
        )
    parts = [part.get("model_type") for part in config.values() if isinstance(part, dict)]
    return [found, *(ARCHITECTURES[part] for part in parts if part in ARCHITECTURES)]


def choose_layers(
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    quantization: QuantConfig | None,
    select: Select | None = None,
) -> dict[str, Role]:
    """Return the weights to quantize, each "linear" or "transposed" (`[in, out]` in the file).

    Args:
      config: the content of `config.json`.
      shapes: shape of each tensor by name.
      quantization: its `skip` names modules to leave alone; "lm_head" in it stands for the output
        head, and the last layer of a classifier, whatever their names. None: nothing is quantized.
      select: whether to quantize a tensor of this name and shape; None: the table says it.

    Raises:
      NotImplementedError: `select` is None, and the table does not have the model type, or a matrix
        of the directory.

    Examples:
      >>> import q4jax
      >>> shapes = {"h.0.mlp.c_fc.weight": (64, 256), "wte.weight": (128, 64)}
      >>> choose_layers({"model_type": "gpt2"}, shapes, q4jax.QuantConfig())
      {'h.0.mlp.c_fc.weight': 'transposed'}
    """
    if quantization is None:
        return {}
    if select is None:
        return _by_table(config, shapes, quantization)
    chosen = [name for name, shape in shapes.items() if select(name, shape)]
    chosen = [name for name in chosen if not quantization.skips(_module(name))]
    # A layer that is named by hand is turned too, where the table knows it.
    known = config.get("model_type") in ARCHITECTURES
    roles = _roles(find_architectures(config)) if known else {}
    turned = [name for name in chosen if _role(_module(name), roles, False) == "transposed"]
    found: dict[str, Role] = dict.fromkeys(chosen, "linear")
    return found | dict.fromkeys(turned, "transposed")


def _by_table(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], quantization: QuantConfig
) -> dict[str, Role]:
    architectures = find_architectures(config)
    roles = _roles(architectures)
    heads_too = HEAD not in quantization.skip
    others = QuantConfig(skip=tuple(name for name in quantization.skip if name != HEAD))
    last = _last_layer(config, architectures[0].last, shapes)
    found: dict[str, Role] = {}
    for name in filter(lambda name: _is_matrix(name, shapes[name]), shapes):
        path = _module(name)
        role = _role(path, roles, f"{path}.bias" in shapes)
        if role is None:
            raise NotImplementedError(
                f"whether {name} of model_type {config['model_type']!r} is the weight of a linear "
                f"layer is not known; {_MANUAL}"
            )
        role = "head" if path == last else role
        if role == "kept" or (role == "head" and not heads_too):
            continue
        entry = others.skips(path)
        if entry is None:
            found[name] = "transposed" if role == "transposed" else "linear"
        elif any(architecture.renamed for architecture in architectures):
            raise NotImplementedError(
                f"skip {entry!r} is not supported for model_type {config['model_type']!r}: "
                f"transformers has another path for {path}, which a skip list would have to name"
            )
    return found


def _last_layer(config: Mapping[str, Any], end: str, shapes: Iterable[str]) -> str | None:
    """Return the last module whose path has this end, for a model without a head; else None."""
    bare = all(str(name).endswith("Model") for name in config.get("architectures") or [""])
    paths = [path for path in map(_module, shapes) if end and _starred(f".{path}").endswith(end)]
    numbers = {path: [int(number) for number in re.findall(r"\d+", path)] for path in paths}
    return max(numbers, key=numbers.__getitem__, default=None) if bare else None


def _starred(path: str) -> str:
    """Return a path with a star for each number."""
    return re.sub(r"(^|(?<=\.))\d+(?=\.|$)", "*", path)


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether a tensor could be the weight of a linear layer."""
    return name.endswith(".weight") and len(shape) == 2


def _roles(architectures: Iterable[Architecture]) -> dict[str, Role]:
    """Return the role of each name in the table; the model's own entry comes before its parts'."""
    roles: dict[str, Role] = {}
    for entry in reversed(list(architectures)):
        named: tuple[tuple[str, Role], ...] = (
            (entry.linear, "linear"),
            (entry.transposed, "transposed"),
            (entry.kept, "kept"),
            (entry.heads, "head"),
        )
        for names, role in named:
            roles |= dict.fromkeys(names.split(), role)
    common: dict[str, Role] = dict.fromkeys(KEPT.split(), "kept")
    return common | dict.fromkeys([HEAD, *CLASSIFIERS.split()], "head") | roles


def _role(path: str, roles: Mapping[str, Role], has_bias: bool) -> Role | None:
    """Return the role of a module: that of the longest name which ends its path."""
    parts = path.split(".")
    for start in range(len(parts)):
        end = ".".join(parts[start:])
        for name in (end, _starred(end)):
            if name in roles:
                biased = name in CLASSIFIERS.split() and has_bias
                return "linear" if biased else roles[name]
    return None


def skip_list(config: Mapping[str, Any], weights: Mapping[str, Any]) -> list[str]:
    """Return the linear layers that are not 4-bit, as `llm_int8_skip_modules` names them.

    The head is among them where the file does not have it, since transformers makes a linear layer
    of tied embeddings. Where the table does not have the model type, `is_linear` decides.

    Args:
      config: the content of `config.json`.
      weights: array or `Params4bit` by name.

    Returns:
      Module paths.
    """
    if config.get("model_type") not in ARCHITECTURES:
        dense_names = [n for n, w in weights.items() if not isinstance(w, Params4bit)]
        return [_module(n) for n in dense_names if is_linear(n, weights[n].shape)]
    architectures = find_architectures(config)
    roles, entry = _roles(architectures), architectures[0]
    quantized = {_module(name) for name, w in weights.items() if isinstance(w, Params4bit)}
    dense = {n: w.shape for n, w in weights.items() if _module(n) not in quantized}
    heads = [entry.head, *entry.heads.split()]
    if any(f".{path}".endswith(f".{head}") for head in heads for path in quantized):
        heads = []
    paths = [_module(name) for name, shape in dense.items() if _is_matrix(name, shape)]
    linear = [path for path in paths if _role(path, roles, f"{path}.bias" in dense) != "kept"]
    return list(dict.fromkeys([*heads, *linear]))
