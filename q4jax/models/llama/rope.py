"""Rotary position embeddings in Hugging Face's layout: `i` pairs with `i + head_dim/2`."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from q4jax.models.llama.config import LlamaConfig
from q4jax.models.llama.rope_scaling import RopeScaling


def inverse_frequencies(config: LlamaConfig) -> np.ndarray:
    """Return radians per position of each feature pair, scaled, float32 `[head_dim / 2]`.

    Dynamic scaling depends on the sequence; its frequencies are those of a short one here.
    """
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    freq = np.float32(1.0) / np.power(np.float32(config.rope_theta), exponent)
    scaling = config.rope_scaling
    if scaling is None or scaling.rope_type == "dynamic":
        return freq
    if scaling.rope_type == "linear":
        return freq / np.float32(scaling.factor)
    if scaling.rope_type == "llama3":
        # The number of turns in the original context decides how much a pair is slowed.
        turns = scaling.original_max_position_embeddings * freq / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    else:
        keep = _yarn_keep(config, scaling)
    return np.asarray(keep * freq + (1.0 - keep) * freq / scaling.factor, np.float32)


def _yarn_keep(config: LlamaConfig, scaling: RopeScaling) -> np.ndarray:
    """Return the kept share of each frequency: 1 for pairs that turn often, 0 for slow ones."""

    def pair(turns: float) -> float:
        """Return the fractional index of the pair with this many turns in the original context."""
        wavelength = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return config.head_dim * math.log(wavelength) / (2 * math.log(config.rope_theta))

    first, last = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, config.head_dim - 1)
    width = last - first or 0.001
    ramp = (np.arange(config.head_dim // 2, dtype=np.float32) - first) / width
    return 1.0 - np.clip(ramp, 0.0, 1.0)


def rotation(positions: jax.Array, config: LlamaConfig) -> tuple[jax.Array, jax.Array]:
    """Return cosine and sine, float32 `[B, T, 1, head_dim / 2]`, for int positions `[B, T]`."""
    freq: jax.Array | np.ndarray = inverse_frequencies(config)
    scaling = config.rope_scaling
    if scaling is not None and scaling.rope_type == "dynamic":
        freq = _dynamic_frequencies(positions, config, scaling.factor)
    angle = positions[..., None, None].astype(jnp.float32) * freq
    scale = 1.0 if scaling is None else scaling.scale
    return jnp.cos(angle) * scale, jnp.sin(angle) * scale


def _dynamic_frequencies(positions: jax.Array, config: LlamaConfig, factor: float) -> jax.Array:
    """Return the frequencies of dynamic scaling, whose base grows with the longest row."""
    context = config.max_position_embeddings
    length = jnp.maximum(positions.max() + 1, context).astype(jnp.float32)
    dim = config.head_dim
    growth = (factor * length / context - (factor - 1.0)) ** (dim / (dim - 2))
    exponent = jnp.arange(0, dim, 2, dtype=jnp.float32) / dim
    return 1.0 / (config.rope_theta * growth) ** exponent


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate `x [B, T, heads, head_dim]` in float32; return it in the dtype of `x`."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
