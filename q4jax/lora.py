"""LoRA adapters beside frozen layers, and their merge."""

import math
from typing import Any, Literal, TypeVar, overload

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from q4jax.kinds import dense_linear, dequantize_stacked
from q4jax.layers import Linear4bit
from q4jax.walk import replace_modules

M = TypeVar("M")


class LoRALinear4bit(nnx.Module):
    """A linear layer with a low-rank adapter: `base(x) + dropout(x) @ lora_a @ lora_b * scale`.

    `lora_a` and `lora_b` are `nnx.LoRAParam`s: train them with `nnx.DiffState(0, nnx.LoRAParam)`
    and `nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)`.

    Args:
      base: the frozen layer; where its weight is stacked, so are the adapters.
      rank: inner width.
      alpha: numerator of the scale.
      rslora: the scale is `alpha / sqrt(rank)` and not `alpha / rank`.
      dropout: share of the adapter's input that is zeroed; not after `model.eval()`.
      param_dtype: dtype of the adapters. They compute in the dtype of the base's result.
      rngs: random streams. `lora_a` starts uniform in ±1/sqrt(in_features), `lora_b` at zero.
    """

    def __init__(
        self,
        base: Linear4bit,
        rank: int,
        alpha: float,
        *,
        rslora: bool = False,
        dropout: float = 0.0,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        lead = base.weight.quant_state.lead
        bound = 1.0 / math.sqrt(base.in_features)
        shape = (*lead, base.in_features, rank)
        uniform = jax.random.uniform(rngs.params(), shape, param_dtype, -bound, bound)
        self.base = base
        self.rank = rank
        self.alpha = alpha
        self.rslora = rslora
        self.dropout = nnx.data(_dropout(dropout, lead, rngs) if dropout else None)
        self.lora_a = nnx.LoRAParam(uniform)
        self.lora_b = nnx.LoRAParam(jnp.zeros((*lead, rank, base.out_features), param_dtype))

    def __call__(self, x: Array) -> Array:
        """`[..., in_features]` to `[..., out_features]` in the base's compute dtype."""
        y = self.base(x)
        x = x if self.dropout is None else self.dropout(x)
        low = x.astype(y.dtype) @ self.lora_a[...].astype(y.dtype)
        delta = low @ self.lora_b[...].astype(y.dtype)
        return y + delta * jnp.asarray(self.scale, y.dtype)

    @property
    def scale(self) -> float:
        """What the adapter's output is multiplied with."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def merged_kernel(self) -> Array:
        """float32 `[*lead, in, out]`: the decoded weight plus the adapter."""
        kernel = jnp.swapaxes(dequantize_stacked(self.base.weight), -1, -2).astype(jnp.float32)
        low, high = (v[...].astype(jnp.float32) for v in (self.lora_a, self.lora_b))
        delta = jnp.matmul(low, high, precision=jax.lax.Precision.HIGHEST)
        return kernel + delta * self.scale


def _dropout(rate: float, lead: tuple[int, ...], rngs: nnx.Rngs) -> nnx.Dropout:
    """A dropout with a random stream for each layer of a stack."""

    def make(rngs: nnx.Rngs) -> nnx.Dropout:
        return nnx.Dropout(rate, rngs=rngs)

    for size in reversed(lead):
        make = nnx.split_rngs(splits=size)(nnx.vmap(make))
    return make(rngs)


def add_lora(
    model: M,
    rank: int,
    alpha: float,
    *,
    targets: tuple[str, ...] | None = None,
    rslora: bool = False,
    dropout: float = 0.0,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs | None = None,
) -> M:
    """A model with an adapter beside each of its 4-bit linear layers; all arrays are shared.

    Args:
      model: an nnx module with `Linear4bit` layers; it is left as it was.
      rank: inner width of the adapters, at least 1.
      alpha: the adapters' output is scaled by `alpha / rank`.
      targets: names or dotted paths of the layers to adapt, such as ("q_proj", "v_proj"); None:
        every one.
      rslora: scale by `alpha / sqrt(rank)`, so that ranks compare (arXiv:2312.03732).
      dropout: share of an adapter's input that is zeroed while it is trained: until
        `model.eval()`, and again after `model.train()`.
      param_dtype: dtype of the adapters.
      rngs: random streams; None: `nnx.Rngs(0)`.

    Returns:
      The new model. Its outputs are those of `model` until the adapters are trained.

    Raises:
      ValueError: rank is no positive integer, dropout is not in [0, 1), no layer matched, or there
        are adapters already.

    Source: LoRA, arXiv:2106.09685; QLoRA, arXiv:2305.14314.

    Example:
      >>> import jax, jax.numpy as jnp, q4jax
      >>> from flax import nnx
      >>> model = q4jax.quantize_model(nnx.Sequential(nnx.Linear(64, 32, rngs=nnx.Rngs(0))))
      >>> model = q4jax.add_lora(model, rank=8, alpha=16)
      >>> adapters = nnx.DiffState(0, nnx.LoRAParam)
      >>> grads = nnx.grad(lambda m: m(jnp.ones((1, 64))).sum(), argnums=adapters)(model)
      >>> [leaf.shape for leaf in jax.tree.leaves(grads)]
      [(64, 8), (8, 32)]
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be a positive integer, got {rank!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout!r}")
    settings: dict[str, Any] = {"rslora": rslora, "dropout": dropout, "param_dtype": param_dtype}
    streams = nnx.Rngs(0) if rngs is None else rngs
    matched: list[str] = []
    seen: list[str] = []

    def replace(path: str, module: nnx.Module) -> nnx.Module:
        if isinstance(module, LoRALinear4bit):
            raise ValueError(f"model has an adapter already at {path or '(root)'}")
        if not isinstance(module, Linear4bit):
            return module
        seen.append(path)
        if targets is not None and not any(f".{t}." in f".{path}." for t in targets):
            return module
        matched.append(path)
        return LoRALinear4bit(module, rank, alpha, rngs=streams, **settings)

    adapted = replace_modules(model, replace)
    if not matched:
        raise ValueError(
            f"add_lora matched no layer: targets={targets!r}, 4-bit linear layers: {seen}"
        )
    return adapted


@overload
def merge_lora(model: M, *, requantize: Literal[False] = False) -> M: ...
@overload
def merge_lora(model: M, *, requantize: Literal[True]) -> tuple[M, dict[str, float]]: ...
def merge_lora(model: M, *, requantize: bool = False) -> M | tuple[M, dict[str, float]]:
    """A model with its adapters merged into the weights.

    Args:
      model: an nnx module with adapters; it is left as it was.
      requantize: False: each adapted layer becomes an `nnx.Linear` in the dtype its weight was
        quantized from. True: it becomes a `Linear4bit` again, with the settings it had, which
        rounds away part of the adapter.

    Returns:
      The new model; where requantized, also the error of each layer by dotted path:
      |requantized - merged| / |merged|, Frobenius norms.

    Raises:
      ValueError: the model has no adapter.

    Example:
      >>> import q4jax
      >>> from flax import nnx
      >>> model = q4jax.quantize_model(nnx.Linear(64, 32, rngs=nnx.Rngs(0)))
      >>> model = q4jax.add_lora(model, rank=8, alpha=16)
      >>> type(q4jax.merge_lora(model)).__name__
      'Linear'
      >>> _, errors = q4jax.merge_lora(model, requantize=True)
      >>> errors[""] < 0.12
      True
    """
    errors: dict[str, float] = {}
    count = 0

    def replace(path: str, module: nnx.Module) -> nnx.Module:
        nonlocal count
        if not isinstance(module, LoRALinear4bit):
            return module
        count += 1
        base, kernel = module.base, module.merged_kernel()
        dtype = base.weight.quant_state.dtype
        linear = dense_linear(base, kernel.astype(dtype))
        if not requantize:
            return linear
        layer = Linear4bit.from_linear(
            linear,
            name=f"{path}.kernel",
            quant_type=base.quant_type,
            blocksize=base.blocksize,
            compress_statistics=base.compress_statistics,
            implementation=base.implementation,
        )
        error = jnp.swapaxes(dequantize_stacked(layer.weight), -1, -2).astype(jnp.float32) - kernel
        errors[path] = float(jnp.linalg.norm(error.ravel()) / jnp.linalg.norm(kernel.ravel()))
        return layer

    merged = replace_modules(model, replace)
    if not count:
        raise ValueError("merge_lora: the model has no adapter; add_lora makes them")
    return (merged, errors) if requantize else merged
