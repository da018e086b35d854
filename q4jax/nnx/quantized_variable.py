"""4-bit weights in NNX modules of other people's classes."""

from typing import Any

import jax
from flax import nnx
from jax import Array

from q4jax.convert.kernel_axes import Fold
from q4jax.convert.registry import Hosted4bit
from q4jax.nnx.readable import Read
from q4jax.nnx.variables import freeze, thaw


@nnx.register_data_type
@jax.tree_util.register_pytree_with_keys_class
class ForeignWeight(Hosted4bit, Read):
    """A 4-bit weight in the place of an `nnx.Variable`: reading it decodes it."""

    def decode(self) -> Array:
        """The owner's array."""
        return self.fold.unfold(thaw(self.weight).dequantize(dtype=self.dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the owner's array, without decoding it."""
        lead = thaw(self.weight).quant_state.lead
        return (*lead[: len(lead) - len(self.fold.lead)], *self.fold.shape)


def host(module: Any, name: str, where: str, fold: Fold, **settings: Any) -> None:
    """Puts a 4-bit weight in the place of a Variable of a module."""
    setattr(module, name, foreign_weight(getattr(module, name), where, fold, **settings))


def foreign_weight(
    variable: nnx.Variable[Array], where: str, fold: Fold, **settings: Any
) -> ForeignWeight:
    """A 4-bit weight to put in the place of a Variable, by its fold."""
    kind = type(variable), tuple(filter(_hashable, variable.get_metadata().items()))
    hosted = Hosted4bit.quantize(variable[...], fold, where, kind=kind, **settings)
    return ForeignWeight(freeze(hosted.weight), fold, hosted.dtype, kind)


def _hashable(entry: tuple[str, Any]) -> bool:
    """Whether metadata can be part of a treedef."""
    try:
        hash(entry)
    except TypeError:
        return False
    return True


def restore(weight: ForeignWeight) -> nnx.Variable[Array]:
    """The Variable that was there, with the decoded weight."""
    kind, metadata = weight.kind
    array = weight.fold.unfold(thaw(weight.weight).dequantize())
    variable: nnx.Variable[Array] = kind(array, **dict(metadata))
    return variable
