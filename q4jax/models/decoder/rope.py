"""Rotary position embeddings."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from q4jax.models.decoder.mixer_spec import Rope
from q4jax.models.decoder.rope_scaling import RopeScaling
from q4jax.ops.embedding import widen

Rotation = tuple[jax.Array, jax.Array]  # cosine, sine


def inverse_frequencies(rope: Rope) -> np.ndarray:
    """Return radians per position of each feature pair, scaled, float32 `[dim / 2]`.

    Where they depend on the sequence, they are those of a short one.
    """
    exponent = np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)
    freq = np.float32(1.0) / np.power(np.float32(rope.theta), exponent)
    scaling = rope.scaling
    if scaling is None or scaling.rope_type == "dynamic":
        return freq
    if scaling.rope_type == "linear":
        return freq / np.float32(scaling.factor)
    if scaling.rope_type == "longrope":
        return freq / np.asarray(scaling.short_factor, np.float32)
    if scaling.rope_type == "proportional":
        turning = np.arange(rope.dim // 2) < int(scaling.partial_rotary_factor * rope.dim // 2)
        return np.where(turning, freq / np.float32(scaling.factor), np.float32(0))
    if scaling.rope_type == "llama3":
        # The number of turns in the original context decides how much a pair is slowed.
        turns = scaling.original_max_position_embeddings * freq / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    else:
        keep = _yarn_keep(rope, scaling)
    return np.asarray(keep * freq + (1.0 - keep) * freq / scaling.factor, np.float32)


def _yarn_keep(rope: Rope, scaling: RopeScaling) -> np.ndarray:
    """Return the kept share of each frequency: 1 for pairs that turn often, 0 for slow ones."""

    def pair(turns: float) -> float:
        """Return the fractional index of the pair with this many turns in the original context."""
        wavelength = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return rope.dim * math.log(wavelength) / (2 * math.log(rope.theta))

    first, last = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.dim - 1)
    width = last - first or 0.001
    ramp = (np.arange(rope.dim // 2, dtype=np.float32) - first) / width
    return 1.0 - np.clip(ramp, 0.0, 1.0)


def rotation(positions: jax.Array, rope: Rope, segments: jax.Array | None = None) -> Rotation:
    """Return cosine and sine, float32 `[B, T, 1, dim / 2]`, for int positions `[B, T]`.

    `segments`, int `[B, T]`, is the document of each token; None: a row is one document.
    """
    positions = widen(positions)
    freq: jax.Array | np.ndarray = inverse_frequencies(rope)[None, None, None]
    scaling = rope.scaling
    if scaling is not None and scaling.rope_type == "dynamic":
        freq = _dynamic_frequencies(_length(positions, segments), rope, scaling.factor)
    if scaling is not None and scaling.rope_type == "longrope":
        stretch = np.divide(scaling.short_factor, scaling.long_factor).astype(np.float32)
        long = _length(positions, segments) > scaling.original_max_position_embeddings
        freq = jnp.where(long, freq * stretch, freq)
    angle = positions[..., None, None].astype(jnp.float32) * freq
    scale = 1.0 if scaling is None else scaling.scale
    return jnp.cos(angle) * scale, jnp.sin(angle) * scale


def _length(positions: jax.Array, segments: jax.Array | None) -> jax.Array:
    """Return the length of the longest row, or of each document, int `[B or 1, T or 1, 1, 1]`."""
    last = positions.max(keepdims=True)
    if segments is not None:
        same = segments[:, :, None] == segments[:, None, :]
        last = jnp.max(positions[:, None, :], axis=-1, initial=0, where=same)
    return (last + 1)[..., None, None]


def _dynamic_frequencies(length: jax.Array, rope: Rope, factor: float) -> jax.Array:
    """Return the frequencies of dynamic scaling, `[B or 1, T or 1, 1, dim / 2]`."""
    length = jnp.maximum(length, rope.context).astype(jnp.float32)
    growth = (factor * length / rope.context - (factor - 1.0)) ** (rope.dim / (rope.dim - 2))
    exponent = (jnp.arange(0, rope.dim, 2, dtype=jnp.float32) / rope.dim)[None, None, None]
    return 1.0 / (rope.theta * growth) ** exponent


def rotate(x: jax.Array, turn: Rotation, interleaved: bool = False) -> jax.Array:
    """Rotate the first features of `x [B, T, heads, features]` in float32, in the dtype of `x`."""
    cos, sin = turn
    dim = 2 * cos.shape[-1]
    head, rest = x[..., :dim], x[..., dim:]
    y = head.astype(jnp.float32)
    if interleaved:
        a, b = y[..., 0::2], y[..., 1::2]
        y = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(head.shape)
    else:
        a, b = jnp.split(y, 2, axis=-1)
        y = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    y = y.astype(x.dtype)
    return jnp.concatenate([y, rest], axis=-1) if rest.shape[-1] else y
