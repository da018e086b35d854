"""`add_lora` and `merge_lora` for the variables of Linen models."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jax.typing import DTypeLike

from q4jax.convert.targets import Targets, check_adapter, choose_targets
from q4jax.core.argument_names import name_ours
from q4jax.linen.adapter import ADAPTERS, LoRAFactors
from q4jax.linen.quantized_param import QuantizedBox
from q4jax.linen.variables import COLLECTION
from q4jax.ops.params import Params4bit, quantize_stacked

Path = tuple[str, ...]


@name_ours
def add_lora(
    variables: Mapping[str, Any],
    rank: int,
    alpha: float,
    *,
    targets: Targets = None,
    rslora: bool = False,
    param_dtype: DTypeLike = jnp.float32,
    key: Array | None = None,
) -> dict[str, Any]:
    r"""Return variables with a LoRA adapter on each 4-bit weight, in the collection "lora".

    The layers of `q4jax.linen` read their adapters from it; for the weights of other layers,
    `merge_quantized` adds them. Differentiate and optimize "lora", and pass the other collections
    along. `nn.scan` over the layers of `q4jax.linen` takes `variable_axes={..., "lora": 0}`.

    Args:
      variables: what `quantize_model`, `quantize_variables` or `init` of a model with 4-bit layers
        returned.
      rank: inner width of the adapters, at least 1.
      alpha: the adapters' output is scaled by `alpha / rank`.
      targets: names or paths of the layers to adapt, such as ("query", "value"); or one string, a
        regular expression for the whole path. Slashes of paths may be dots. None takes every layer
        with a 4-bit weight. Embeddings have no adapter.
      rslora: whether to scale by `alpha / sqrt(rank)`, so that ranks compare (arXiv:2312.03732).
      param_dtype: dtype of the adapters. They compute in the dtype of the layer's output, or of its
        weight where the weight alone is adapted.
      key: random key; None takes `jax.random.key(0)`.

    Returns:
      The variables, which share all arrays with the old ones. The model computes what it computed
      until the adapters are trained.

    Raises:
      ValueError: rank is not a positive integer; a target matches no layer (the error names the
        layers); targets is not a regular expression; there are adapters already; there is no 4-bit
        weight.

    Source: LoRA, arXiv:2106.09685; QLoRA, arXiv:2305.14314.

    Examples:
      >>> import jax, jax.numpy as jnp, q4jax
      >>> from flax import linen as nn
      >>> model, x = nn.Dense(32), jnp.ones((1, 64))
      >>> small = q4jax.linen.quantize_model(model, model.init(jax.random.key(0), x), x)
      >>> variables = q4jax.linen.add_lora(small, rank=8, alpha=16)
      >>> def loss(lora):
      ...     return model.apply(q4jax.linen.merge_quantized({**variables, "lora": lora}), x).sum()
      >>> jax.tree.map(jnp.shape, jax.grad(loss)(variables["lora"]))
      {'kernel': LoRAFactors((64, 8), (8, 32), alpha=16)}
    """
    check_adapter(rank)
    if variables.get(ADAPTERS):
        raise ValueError(f"variables have adapters already, in the collection {ADAPTERS!r}")
    found = adaptable_weights(variables)
    chosen = choose_targets({".".join(path[:-1]): True for path in found}, targets)
    paths = [path for path in found if ".".join(path[:-1]) in chosen]
    key = jax.random.key(0) if key is None else key
    lora: dict[Path, Any] = {}
    for path, own in zip(paths, jax.random.split(key, len(paths)), strict=True):
        state = meta.unbox(found[path]).quant_state
        out, inputs = state.spec.shape
        bound = 1.0 / math.sqrt(inputs)
        a = jax.random.uniform(own, (*state.lead, inputs, rank), param_dtype, -bound, bound)
        b = jnp.zeros((*state.lead, rank, out), param_dtype)
        lora[path] = LoRAFactors(a, b, alpha, rslora)
    return {**variables, ADAPTERS: unflatten_dict(lora)}


def adaptable_weights(variables: Mapping[str, Any]) -> dict[Path, Params4bit]:
    """Return the 4-bit weights that can have an adapter by path; ValueError where there is none."""
    quant = flatten_dict(variables.get(COLLECTION, {})) if isinstance(variables, Mapping) else {}
    weights = {p: w.weight if isinstance(w, QuantizedBox) else w for p, w in quant.items()}
    found = {p: w for p, w in weights.items() if _is_matrix(w) and p[-1] != "embedding"}
    if not found:
        raise ValueError(
            f"variables must hold 4-bit weights of layers in {COLLECTION!r}, as quantize_model "
            f"returns them; it holds {sorted(map('/'.join, quant))}"
        )
    return found


def _is_matrix(weight: Any) -> bool:
    return isinstance(weight, Params4bit) and len(weight.quant_state.spec.shape) == 2


def merge_lora(variables: Mapping[str, Any], *, requantize: bool = False) -> dict[str, Any]:
    """Return variables without the collection "lora", whose adapters are in the weights.

    Args:
      variables: what `add_lora` returned, trained or not.
      requantize: whether the weights are quantized again with their settings, which rounds away a
        part of the adapter. Otherwise each adapted weight is in "params", in the dtype that it was
        quantized from. The layers of `q4jax.linen` have 4-bit weights only.

    Raises:
      ValueError: there are no adapters; one has no 4-bit weight; without `requantize`, one is that
        of a layer of `q4jax.linen`.

    Examples:
      >>> import jax, jax.numpy as jnp, q4jax
      >>> from flax import linen as nn
      >>> model, x = nn.Dense(32), jnp.ones((1, 64))
      >>> small = q4jax.linen.quantize_model(model, model.init(jax.random.key(0), x), x)
      >>> merged = q4jax.linen.merge_lora(q4jax.linen.add_lora(small, rank=8, alpha=16))
      >>> merged["params"]["kernel"].shape, model.apply(merged, x).shape
      ((64, 32), (1, 32))
    """
    lora = flatten_dict(variables.get(ADAPTERS, {}))
    if not lora:
        raise ValueError(f"variables have no adapters in {ADAPTERS!r}; add_lora makes them")
    params, quant = (flatten_dict(variables.get(n, {})) for n in ("params", COLLECTION))
    for path, factors in lora.items():
        where, weight = "/".join(path), quant.get(path)
        box = weight if isinstance(weight, QuantizedBox) else None
        own = weight if box is None else box.weight
        if not _is_matrix(own):
            raise ValueError(f"the adapter {where} has no 4-bit weight in {COLLECTION!r}")
        if box is None and not requantize:
            raise ValueError(
                f"{where} is the weight of a layer that has 4-bit weights only: pass "
                f"requantize=True"
            )
        dense = meta.unbox(own).dequantize()
        exact = (dense.astype(jnp.float32) + factors.delta()).astype(dense.dtype)
        if not requantize:
            assert box is not None
            params[path] = box.kernel_axes.from_matrices(exact)
            del quant[path]
            continue
        new = _like(own, quantize_stacked(exact, where, **_settings(own)))
        quant[path] = new if box is None else QuantizedBox(new, box.kernel_axes, box.dtype, None)
    merged = {k: v for k, v in variables.items() if k not in (ADAPTERS, COLLECTION)}
    merged["params"] = unflatten_dict(params)
    return merged | ({COLLECTION: unflatten_dict(quant)} if quant else {})


def _settings(weight: Params4bit) -> dict[str, Any]:
    spec = weight.quant_state.spec
    return {
        "quant_type": spec.quant_type,
        "blocksize": spec.blocksize,
        "compress_statistics": spec.nested,
    }


def _like(old: Params4bit, new: Params4bit) -> Params4bit:
    """Put the arrays of a weight into the boxes that another one has, such as `nn.Partitioned`."""

    def is_box(leaf: Any) -> bool:
        return isinstance(leaf, meta.AxisMetadata)

    return jax.tree.map(
        lambda box, array: box.replace_boxed(array) if is_box(box) else array,
        old,
        new,
        is_leaf=is_box,
    )
