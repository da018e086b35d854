"""The memory of fine-tuning and of generating, from a config alone."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from q4jax.convert.config import QuantConfig
from q4jax.core.spec import float_dtype
from q4jax.finetune.base import adapt
from q4jax.finetune.optimizer import make_optimizer
from q4jax.finetune.placement import Placement
from q4jax.finetune.settings import Settings
from q4jax.finetune.step import compile_step
from q4jax.models.decoder.config import LlamaConfig
from q4jax.models.decoder.decoder import Llama
from q4jax.models.decoder.kv_cache import KVCache
from q4jax.models.decoder.token_losses import BLOCK, WIDEST
from q4jax.nnx.convert import quantize_model


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes on each device.

    Attributes:
      training: those of a step of fine-tuning, by part; they sum to what the compiler says.
      generating: those of a model with its cache, by part.
      platform: for which the step was compiled.
    """

    training: dict[str, int]
    generating: dict[str, int]
    platform: str

    def __str__(self) -> str:
        lines = []
        for title, parts in (("fine-tuning", self.training), ("generating", self.generating)):
            lines.append(f"{title}, GB on each device (compiled for {self.platform}):")
            rows = {**parts, "total": sum(parts.values())}
            lines += [f"  {name:<34} {size / 1e9:8.3f}" for name, size in rows.items()]
        return "\n".join(lines)


def estimate(entries: Mapping[str, Any], settings: Settings, mesh: str | None = None) -> Estimate:
    """Return the memory that a model takes, without its weights.

    The step that `run` would train by is compiled from shapes for this machine's platform.
    Nothing is allocated. XLA's compiler for CPUs widens 16-bit numbers to float32, so that its
    activations are an upper bound for accelerators.

    Args:
      entries: the content of the model's `config.json`.
      settings: those of the run; `length` is the context, `batch` the rows of a step.
      mesh: the mesh, such as "fsdp=4,tensor=2", of as many devices as there are; None: one device.

    Raises:
      NotImplementedError: the model's family or a feature is not supported.
      ValueError: an entry is malformed, or the mesh does not divide the model.
    """
    config = LlamaConfig.from_hf(entries)
    stored = float_dtype(entries.get("dtype") or entries.get("torch_dtype") or "float32")
    placement = Placement(mesh, settings.blocksize)

    def make() -> tuple[Llama, Any]:
        dense = Llama(config, rngs=nnx.Rngs(0), dtype=stored, param_dtype=stored)
        quantization = QuantConfig(
            quant_type=settings.quant_type,
            blocksize=settings.blocksize,
            compress_statistics=not settings.no_double_quant,
        )
        model = adapt(quantize_model(dense, quantization), settings)
        return model, make_optimizer(model, settings)

    model, optimizer = nnx.eval_shape(make)
    model, optimizer = placement.place(model), placement.place(optimizer)
    split: Any = nnx.split(model, nnx.LoRAParam, ...)
    _, adapters, weights = split
    parts = settings.accumulate
    rows = settings.batch // parts
    batch = _batch(rows, parts, settings.length, placement)
    with placement.active():
        memory = compile_step(model, optimizer, batch, placement).memory_analysis()
    spec, local = config.decoder, -(-rows // placement.batch_parts)
    tokens = local * settings.length
    block = min(tokens, max(BLOCK, tokens // 4)) * min(spec.vocab_size, WIDEST)
    given = {
        "weights": _bytes(weights),
        "adapters": _bytes(adapters),
        "moments of the optimizer": _bytes(nnx.state(optimizer)),
    }
    new = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    kept = len(spec.layers) * local * settings.length * spec.hidden_size * stored.itemsize
    used = {
        "gradients and new adapters": min(new, 2 * given["adapters"]),
        "logits, in blocks": 2 * 4 * block,  # they, and their exponentials
        "activations: inputs of layers": 0 if settings.no_remat else kept,
    }
    rest = new + memory.argument_size_in_bytes - sum(given.values()) - sum(used.values())
    training = {**given, **used, "activations: within a layer": max(rest, 0)}
    cache = jax.eval_shape(lambda: KVCache.empty(model.stacks, 1, settings.length, stored))
    generating = {
        "weights": given["weights"],
        "cache of one text": _bytes(cache),
        "logits": 4 * spec.vocab_size,
    }
    return Estimate(training, generating, jax.default_backend())


def _bytes(tree: Any) -> int:
    """Return the bytes of a device's part of abstract arrays."""

    def size(leaf: Any) -> int:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return 8 * leaf.size
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        return math.prod(shape) * np.dtype(leaf.dtype).itemsize

    return sum(map(size, jax.tree.leaves(tree)))


def _batch(rows: int, parts: int, length: int, placement: Placement) -> dict[str, Any]:
    sharding = None
    if placement.rules is not None:
        spec = placement.rules.batch.spec if rows % placement.batch_parts == 0 else ()
        sharding = NamedSharding(placement.rules.mesh, PartitionSpec(None, *spec))
    dtypes = {"inputs": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    dtypes["segments"] = jnp.int32
    return {
        name: jax.ShapeDtypeStruct((parts, rows, length), dtype, sharding=sharding)
        for name, dtype in dtypes.items()
    }
