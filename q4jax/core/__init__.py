"""The format of a 4-bit weight: codebooks, `QuantSpec`, `QuantState` and the reference arithmetic.

Plain jax.numpy. It knows no Flax, no meshes and no kernels.
"""
