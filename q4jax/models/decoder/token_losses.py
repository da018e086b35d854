"""Cross-entropy of next tokens, without the logits of all tokens in memory.

The logits are computed in blocks of tokens and parts of the vocabulary. The forward pass keeps
running sums, as attention with an online softmax does, of the exponentials and, where there is a
gradient to hidden states, of the exponentials times the weight's rows. So each logit is computed
once. Only the gradient to the head's own arrays computes them again.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from q4jax.models.decoder.head import Head, join_parts, place_of
from q4jax.ops.params import Params4bit

BLOCK, WIDEST = 1024, 8192  # tokens in a block, and tokens of the vocabulary


def cross_entropy(
    hidden: Array,
    head: Array | Params4bit | Head,
    labels: Array,
    *,
    bias: Array | None = None,
    scale: float = 1.0,
    cap: float | None = None,
    block: int | None = None,
) -> Array:
    """Return the loss of each token in nats: `-log_softmax(logits)[label]`.

    It is differentiable in the hidden states, and in the head and bias if they are dense, in
    reverse mode. No array of the size of the logits exists: a block has a part of the tokens and
    some thousand entries of the vocabulary. Sums and exponentials are float32.

    Args:
      hidden: `[..., T, hidden_size]`, the normalized states of which a head makes logits.
      head: the head's weight `[vocab, hidden_size]`, dense or a `Params4bit`.
      labels: int `[..., T]`; a negative label, such as -100, is ignored: its loss is 0. The loss of
        a label that is not in the vocabulary is NaN.
      bias: `[vocab]`, or None.
      scale: factor of the logits.
      cap: bound of the logits, by `cap * tanh(logits / cap)`; None: there is none.
      block: tokens of a block, of all rows and devices; None: 1024, or a quarter of all tokens if
        that is more. Each block reads the head once, and gathers it if a mesh shards it.

    Returns:
      float32 `[..., T]`.

    Raises:
      ValueError: the shapes do not fit, the labels are not integers, or `block` is below 1.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from q4jax.models import cross_entropy
      >>> x, w = jnp.ones((1, 3, 8)), jnp.zeros((16, 8))
      >>> [[round(float(loss), 3) for loss in row] for row in cross_entropy(
      ...     x, w, jnp.array([[5, -100, 0]]))]
      [[2.773, 0.0, 2.773]]
    """
    if not isinstance(head, Head):
        head = Head(head, bias, scale=scale, cap=cap)
    return losses(hidden, None, head, labels, block)


def losses(
    hidden: Array, inner: Array | None, head: Head, labels: Array, block: int | None
) -> Array:
    """`cross_entropy` of a head with an adapter, whose first product is `inner`."""
    vocab, features = head.sizes
    if hidden.ndim < 2 or hidden.shape[-1] != features:
        raise ValueError(f"hidden must be [..., T, {features}], got {list(hidden.shape)}")
    if labels.shape != hidden.shape[:-1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels must be int {list(hidden.shape[:-1])}, got {labels.dtype}{list(labels.shape)}"
        )
    if head.bias is not None and head.bias.shape != (vocab,):
        raise ValueError(f"bias must be [{vocab}], got {list(head.bias.shape)}")
    block = max(BLOCK, -(-labels.size // 4)) if block is None else block
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    parts = head.parts(WIDEST)
    lead, tokens = labels.shape[:-1], labels.shape[-1]
    rows = labels.size // max(tokens, 1)
    # A vocabulary that does not fall into parts takes fewer tokens a block.
    most = max(1, block * WIDEST // max(WIDEST, vocab // parts))
    width = min(tokens, max(1, most // max(rows, 1)))
    blocks = -(-tokens // max(width, 1))
    if not labels.size:
        return jnp.zeros(labels.shape, jnp.float32)

    def fold(array: Array, fill: int = 0) -> Array:
        """Return `[blocks, rows, width, …]`."""
        tail = array.shape[len(lead) + 1 :]
        array = array.reshape(rows, tokens, *tail)
        pad = ((0, 0), (0, blocks * width - tokens), *((0, 0) for _ in tail))
        array = jnp.pad(array, pad, constant_values=fill) if blocks * width > tokens else array
        return jnp.moveaxis(array.reshape(rows, blocks, width, *tail), 1, 0)

    inner = None if inner is None else fold(inner)
    found = _losses(parts, fold(hidden), inner, head, fold(labels.astype(jnp.int32), -1))
    found = jnp.moveaxis(found, 0, 1).reshape(*lead, blocks * width)[..., :tokens]
    return jnp.where(labels >= vocab, jnp.nan, found)


class _Sums(NamedTuple):
    """Sums over the parts of the vocabulary so far, float32, for a block of tokens.

    Attributes:
      top: the largest logit.
      others: the sum of `exp(logit - top)`, without the label's.
      label: the label's logit.
      slope: its derivative.
      dx, dinner: the same sum, each term times its row of the weight; None without a gradient.
    """

    top: Array
    others: Array
    label: Array
    slope: Array
    dx: Array | None
    dinner: Array | None


def _logits(part: Head, x: Array, inner: Array | None) -> tuple[Array, Array, Any]:
    """Return logits of a part, their derivative, and the transpose of the product."""
    y, transpose = part.product(x)
    if inner is not None and part.outer is not None:
        y = y + _einsum("...r,rv->...v", inner.astype(x.dtype), part.outer)
    if part.bias is not None:
        y = y + part.bias.astype(x.dtype).astype(jnp.float32)
    return *part.bounded(y), transpose


def _is_label(labels: Array, number: Array, vocab: int, parts: int) -> Array:
    """Return which of the logits of a part are those of labels, bool `[..., part]`."""
    own, place = place_of(labels, vocab, parts)
    columns = jnp.arange(vocab // parts, dtype=jnp.int32)
    return (own == number)[..., None] & (place[..., None] == columns) & (labels >= 0)[..., None]


def _block(
    parts: int, gradient: bool, head: Head, plain: Head, x: Array, inner: Any, labels: Array
) -> tuple[Array, Array, Any]:
    """Return losses and log-sums of a block, and the gradients to `x` and `inner`."""
    vocab, dtype = head.sizes[0], head.compute_dtype(x)
    wide = x.astype(dtype)
    zeros = jnp.zeros(labels.shape, jnp.float32)
    start = _Sums(
        jnp.full(labels.shape, -jnp.inf, jnp.float32),
        zeros,
        zeros,
        zeros,
        jnp.zeros(x.shape, jnp.float32) if gradient else None,
        jnp.zeros(inner.shape, jnp.float32) if gradient and inner is not None else None,
    )

    def add(sums: _Sums, number: Array) -> tuple[_Sums, None]:
        # Bound to the loop, or compilers would convert the whole head to another dtype before it.
        part, own = lax.optimization_barrier(
            (plain.part(number, parts), _is_label(labels, number, vocab, parts))
        )
        y, slope, transpose = _logits(part, wide, inner)
        top = jnp.maximum(sums.top, y.max(axis=-1))
        before = jnp.exp(sums.top - top)
        e = jnp.where(own, 0.0, jnp.exp(y - top[..., None]))
        dx, dinner = sums.dx, sums.dinner
        if dx is not None:
            dx = dx * before[..., None] + transpose(e * slope)
        if dinner is not None:
            dinner = dinner * before[..., None] + _einsum(
                "...v,rv->...r", (e * slope).astype(dtype), part.outer
            )
        return _Sums(
            top,
            sums.others * before + e.sum(axis=-1),
            sums.label + jnp.where(own, y, 0.0).sum(axis=-1),
            sums.slope + jnp.where(own, slope, 0.0).sum(axis=-1),
            dx,
            dinner,
        ), None

    sums, _ = lax.scan(add, start, jnp.arange(parts, dtype=jnp.int32))
    total = sums.others + jnp.exp(sums.label - sums.top)
    logsum = sums.top + jnp.log(total)
    real = labels >= 0
    loss = jnp.where(real, logsum - sums.label, 0.0)
    if sums.dx is None:
        return loss, logsum, None
    # The label's own term apart: its probability less 1, without cancellation.
    ids = jnp.clip(labels, 0, vocab - 1)
    less = (-sums.others / total * sums.slope)[..., None]

    def whole(sum_: Array, row: Array) -> Array:
        return jnp.where(real[..., None], sum_ / total[..., None] + less * row, 0.0)

    dx = whole(sums.dx, head.rows(ids, dtype)).astype(x.dtype)
    if sums.dinner is None or head.outer is None:
        return loss, logsum, (dx, None)
    row = jnp.moveaxis(head.outer[:, ids], 0, -1).astype(jnp.float32)
    return loss, logsum, (dx, whole(sums.dinner, row).astype(inner.dtype))


def _einsum(equation: str, *arrays: Any) -> Array:
    return jnp.einsum(equation, *arrays, preferred_element_type=jnp.float32)


def _run(
    parts: int, gradient: bool, hidden: Array, inner: Any, head: Head, labels: Array
) -> tuple[Array, Array, Any]:
    plain = head.decoded() if parts > 1 else head

    def step(_: None, block: Any) -> tuple[None, Any]:
        return None, _block(parts, gradient, head, plain, *block)

    _, found = lax.scan(step, None, (hidden, inner, labels))
    return found


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(parts: int, hidden: Array, inner: Any, head: Head, labels: Array) -> Array:
    """Return losses `[blocks, rows, width]` of hidden states `[blocks, rows, width, features]`."""
    return _run(parts, False, hidden, inner, head, labels)[0]


def _losses_fwd(parts, hidden, inner, head, labels):
    def is_wanted(tree):
        return any(leaf.perturbed for leaf in jax.tree.leaves(tree))

    def values(tree):
        return jax.tree.map(lambda leaf: leaf.value, tree)

    to_hidden, to_head = is_wanted((hidden, inner)), is_wanted(head)
    hidden, inner, head, labels = map(values, (hidden, inner, head, labels))
    found, logsum, gradients = _run(parts, to_hidden, hidden, inner, head, labels)
    return found, (gradients, (hidden, inner, head, labels, logsum) if to_head else None)


def _losses_bwd(parts, saved, g):
    if isinstance(g, SymbolicZero):
        return None, None, None, None
    gradients, inputs = saved
    dhidden, dinner = gradients or (None, None)
    dhidden, dinner = (
        None if d is None else (d.astype(jnp.float32) * g[..., None]).astype(d.dtype)
        for d in (dhidden, dinner)
    )
    dhead = None if inputs is None else _head_gradient(parts, g, *inputs)
    return dhidden, dinner, dhead, None


def _head_gradient(
    parts: int, g: Array, hidden: Array, inner: Any, head: Head, labels: Array, logsum: Array
) -> Any:
    """Return the gradients to the head's dense arrays; those to codes and scales are zero."""
    vocab, dtype = head.sizes[0], head.compute_dtype(hidden)
    plain = head.decoded() if parts > 1 else head
    dense = not isinstance(head.weight, Params4bit)
    to_weight = "...v,...h->hv" if head.columns else "...v,...h->vh"

    def of_part(_: None, number: Array) -> tuple[None, Any]:
        part = plain.part(number, parts)

        def add(sums: Any, block: Any) -> tuple[Any, None]:
            x, low, label, top, factor = block
            x = x.astype(dtype)
            y, slope, _ = _logits(part, x, low)
            own = _is_label(label, number, vocab, parts)
            factor = jnp.where(label >= 0, factor, 0.0)[..., None]
            dy = (jnp.exp(y - top[..., None]) - own.astype(jnp.float32)) * slope * factor
            narrow = dy.astype(dtype)
            new = (
                _einsum(to_weight, narrow, x) if dense else None,
                None if part.bias is None else dy.sum(range(dy.ndim - 1)),
                None if part.outer is None else _einsum("...r,...v->rv", low.astype(dtype), narrow),
            )
            return jax.tree.map(jnp.add, sums, new), None

        arrays = (part.weight if dense else None, part.bias, part.outer)
        start = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), arrays)
        sums, _ = lax.scan(add, start, (hidden, inner, labels, logsum, g))
        return None, jax.tree.map(lambda sum_, a: sum_.astype(a.dtype), sums, arrays)

    _, (weight, bias, outer) = lax.scan(of_part, None, jnp.arange(parts, dtype=jnp.int32))
    joined: Any = join_parts(weight, 1 if head.columns else 0) if dense else None
    bias = None if bias is None else join_parts(bias, 0)
    outer = None if outer is None else join_parts(outer, 1)
    return dataclasses.replace(head, weight=joined, bias=bias, outer=outer)


_losses.defvjp(_losses_fwd, _losses_bwd, symbolic_zeros=True)
