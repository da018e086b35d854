"""What stands in the place of an `nnx.Variable` and is computed when it is read."""

from typing import Any

import jax
from jax import Array


class Read:
    """Reads like the `nnx.Variable` in whose place it is.

    `w[...]`, `w.value`, `w.get_value()`, `jnp.einsum(..., w)` and `x @ w` give the array; what an
    array has (`w.T`, `w.astype`), it has.
    """

    def decode(self) -> Array:
        """The array."""
        raise NotImplementedError

    @property
    def value(self) -> Array:
        """The array."""
        return self.decode()

    def get_value(self) -> Array:
        """The array."""
        return self.decode()

    def __getitem__(self, index: Any) -> Array:
        array = self.decode()
        return array if index is ... else array[index]

    def __jax_array__(self) -> Array:
        return self.decode()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(jax.Array, name):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.decode(), name)
