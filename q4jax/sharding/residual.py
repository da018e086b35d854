"""Keep the feature axis of a residual stream whole on every device."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax
from jax import Array
from jax.sharding import AxisType

from q4jax.ops.weight_sharding import WholeFeatures
from q4jax.sharding.partition import axes_by_type, run

_whole_outputs: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "whole_outputs", default=False
)


@contextlib.contextmanager
def whole_outputs() -> Iterator[None]:
    """Products traced in it give each device all outputs of its rows, as `whole_features` has them.

    For layers that write to a residual stream. Without it the compiler splits their outputs as the
    weight's, wherever the batch was to be split over the same axis.
    """
    token = _whole_outputs.set(True)
    try:
        yield
    finally:
        _whole_outputs.reset(token)


def outputs_are_whole() -> bool:
    """Whether a `whole_outputs` surrounds this."""
    return _whole_outputs.get()


@jax.custom_vjp
def whole_features(x: Array) -> Array:
    """`x [..., features]`, no device with a part of the features only.

    For a residual stream, to which weights that are split every way are added: the compiler would
    take a split of features over from them, and give up that of the batch. The gradient is treated
    alike. With explicit or manual axes x says itself how it lies, and nothing is done.
    """
    if axes_by_type().keys() - {AxisType.Auto}:
        return x
    return run(WholeFeatures(), x)[0]


whole_features.defvjp(lambda x: (whole_features(x), None), lambda _, g: (whole_features(g),))
