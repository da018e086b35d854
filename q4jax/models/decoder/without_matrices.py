"""Modules that have no matrix of their own to be quantized."""

from flax import nnx

from q4jax.nnx.converters import LayerConverter, register_converter


class WithoutMatrices(nnx.Module):
    """A module whose own variables are vectors or numbers, though with axes of layers in front.

    `quantize_model` visits the modules in it, and leaves its variables without a warning.
    """


register_converter(LayerConverter(WithoutMatrices))
