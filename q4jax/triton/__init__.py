"""The products in official Triton, through jax-triton: the implementation "triton".

The decode of `q4jax.pallas.decode` and the tiles of `q4jax.pallas.tiles`, in another language. Only
`operations` and `backend` may be imported where Triton is missing.
"""
