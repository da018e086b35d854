"""4-bit weights in NNX modules of other people's classes."""

from typing import Any

import jax
from flax import nnx
from jax import Array

from q4jax.folds import Fold
from q4jax.frozen import freeze, thaw
from q4jax.hosted import Hosted4bit


@nnx.register_data_type
@jax.tree_util.register_pytree_with_keys_class
class ForeignWeight(Hosted4bit):
    """A 4-bit weight that reads like the `nnx.Variable` in whose place it is.

    `w[...]`, `w.value`, `w.get_value()`, `jnp.einsum(..., w)` and `x @ w` give the decoded array;
    what an array has (`w.T`, `w.shape`), it has.
    """

    def decode(self) -> Array:
        """The owner's array."""
        return self.fold.unfold(thaw(self.weight).dequantize(dtype=self.dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the owner's array, without decoding it."""
        lead = thaw(self.weight).quant_state.lead
        return (*lead[: len(lead) - len(self.fold.lead)], *self.fold.shape)

    @property
    def value(self) -> Array:
        """The owner's array."""
        return self.decode()

    def get_value(self) -> Array:
        """The owner's array."""
        return self.decode()

    def __getitem__(self, index: Any) -> Array:
        array = self.decode()
        return array if index is ... else array[index]

    def __jax_array__(self) -> Array:
        return self.decode()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.decode(), name)


def host(module: Any, name: str, where: str, fold: Fold, **settings: Any) -> None:
    """Puts a 4-bit weight in the place of a Variable of a module."""
    variable = getattr(module, name)
    kind = type(variable), tuple(filter(_hashable, variable.get_metadata().items()))
    hosted = Hosted4bit.quantize(variable[...], fold, where, kind=kind, **settings)
    weight = ForeignWeight(freeze(hosted.weight), fold, hosted.dtype, kind)
    setattr(module, name, weight)


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
