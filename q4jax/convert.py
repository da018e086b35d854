"""`quantize_model` and `dequantize_model`: a model with its linear layers exchanged."""

import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax.numpy as jnp
from flax import nnx
from jax import Array

from q4jax.config import QuantConfig
from q4jax.frozen import thaw
from q4jax.layers import Embedding4bit, Linear4bit, why_not
from q4jax.params import Params4bit

_logger = logging.getLogger("q4jax")
M = TypeVar("M")
Replace = Callable[[str, Any], Any]

# Layers with a weight that quantize_model leaves alone, and why.
_KEPT: dict[type, str] = {
    nnx.Embed: "an embedding; use Embedding4bit",
    nnx.Conv: "a convolution",
}
_UNSERVED: dict[type, str] = {
    nnx.LinearGeneral: "nnx.LinearGeneral is not supported",
    nnx.Einsum: "nnx.Einsum is not supported",
}


@dataclasses.dataclass(frozen=True)
class Decision:
    """What `quantize_model` does with one layer, and why where it leaves it alone.

    `unserved`: it is a linear layer, nothing asked to keep it, and yet it is kept.
    """

    path: str
    layer: str
    quantize: bool
    reason: str = ""
    unserved: bool = False

    def __str__(self) -> str:
        verdict = "quantized" if self.quantize else f"kept: {self.reason}"
        return f"{self.path or '(root)'} ({self.layer}): {verdict}"


def replace_modules(model: M, replace: Replace) -> M:
    """A copy of a model that shares its arrays, with modules exchanged.

    Args:
      model: an nnx module; modules in `nnx.List`, `nnx.Dict`, `nnx.data` containers, lists,
        tuples and dicts are reached, and one that is reached twice is exchanged once.
      replace: (dotted path, module) to another module, or to the same to look inside it.
    """
    done: dict[int, tuple[Any, Any]] = {}

    def visit(path: str, node: Any) -> Any:
        if id(node) not in done:
            done[id(node)] = node, node  # a cycle stops here
            done[id(node)] = node, _visit_children(path, node, replace, visit)
        return done[id(node)][1]

    return visit("", nnx.clone(model))


def _visit_children(path: str, node: Any, replace: Replace, visit: Replace) -> Any:
    def child(name: Any, value: Any) -> Any:
        return visit(f"{path}.{name}" if path else str(name), value)

    if isinstance(node, nnx.Module):
        new = replace(path, node)
        if new is not node:
            return new
    if isinstance(node, nnx.Module):
        for name, value in list(vars(node).items()):
            if _holds_modules(value):
                new = child(name, value)
                if new is not value:
                    setattr(node, name, new if isinstance(new, nnx.Module) else nnx.data(new))
    elif isinstance(node, list):
        node[:] = [child(i, value) for i, value in enumerate(node)]
    elif isinstance(node, dict):
        node.update({name: child(name, value) for name, value in node.items()})
    elif isinstance(node, tuple):
        values = [child(i, value) for i, value in enumerate(node)]
        if any(a is not b for a, b in zip(values, node, strict=True)):
            return type(node)(*values) if hasattr(node, "_fields") else tuple(values)
    return node


def _holds_modules(value: Any) -> bool:
    if isinstance(value, nnx.Module):
        return True
    if isinstance(value, dict):
        return any(map(_holds_modules, value.values()))
    return isinstance(value, (list, tuple)) and any(map(_holds_modules, value))


def walk_modules(model: Any) -> Iterable[tuple[str, nnx.Module]]:
    """(dotted path, module) of every module that `replace_modules` would offer."""
    found: list[tuple[str, nnx.Module]] = []

    def note(path: str, module: nnx.Module) -> nnx.Module:
        found.append((path, module))
        return module

    replace_modules(model, note)
    return found


def plan_quantization(
    model: Any, config: QuantConfig | None = None, **overrides: Any
) -> list[Decision]:
    """What `quantize_model` would do, layer by layer, without doing it.

    Args:
      model: as for `quantize_model`.
      config: the same.
      **overrides: the same.

    Example:
      >>> import q4jax
      >>> from flax import nnx
      >>> for line in q4jax.plan_quantization(nnx.Embed(4, 64, rngs=nnx.Rngs(0))): print(line)
      (root) (Embed): kept: an embedding; use Embedding4bit
    """
    config = dataclasses.replace(config or QuantConfig(), **overrides)
    decisions = [_decide(path, module, config) for path, module in walk_modules(model)]
    return [decision for decision in decisions if decision is not None]


def _decide(path: str, module: nnx.Module, config: QuantConfig) -> Decision | None:
    """None for what is no layer with a weight."""
    layer = type(module).__name__
    if isinstance(module, (Linear4bit, Embedding4bit)):
        return Decision(path, layer, False, "quantized already")
    if isinstance(module, nnx.Linear):
        entry = config.skips(path)
        if entry is not None:
            return Decision(path, layer, False, f"skip has {entry!r}")
        reason = why_not(module)
        return Decision(path, layer, reason is None, reason or "", unserved=reason is not None)
    for kind, reason in (_KEPT | _UNSERVED).items():
        if isinstance(module, kind):
            return Decision(path, layer, False, reason, unserved=kind in _UNSERVED)
    return None


def quantize_model(model: M, config: QuantConfig | None = None, **overrides: Any) -> M:
    """A model whose `nnx.Linear` layers are `Linear4bit`; it shares the arrays of all the rest.

    Args:
      model: an nnx module, or a bare `nnx.Linear`; it is left as it was. Kernels with leading
        axes (`nnx.vmap`) become stacked weights.
      config: None: `QuantConfig()`: nf4, blocksize 64, double quantization, all but `lm_head`.
      **overrides: fields of the config, such as `quant_type="fp4"`.

    Returns:
      The new model. What was kept, and why, is logged to the logger "q4jax" (INFO) and is what
      `plan_quantization` returns; a linear layer that could not be served is a UserWarning.

    Raises:
      ValueError: nothing matched; a layer is quantized already; a kernel holds NaN or inf (it is
        named).
      TypeError: not an nnx module; an unknown override.

    Example:
      >>> import jax.numpy as jnp, q4jax
      >>> from flax import nnx
      >>> model = nnx.Sequential(nnx.Linear(64, 128, rngs=nnx.Rngs(0)), nnx.relu)
      >>> small = q4jax.quantize_model(model)
      >>> type(small.layers[0]).__name__, small(jnp.ones((1, 64))).shape
      ('Linear4bit', (1, 128))
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model must be an nnx.Module, got {type(model).__name__}")
    config = dataclasses.replace(config or QuantConfig(), **overrides)
    decisions: list[Decision] = []

    def replace(path: str, module: nnx.Module) -> nnx.Module:
        decision = _decide(path, module, config)
        if decision is not None:
            decisions.append(decision)
        if not isinstance(module, nnx.Linear) or decision is None or not decision.quantize:
            return module
        return Linear4bit.from_linear(
            module,
            name=f"{path}.kernel" if path else "kernel",
            dtype=config.dtype,
            quant_type=config.quant_type,
            blocksize=config.blocksize,
            compress_statistics=config.compress_statistics,
        )

    modules = walk_modules(model)
    already = [path for path, m in modules if isinstance(m, (Linear4bit, Embedding4bit))]
    if already:
        raise ValueError(f"model is quantized already: {', '.join(already) or '(root)'}")
    quantized = replace_modules(model, replace)
    report(decisions)
    return quantized


def report(decisions: list[Decision]) -> None:
    """Logs what happens to each layer and why; ValueError where none is quantized."""
    if not any(decision.quantize for decision in decisions):
        found = "; ".join(map(str, decisions)) or "it has no layer with a weight"
        raise ValueError(f"quantize_model matched no layer of the model: {found}")
    for decision in decisions:
        _logger.info("%s", decision)
    unserved = [decision for decision in decisions if decision.unserved]
    if unserved:
        warnings.warn("not quantized: " + "; ".join(map(str, unserved)), stacklevel=3)


def dense_linear(layer: Linear4bit, kernel: Array) -> nnx.Linear:
    """An `nnx.Linear` in a `Linear4bit`'s place, its bias shared; kernel `[*lead, in, out]`."""
    linear = nnx.Linear(
        layer.in_features,
        layer.out_features,
        use_bias=False,
        dtype=layer.dtype,
        param_dtype=kernel.dtype,
        kernel_init=lambda *_: kernel,
        rngs=nnx.Rngs(0),
    )
    linear.use_bias = layer.use_bias
    linear.bias = layer.bias
    return linear


def dequantize_stacked(weight: Params4bit) -> Array:
    """`[*lead, out, in]` of a weight in a module."""
    return thaw(weight).dequantize()


def dequantize_model(model: M) -> M:
    """The inverse of `quantize_model`: `nnx.Linear` and `nnx.Embed` in the dtype of the originals.

    Args:
      model: an nnx module; it is left as it was.

    Raises:
      ValueError: nothing in it is quantized.

    Example:
      >>> import q4jax
      >>> from flax import nnx
      >>> model = q4jax.quantize_model(nnx.Linear(64, 32, rngs=nnx.Rngs(0)))
      >>> type(q4jax.dequantize_model(model)).__name__
      'Linear'
    """
    count = 0

    def replace(_: str, module: nnx.Module) -> nnx.Module:
        nonlocal count
        if isinstance(module, Linear4bit):
            count += 1
            return dense_linear(module, jnp.swapaxes(dequantize_stacked(module.weight), -1, -2))
        if isinstance(module, Embedding4bit):
            count += 1
            table = dequantize_stacked(module.weight)
            return nnx.Embed(
                module.num_embeddings,
                module.features,
                dtype=module.dtype or table.dtype,
                param_dtype=table.dtype,
                embedding_init=lambda *_: table,
                rngs=nnx.Rngs(0),
            )
        return module

    dense = replace_modules(model, replace)
    if not count:
        raise ValueError("dequantize_model: nothing in the model is quantized")
    return dense
