"""Rotary position embeddings as in Hugging Face: feature `i` pairs with `i + head_dim/2`."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from q4jax.models.config import LlamaConfig


def inverse_frequencies(config: LlamaConfig) -> np.ndarray:
    """Radians per position of each feature pair, float32 `[head_dim / 2]`, scaling applied."""
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    freq = np.float32(1.0) / np.power(np.float32(config.rope_theta), exponent)
    scaling = config.rope_scaling
    if scaling is None:
        slowed = freq
    elif scaling.rope_type == "linear":
        slowed = freq / np.float32(scaling.factor)
    else:  # llama3: how often a pair turns in the original context decides how much it is slowed
        turns = scaling.original_max_position_embeddings * freq / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
        slowed = keep * freq + (1.0 - keep) * freq / scaling.factor
    return np.asarray(slowed, np.float32)


def rotation(positions: jax.Array, config: LlamaConfig) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, float32 `[B, T, 1, head_dim / 2]`, for int positions `[B, T]`."""
    angle = positions[..., None, None].astype(jnp.float32) * inverse_frequencies(config)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns `x [B, T, heads, head_dim]` in float32; the result has the dtype of `x`."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
