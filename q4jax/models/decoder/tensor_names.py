"""Names of a decoder's variables in Hugging Face checkpoints."""

import dataclasses
import functools
from typing import Any

import numpy as np

from q4jax.models.decoder.config import LlamaConfig
from q4jax.models.decoder.decoder import Llama
from q4jax.models.decoder.describe import family_of
from q4jax.models.decoder.families import Family
from q4jax.models.decoder.spec import Experts
from q4jax.models.decoder.stacks import Stack

VariablePath = tuple[Any, ...]  # of attribute names

_LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight"}


@dataclasses.dataclass(frozen=True)
class Source:
    """The tensors that a variable is made of.

    Attributes:
      names: the tensors, in the order of the variable's leading axes.
      lead: the leading axes that tensors are stacked along: layers, then experts.
      transposed: whether the last two axes of a tensor are those of the variable in reverse.
    """

    names: tuple[str, ...]
    lead: tuple[int, ...]
    transposed: bool

    @property
    def modules(self) -> tuple[str, ...]:
        """The tensors' modules."""
        return tuple(name.rpartition(".")[0] for name in self.names)


@dataclasses.dataclass(frozen=True)
class TensorNames:
    """The tensors of a model's variables.

    Args:
      config: that of the model.
      stacks: its stacks of layers.
    """

    config: LlamaConfig
    stacks: tuple[Stack, ...]

    @classmethod
    def of(cls, model: Llama) -> "TensorNames":
        """Return the names for a model."""
        return cls(model.config, model.stacks)

    @functools.cached_property
    def family(self) -> Family:
        """The model's entry in the table."""
        return family_of({"model_type": self.config.model_type})

    def source(self, path: VariablePath) -> Source:
        """Return the tensors of the variable at `path`.

        >>> from q4jax.models import LlamaConfig
        >>> from q4jax.models.decoder.stacks import group_layers
        >>> config = LlamaConfig(64, 32, 48, 2, 4, 4, 8)
        >>> [stacks] = group_layers(config.decoder.layers)
        >>> names = TensorNames(config, stacks)
        >>> names.source(("embed_tokens", "embedding")).names
        ('model.embed_tokens.weight',)
        >>> names.source(("layers", "mlp", "up_proj", "kernel")).names
        ('model.layers.0.mlp.up_proj.weight', 'model.layers.1.mlp.up_proj.weight')
        """
        *modules, leaf = map(str, path)
        suffix = _LEAVES.get(leaf, leaf)
        is_kernel = leaf == "kernel"
        if not modules:  # the bias of a head that is the embedding
            return Source((f"{self.family.head}.bias",), (), False)
        if modules[0] != "layers":
            return Source((f"{self._outside(modules)}.{suffix}",), (), is_kernel)
        stack, inner = self.split(modules)
        experts = stack.layer.mlp if "experts" in inner else None
        inner = [self.family.renamed.get(part, part) for part in inner]
        base = f"{self.family.layers}.{{}}"
        if not isinstance(experts, Experts):
            transposed = is_kernel and not self.family.conv1d
            template = ".".join([base, *inner, suffix])
            names = tuple(template.format(number) for number in stack.numbers)
            return Source(names, (len(names),), transposed)
        if experts.layout == "apart":
            template = ".".join([base, *inner, suffix]).replace(".experts.", ".experts.{}.")
            lead = (len(stack.numbers), experts.count)
            pairs = [(stack.numbers[i], expert) for i, expert in np.ndindex(*lead)]
            return Source(tuple(template.format(*pair) for pair in pairs), lead, is_kernel)
        parts = [part for part in inner if experts.inner or part != "experts"]
        ends = {"bias": "_bias"} if experts.layout == "in_out" else {leaf: f".{suffix}"}
        template = ".".join([base, *parts]) + ends.get(leaf, "")
        names = tuple(template.format(number) for number in stack.numbers)
        return Source(names, (len(names),), is_kernel and experts.layout == "out_in")

    def split(self, modules: list[str]) -> tuple[Stack, list[str]]:
        """Return the stack that a path of modules starts with, and the rest of the path."""
        if len(modules) > 1 and modules[1].startswith("from_"):
            name, inner = ".".join(modules[:2]), modules[2:]
        else:
            name, inner = modules[0], modules[1:]
        return next(stack for stack in self.stacks if stack.name == name), inner

    def _outside(self, modules: list[str]) -> str:
        """Return the name of a module outside of the layers."""
        family = self.family
        own = {
            "embed_tokens": family.embed,
            "norm": family.final,
            "lm_head": family.head,
            "embed_positions": family.positions,
            "embed_norm": family.embed_norm,
        }
        return own.get(modules[0], f"model.{modules[0]}")
