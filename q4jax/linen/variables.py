"""`quantize_variables`: the variables of q4jax's Linen layers from those of dense ones."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from q4jax.convert.config import QuantConfig, module_paths
from q4jax.core.argument_names import name_ours
from q4jax.core.codebooks import QuantType
from q4jax.core.spec import float_dtype
from q4jax.ops.params import Params4bit, quantize_stacked

COLLECTION = "quant"
"""The collection of the 4-bit weights."""
WEIGHT_NAMES = {"kernel": "weight", "embedding": "embedding"}
"""Parameter of a dense layer -> the variable that it becomes."""


def array_of(leaf: Any) -> Any:
    """Return the array of a parameter, out of its `nn.Partitioned` box."""
    return leaf.value if isinstance(leaf, nn.Partitioned) else leaf


def quantize_parameter(w: Any, path: tuple[str, ...], **settings: Any) -> Params4bit:
    """Quantize a dense parameter; each leaf of an `nn.Partitioned` one is partitioned too."""
    name = "/".join(path)
    float_dtype(array_of(w).dtype, name)
    transpose = path[-1] == "kernel"  # [*lead, in, out]
    array = jnp.swapaxes(array_of(w), -1, -2) if transpose else array_of(w)
    weight = quantize_stacked(array, name, **settings)
    if not isinstance(w, nn.Partitioned):
        return weight
    *lead, rows, columns = w.names
    names = (*lead, columns, rows) if transpose else w.names
    try:
        shardings = weight.partition_names(names)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return jax.tree.map(lambda leaf, names: w.replace(value=leaf, names=names), weight, shardings)


@name_ours
def quantize_variables(
    variables: Mapping[str, Any],
    *,
    skip: Collection[str] = (),
    embeddings: bool = False,
    quant_type: QuantType = "fp4",
    blocksize: int = 64,
    compress_statistics: bool = True,
    check_finite: bool = True,
) -> dict[str, Any]:
    """Quantize the variables of a dense model for the same model with q4jax's 4-bit layers.

    The parameters of every `nn.Dense` are quantized; the others stay. A layer is recognized by its
    arrays: `kernel` `[in, out]`, or `[layers, in, out]` under `nn.scan`, and a `bias` that fits.
    Kernels of `nn.DenseGeneral` and `nn.Conv` can look like stacked ones, so skip them.

    Args:
      variables: the variables that `init` of the dense model returned; other collections are kept.
      skip: modules to leave dense, as `QuantConfig.skip` names them, with "/" or dots in paths:
        "lm_head", "decoder/lm_head".
      embeddings: whether to quantize every `nn.Embed` too.
      quant_type: that of the 4-bit layers, whose `param_dtype` must be the kernels' dtype.
      blocksize: that of the 4-bit layers.
      compress_statistics: that of the 4-bit layers.
      check_finite: whether to raise where a weight holds NaN or inf.

    Raises:
      ValueError: there is no layer to quantize; an entry of `skip` matches no module; a setting is
        not allowed; a weight is not float32, float16 or bfloat16, or holds NaN or inf (the error
        names its path).

    Examples:
      >>> import jax, jax.numpy as jnp, q4jax.linen
      >>> from flax import linen as nn
      >>> x = jnp.ones((2, 64))
      >>> variables = nn.Dense(128).init(jax.random.key(0), x)
      >>> quantized = q4jax.linen.quantize_variables(variables, quant_type="nf4")
      >>> q4jax.linen.LinearNF4(128).apply(quantized, x).shape
      (2, 128)
    """
    if not isinstance(variables.get("params"), Mapping):
        raise ValueError(f"variables must hold a dict 'params', got the keys {list(variables)}")
    names = skip if isinstance(skip, str) else [str(name).replace("/", ".") for name in skip]
    config = QuantConfig(skip=names)  # type: ignore[arg-type]
    config.require_skips(module_paths(flatten_dict(variables["params"])))
    settings: dict[str, Any] = {"quant_type": quant_type, "blocksize": blocksize}
    settings |= {"compress_statistics": compress_statistics, "check_finite": check_finite}
    quant: dict[tuple[str, ...], Any] = {}
    kept: dict[tuple[str, ...], Any] = {}

    def visit(node: Any, path: tuple[str, ...]) -> None:
        where = ".".join(path)
        if not isinstance(node, Mapping):
            kept[path] = node
            return
        source = None if config.skips(where) else _source(node, embeddings)
        for name, child in node.items():
            if name == source:
                weight = quantize_parameter(child, ("params", *path, name), **settings)
                quant[(*path, WEIGHT_NAMES[name])] = weight
            else:
                visit(child, (*path, name))

    visit(variables["params"], ())
    if not quant:
        left = sorted(map("/".join, kept))
        raise ValueError(f"no layer to quantize with skip={list(skip)}; 'params' holds {left}")
    quant = {**flatten_dict(variables.get(COLLECTION, {})), **quant}
    result = {**variables, "params": unflatten_dict(kept), COLLECTION: unflatten_dict(quant)}
    return {name: tree for name, tree in result.items() if tree}


def _source(node: Mapping[str, Any], embeddings: bool) -> str | None:
    """Return the name of the weight of an `nn.Dense` or `nn.Embed`, or of a stack of them."""
    shapes = {name: tuple(getattr(array_of(leaf), "shape", ())) for name, leaf in node.items()}
    kernel, table = shapes.get("kernel", ()), shapes.get("embedding", ())
    if len(kernel) in (2, 3):
        expected = {"kernel": kernel, "bias": kernel[:-2] + kernel[-1:]}
        return "kernel" if shapes.items() <= expected.items() else None
    return "embedding" if embeddings and len(shapes) == 1 and len(table) in (2, 3) else None
