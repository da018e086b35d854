"""Attention whose scores exist a block at a time, with their gradient.

The forward pass goes through blocks of keys with a running maximum, as FlashAttention does
(arXiv:2205.14135), and keeps results and log-sums; the backward pass computes the scores again.
Blocks without a pair to compute, such as those after the queries, are skipped.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from q4jax.models.decoder.mixer_spec import View
from q4jax.models.decoder.reach import Blocks, Pairs
from q4jax.models.decoder.remat import attended


@dataclasses.dataclass(frozen=True)
class Scores:
    """How scores follow from products: `cap * tanh(scale * q @ k / cap) + slope * distance`.

    Attributes:
      view: the keys that a query sees.
      scale: factor of the products.
      cap: bound of the products; None: there is none.
      alibi: slopes by head; None: there are none.
    """

    view: View
    scale: float
    cap: float | None = None
    alibi: tuple[float, ...] | None = None

    def compute(self, q: Array, k: Array, pairs: Pairs) -> tuple[Array, Array | float]:
        """Return scores, float32 `[B, K, G, T, S]`, -inf where unseen, and their derivative.

        Args:
          q: `[B, T, K, G, D]`, queries of G heads for each of K key heads.
          k: `[B, S, K, D]`.
          pairs: which of them see each other.
        """
        s = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=jnp.float32)
        s = s * jnp.float32(self.scale)
        slope: Array | float = self.scale
        if self.cap is not None:
            ratio = jnp.tanh(s / jnp.float32(self.cap))
            s, slope = ratio * jnp.float32(self.cap), (1 - ratio**2) * jnp.float32(self.scale)
        if self.alibi is not None:
            keys, queries = pairs.ranks
            distance = (keys[:, None, :] - queries[:, :, None]).astype(jnp.float32)
            heads = jnp.asarray(self.alibi, jnp.float32).reshape(1, k.shape[2], -1, 1, 1)
            s = s + heads * distance[:, None, None]
        return jnp.where(pairs.mask(self.view)[:, :, None], s, -jnp.inf), slope


def attend_in_blocks(
    scores: Scores, q: Array, k: Array, v: Array, sinks: Array | None, blocks: Blocks
) -> Array:
    """Return `[B, T, heads, value_dim]` of queries `[B, T, heads, dim]` over S keys and values.

    A query that sees no key, such as padding, gives zeros.
    """
    batch, tokens, kv_heads = q.shape[0], q.shape[1], k.shape[2]
    keys, queries = (ranks.shape[1] for ranks in blocks.pairs.ranks)

    def pad(array: Array, size: int) -> Array:
        more = size - array.shape[1]
        return jnp.pad(array, ((0, 0), (0, more), (0, 0), (0, 0))) if more else array

    q = pad(q, queries).reshape(batch, queries, kv_heads, -1, q.shape[-1])
    if sinks is not None:
        sinks = sinks.astype(jnp.float32).reshape(kv_heads, -1)
    y = _attend(scores, q, pad(k, keys), pad(v, keys), sinks, blocks)
    return y.reshape(batch, queries, -1, v.shape[-1])[:, :tokens]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    scores: Scores, q: Array, k: Array, v: Array, sinks: Array | None, blocks: Blocks
) -> Array:
    """Return `[B, T, K, G, value_dim]`."""
    return _forward(scores, q, k, v, sinks, blocks)[0]


def _take(array: Array, number: Array, size: int) -> Array:
    return lax.dynamic_slice_in_dim(array, number * size, size, axis=1)


def _add(array: Array, number: Array, block: Array) -> Array:
    start = number * block.shape[1]
    old = lax.dynamic_slice_in_dim(array, start, block.shape[1], axis=1)
    return lax.dynamic_update_slice_in_dim(array, old + block, start, axis=1)


def _joined(blocks: Array) -> Array:
    """Return `[B, T, …]` of stacked blocks `[count, B, size, …]`."""
    moved = jnp.moveaxis(blocks, 0, 1)
    return moved.reshape(moved.shape[0], -1, *moved.shape[3:])


def _tied(q: Array, blocks: Blocks) -> tuple[Array, Blocks]:
    """Let blocks depend on `q`, or a scan over layers would compute all masks before it."""
    tied: tuple[Array, Blocks] = lax.optimization_barrier((q, blocks))
    return tied


def _forward(
    scores: Scores, q: Array, k: Array, v: Array, sinks: Array | None, blocks: Blocks
) -> tuple[Array, Array]:
    """Return results in the dtype of `q`, and log-sums of scores, float32 `[B, K, G, T]`."""
    q, blocks = _tied(q, blocks)
    size, key_size = blocks.sizes
    batch, _, kv_heads, groups, _ = q.shape
    lead = (batch, kv_heads, groups, size)

    def of_queries(_: None, i: Array) -> tuple[None, Any]:
        own = _take(q, i, size)

        def add(j: Array, sums: Any) -> Any:
            top, total, y = sums
            pairs = blocks.pairs.block(i, j, blocks.sizes)
            s, _ = scores.compute(own, _take(k, j, key_size), pairs)
            high = jnp.maximum(top, s.max(axis=-1))
            base = jnp.where(high == -jnp.inf, 0.0, high)
            before, e = jnp.exp(top - base), jnp.exp(s - base[..., None])
            value = jnp.einsum(
                "bkgts,bskd->bkgtd",
                e.astype(v.dtype),
                _take(v, j, key_size),
                preferred_element_type=jnp.float32,
            )
            return high, total * before + e.sum(axis=-1), y * before[..., None] + value

        def of_keys(sums: Any, j: Array) -> tuple[Any, None]:
            return lax.cond(blocks.needed[i, j], add, lambda _, sums: sums, j, sums), None

        if sinks is None:
            start = jnp.full(lead, -jnp.inf, jnp.float32), jnp.zeros(lead, jnp.float32)
        else:
            start = jnp.broadcast_to(sinks[None, :, :, None], lead), jnp.ones(lead, jnp.float32)
        sums = (*start, jnp.zeros((*lead, v.shape[-1]), jnp.float32))
        count = jnp.arange(blocks.needed.shape[1], dtype=jnp.int32)
        (top, total, y), _ = lax.scan(of_keys, sums, count)
        y = y / jnp.where(total == 0, 1.0, total)[..., None]
        # Without keys, the log-sum is such that no probability is above 0.
        logsum = jnp.where(total == 0, jnp.inf, top + jnp.log(total))
        return None, (jnp.moveaxis(y, 3, 1).astype(q.dtype), jnp.moveaxis(logsum, 3, 1))

    count = jnp.arange(blocks.needed.shape[0], dtype=jnp.int32)
    _, (y, logsum) = lax.scan(of_queries, None, count)
    return _joined(y), _joined(logsum)


def _attend_fwd(scores, q, k, v, sinks, blocks):
    y, logsum = _forward(scores, q, k, v, sinks, blocks)
    # A layer that is computed again may keep both: `remat="attention"`.
    y, logsum = attended(y), attended(logsum)
    return y, (q, k, v, sinks, blocks, y, logsum)


def _attend_bwd(scores, saved, g):
    q, k, v, sinks, blocks, y, logsum = saved
    q, blocks = _tied(q, blocks)
    size, key_size = blocks.sizes
    # The derivative of each softmax's sum, `[B, T, K, G]`.
    delta = jnp.sum(g.astype(jnp.float32) * y.astype(jnp.float32), axis=-1)

    def product(equation: str, a: Array, b: Array) -> Array:
        return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)

    def of_queries(sums: Any, i: Array) -> tuple[Any, Array]:
        own, out = _take(q, i, size), _take(g, i, size)
        top, mean = (jnp.moveaxis(_take(a, i, size), 1, 3)[..., None] for a in (logsum, delta))

        def compute(j: Array) -> Any:
            keys, values = _take(k, j, key_size), _take(v, j, key_size)
            s, slope = scores.compute(own, keys, blocks.pairs.block(i, j, blocks.sizes))
            p = jnp.exp(s - top)
            dv = product("bkgts,btkgd->bskd", p.astype(q.dtype), out)
            dp = product("btkgd,bskd->bkgts", out, values)
            ds = (p * (dp - mean) * slope).astype(q.dtype)
            return product("bkgts,bskd->btkgd", ds, keys), product("bkgts,btkgd->bskd", ds, own), dv

        def nothing(_: Array) -> Any:
            parts = ((q, size), (k, key_size), (v, key_size))
            return tuple(
                jnp.zeros((a.shape[0], count, *a.shape[2:]), jnp.float32) for a, count in parts
            )

        def of_keys(sums: Any, j: Array) -> tuple[Any, None]:
            dq, dk, dv = sums
            more = lax.cond(blocks.needed[i, j], compute, nothing, j)
            return (dq + more[0], _add(dk, j, more[1]), _add(dv, j, more[2])), None

        start = (jnp.zeros(own.shape, jnp.float32), *sums)
        count = jnp.arange(blocks.needed.shape[1], dtype=jnp.int32)
        (dq, *sums), _ = lax.scan(of_keys, start, count)
        return tuple(sums), dq.astype(q.dtype)

    start = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    count = jnp.arange(blocks.needed.shape[0], dtype=jnp.int32)
    (dk, dv), dq = lax.scan(of_queries, start, count)
    dsinks = None
    if sinks is not None:
        dsinks = -jnp.sum(jnp.exp(sinks - logsum) * delta, axis=(0, 1))
    return _joined(dq), dk.astype(k.dtype), dv.astype(v.dtype), dsinks, None


_attend.defvjp(_attend_fwd, _attend_bwd)
