"""Public alias of `q4jax.checkpoint.orbax_v1`."""

from q4jax.checkpoint.orbax_v1 import checkpointables, restore, restore_step

__all__ = ["checkpointables", "restore", "restore_step"]
