"""How routers choose experts and weigh them."""

import jax
import jax.numpy as jnp

from q4jax.models.decoder.spec import Experts

_LOWEST = jnp.finfo(jnp.float32).min


def route(
    spec: Experts, scores: jax.Array, correction: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Return the experts of each token, int32 `[T, per_token]`, and their float32 weights.

    Args:
      spec: the mixture.
      scores: float32 `[T, experts]`, what the router returns.
      correction: float32 `[experts]` or `[1, experts]`, added to decide which are best.
    """
    if spec.score == "sparsemixer":
        return _sparsemixer(scores, spec.jitter)
    if spec.score == "top":
        best, chosen = jax.lax.top_k(scores, spec.per_token)
        return chosen, jax.nn.softmax(best, axis=-1)
    if spec.score == "input":
        best, chosen = jax.lax.top_k(scores, spec.per_token)
        return chosen, jax.nn.sigmoid(best)
    share = jax.nn.softmax(scores) if spec.score == "softmax" else jax.nn.sigmoid(scores)
    rank = share if correction is None else share + correction.reshape(1, -1)
    if spec.groups > 1:
        rank = _in_best_groups(spec, rank)
    chosen = jax.lax.top_k(rank, spec.per_token)[1]
    weights = jnp.take_along_axis(share, chosen, axis=-1)
    if spec.renormalize:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return chosen, weights * jnp.float32(spec.scale)


def _in_best_groups(spec: Experts, rank: jax.Array) -> jax.Array:
    """Return the ranks with the lowest number for experts outside of a token's best groups."""
    groups = rank.reshape(len(rank), spec.groups, -1)
    best = jax.lax.top_k(groups, min(spec.group_best, groups.shape[-1]))[0].sum(axis=-1)
    kept = jax.lax.top_k(best, spec.kept_groups)[1]
    inside = jax.nn.one_hot(kept, spec.groups, dtype=bool).any(axis=1)
    return jnp.where(inside[..., None], groups, _LOWEST).reshape(rank.shape)


def _sparsemixer(scores: jax.Array, jitter: float) -> tuple[jax.Array, jax.Array]:
    """Return the best two experts; the weight of each is its share among those near to it."""
    chosen, weights, left = [], [], scores
    for _ in range(2):
        best = left.max(axis=-1, keepdims=True)
        index = left.argmax(axis=-1).astype(jnp.int32)[:, None]
        size = jnp.maximum(jnp.abs(scores), best)
        near = jnp.where((best - scores) / size > 2 * jitter, _LOWEST, left)
        weights.append(jnp.take_along_axis(jax.nn.softmax(near, axis=-1), index, axis=-1))
        chosen.append(index)
        hit = jnp.arange(scores.shape[-1], dtype=jnp.int32)[None] == index
        left = jnp.where(hit, _LOWEST, left)
    return jnp.concatenate(chosen, axis=-1), jnp.concatenate(weights, axis=-1)
