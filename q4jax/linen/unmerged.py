"""`Unmerged`: what stands in "params" for a 4-bit weight until `merge_quantized` is called."""

from typing import Any, NoReturn, Self

import jax
from flax import serialization


@jax.tree_util.register_pytree_node_class
class Unmerged:
    """The place in "params" of a weight that is in "quant"; it holds no array.

    A model that reads it was called without `merge_quantized`, and the error says so. Gradients
    and optimizers pass it by, since it has no leaves.

    Args:
      path: the weight's path, with slashes.
    """

    def __init__(self, path: str):
        self.path = path

    def tree_flatten(self) -> tuple[tuple[()], str]:
        """Return no leaves, and the path, for jax."""
        return (), self.path

    @classmethod
    def tree_unflatten(cls, path: str, leaves: Any) -> Self:
        """Invert `tree_flatten`, for jax."""
        return cls(path)

    @property
    def hint(self) -> str:
        """What to do."""
        return (
            f"the parameter {self.path!r} is 4-bit, in the collection 'quant': call "
            f"model.apply(q4jax.linen.merge_quantized(variables), ...)"
        )

    def __jax_array__(self) -> NoReturn:
        raise ValueError(self.hint)

    def __getitem__(self, index: Any) -> NoReturn:
        raise ValueError(self.hint)

    def __getattr__(self, name: str) -> NoReturn:
        # Attributes of arrays are asked for with `hasattr` too.
        raise AttributeError(f"{name}: {self.hint}" if hasattr(jax.Array, name) else name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unmerged) and self.path == other.path

    def __hash__(self) -> int:
        return hash(self.path)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r})"


serialization.register_serialization_state(Unmerged, lambda _: {}, lambda target, _: target)
