"""Text generation from a `q4jax.models.Llama`.

`generate` runs batches of prompts of any lengths with a key/value cache, greedily or by sampling.
"""

from q4jax.models.generation.generate import generate

__all__ = ["generate"]
