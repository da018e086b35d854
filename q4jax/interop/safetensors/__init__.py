"""Safetensors files: a strict reader, and a writer of whole files.

They depend on no package for the format. Tensors are read one at a time, into aligned memory that
`jax.device_put` uses without another copy.
"""

from q4jax.interop.safetensors.reader import TensorFile
from q4jax.interop.safetensors.writer import write_file

__all__ = ["TensorFile", "write_file"]
