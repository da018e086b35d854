"""The bound on a product that a 4-bit weight and one rounding allow."""

import jax.numpy as jnp
import numpy as np


def assert_product(found, a, b, extra=0.0, roundings=2):
    """Assert `a @ b.T + extra`, within float32 sums of K terms in any order and one rounding.

    Sums that are split over programs have some `roundings` more.
    """
    a, b, extra = (np.asarray(t).astype(np.float64) for t in (a, b, extra))
    exact, terms = a @ b.T + extra, np.abs(a) @ np.abs(b).T + np.abs(extra)
    info = jnp.finfo(found.dtype)
    bound = (a.shape[-1] + roundings) * 2.0**-24 * terms
    bound += float(info.eps) / 2 * (np.abs(exact) + bound) + float(info.smallest_subnormal)
    assert found.shape == exact.shape
    assert (np.abs(np.asarray(found).astype(np.float64) - exact) <= bound).all()
