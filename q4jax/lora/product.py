"""The product with an adapter's two factors."""

import jax
from jax import Array


def low_rank_product(rows: Array, a: Array, b: Array) -> Array:
    """Return `rows @ a @ b`.

    XLA's CPU compiler transposes a whole gradient to sum it over several axes of rows, so that they
    are merged. Explicit mesh axes that split one of them do not merge, nor do those of a stack.

    Args:
      rows: `[..., in]`; for a stack of factors `[*lead, rows, in]`.
      a: `[*lead, in, rank]`.
      b: `[*lead, rank, out]`.

    Examples:
      >>> import jax.numpy as jnp
      >>> low_rank_product(jnp.ones((2, 3, 8)), jnp.ones((8, 1)), jnp.ones((1, 4))).shape
      (2, 3, 4)
    """
    if a.ndim > 2 or any(jax.typeof(rows).sharding.spec[1:-1]):
        return (rows @ a) @ b
    flat = rows.reshape(-1, rows.shape[-1])
    return ((flat @ a) @ b).reshape(*rows.shape[:-1], b.shape[-1])
