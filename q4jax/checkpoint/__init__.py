"""Checkpoints of models with 4-bit weights: Orbax, with a manifest that every restore verifies.

`save` and `restore` write and read a directory; `save_args`, `restore_args` and `restore_step`
serve users of `CheckpointManager`; `adapter_state` and `with_adapters` keep adapters apart.
"""

from q4jax.checkpoint.adapters import adapter_state, with_adapters
from q4jax.checkpoint.orbax import ARRAYS as ARRAYS
from q4jax.checkpoint.orbax import HEADER as HEADER
from q4jax.checkpoint.orbax import restore, restore_step, save, save_args

__all__ = ["adapter_state", "restore", "restore_step", "save", "save_args", "with_adapters"]
