"""Which layers of a model may share a stack: those whose weights are 4-bit in the same way."""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from q4jax.convert.rules import Rules
from q4jax.core.spec import QuantSpec
from q4jax.models.decoder.decoder import Llama
from q4jax.models.decoder.tensor_names import Source, TensorNames
from q4jax.nnx.traverse import iter_modules

# For each matrix stacked at a path, the names by which rules may call its module.
Names = dict[str, list[tuple[str, ...]]]


def linear_sources(model: Llama) -> dict[str, Source]:
    """Return the tensors of each linear layer's weight by dotted path."""
    names = TensorNames.of(model)
    return {
        path: names.source((*path.split("."), "kernel"))
        for path, module in iter_modules(model)
        if isinstance(module, nnx.Linear)
    }


def layer_names(model: Llama) -> Names:
    """Return what rules may call each matrix of each module with variables.

    That is: the name of transformers' module; the path of a model of equal layers,
    "layers.mlp.up_proj"; and that with the layer's number, "layers.3.mlp.up_proj".
    """
    names = TensorNames.of(model)
    found: Names = {}
    for path, _ in nnx.to_flat_state(nnx.state(model)):
        modules = [str(part) for part in path[:-1]]
        source = names.source(path)
        own: list[tuple[str, ...]] = [(name,) for name in source.modules]
        if modules[0] == "layers":
            stack, inner = names.split(modules)
            every = ".".join(["layers", *inner])
            each = len(own) // len(stack.numbers)
            numbers = [number for number in stack.numbers for _ in range(each)]
            own = [
                (name, ".".join(["layers", str(number), *inner]), every)
                for name, number in zip(source.modules, numbers, strict=True)
            ]
        found[".".join(modules)] = own
    return found


def layer_kinds(
    model: Llama, specs: Mapping[str, QuantSpec], rules: Rules | None
) -> list[tuple[Any, ...]]:
    """Return for each layer how its weights are, or will be, 4-bit.

    Args:
      model: the model without regard to its weights.
      specs: the 4-bit weights of its checkpoint.
      rules: how it will be quantized, or None.

    Raises:
      ValueError: experts of one layer differ.
    """
    names = TensorNames.of(model)
    kinds: list[list[Any]] = [[] for _ in model.config.decoder.layers]
    for path, source in linear_sources(model).items():
        if not path.startswith("layers."):
            continue
        stack, inner = names.split(path.split("."))
        each = len(source.names) // len(stack.numbers)
        own: list[Any]
        if rules is None:
            own = [specs.get(name) for name in source.names]
        else:
            own = [rule for rule, _ in rules.choose_each(path)]
        for place, number in enumerate(stack.numbers):
            part = slice(place * each, (place + 1) * each)
            found = dict(zip(own[part], source.names[part], strict=True))
            if len(found) > 1:
                raise ValueError(
                    f"{' and '.join(found.values())} are quantized differently, but the experts of "
                    "a layer are stacked"
                )
            [kind] = found
            kinds[number].append((".".join(inner), kind))
    return [tuple(sorted(kind, key=lambda pair: pair[0])) for kind in kinds]
