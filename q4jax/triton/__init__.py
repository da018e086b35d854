"""The products in official Triton, through jax-triton: the implementation "triton".

They share decoding and tiles with the Pallas kernels. Only `implementation` and `requirements`
can be imported where Triton is missing.
"""
