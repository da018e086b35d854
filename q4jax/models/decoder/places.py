"""PartitionSpecs of what a model returns on Explicit mesh axes."""

from typing import Any

import jax
from jax.sharding import PartitionSpec

from q4jax.models.decoder.kv_cache import KVCache
from q4jax.models.decoder.mixer_spec import Attention, LatentAttention
from q4jax.sharding.axes import MeshAxes

_HEADS = "tensor"  # `LlamaShardings` splits the outputs of projections to heads over it


def of_rows(model: Any, batch: MeshAxes, *_: Any, **__: Any) -> PartitionSpec:
    """The spec of `[B, ...]`: only the rows of the batch are split, and no vocabulary."""
    del model
    return PartitionSpec(batch or None)


def of_scalar(*_: Any, **__: Any) -> PartitionSpec:
    """The spec of a number."""
    return PartitionSpec()


def of_states(
    model: Any,
    batch: MeshAxes,
    input_ids: Any,
    positions: Any = None,
    attention_mask: Any = None,
    cache: KVCache | None = None,
    segment_ids: Any = None,
) -> tuple[PartitionSpec, KVCache | None]:
    """The specs of hidden states `[B, T, hidden_size]` and of the cache, by `hidden_states`."""
    del input_ids, positions, attention_mask, segment_ids
    return PartitionSpec(batch or None), None if cache is None else of_cache(model, batch)


def of_cache(model: Any, batch: MeshAxes) -> KVCache:
    """The specs of a cache: rows as the batch, heads of keys and values over "tensor"."""
    rows = PartitionSpec(batch or None)
    parts = dict(jax.sharding.get_abstract_mesh().shape).get(_HEADS, 1)
    states: dict[str, Any] = {}
    for stack in model.stacks:
        mixer = stack.layer.mixer
        heads = 0
        if isinstance(mixer, Attention | LatentAttention):
            heads = mixer.kv_heads if isinstance(mixer, Attention) else mixer.heads
        split = heads and parts > 1 and heads % parts == 0
        states[stack.name] = PartitionSpec(None, batch or None, *((None, _HEADS) if split else ()))
    return KVCache(states, rows, rows, PartitionSpec())  # type: ignore[arg-type]
