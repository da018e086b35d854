"""`quantize_model` and `dequantize_model`: a model with its layers exchanged."""

from typing import Any, TypeVar

from flax import nnx

from q4jax.convert.plan import Decision, Plan, decide, report
from q4jax.convert.rules import Config, Rules
from q4jax.nnx.converters import dequantized, is_quantized, kind_of
from q4jax.nnx.traverse import replace_modules, walk_modules
from q4jax.ops.params import Params4bit

M = TypeVar("M")


def plan_quantization(model: Any, config: Config = None, **overrides: Any) -> Plan:
    """What `quantize_model` would do, layer by layer, without doing it.

    Args:
      model: as for `quantize_model`.
      config: the same.
      **overrides: the same.

    Raises:
      ValueError: a rule matches no layer, or a layer that cannot be quantized.
      TypeError: an unknown override, or one beside rules.

    Example:
      >>> import q4jax
      >>> from flax import nnx
      >>> print(q4jax.plan_quantization(nnx.Embed(4, 64, rngs=nnx.Rngs(0))))
      (root) (Embed): kept: an embedding; QuantRule(embeddings=True) takes it
    """
    rules = Rules(config, overrides)
    plan = Plan()
    for path, module in walk_modules(model):
        decision = _decide(path, module, rules)
        if decision is not None:
            plan.append(decision)
    rules.require_matches([decision.path for decision in plan])
    return plan


def _decide(path: str, module: nnx.Module, rules: Rules) -> Decision | None:
    """None for what is no layer with a weight."""
    layer = type(module).__name__
    if is_quantized(module):
        return Decision(path, layer, False, "quantized already")
    kind = kind_of(module)
    return None if kind is None else decide(path, layer, kind, rules)


def quantize_model(model: M, config: Config = None, **overrides: Any) -> M:
    r"""A model whose layers are 4-bit; it shares the arrays of all the rest.

    `nnx.Linear`, `nnx.LinearGeneral` and `nnx.Einsum` become `Linear4bit`, `LinearGeneral4bit` and
    `Einsum4bit`, also inside of `nnx.MultiHeadAttention`; where a rule asks for it, `nnx.Embed`
    becomes `Embedding4bit`. Layers of classes that `register_layer` was told of stay what they are,
    with 4-bit weights in them.

    Args:
      model: an nnx module, or a bare layer; it is left as it was. Kernels with leading axes
        (`nnx.vmap`) become stacked weights.
      config: None: `QuantConfig()`: nf4, blocksize 64, double quantization, all but `lm_head`. Or a
        list of `QuantRule`s, of which the first that matches the path of a layer decides.
      **overrides: fields of the config, such as `quant_type="fp4"`.

    Returns:
      The new model. What was kept, and why, is logged to the logger "q4jax" (INFO) and is what
      `plan_quantization` returns; a layer that could not be served is a UserWarning.

    Raises:
      ValueError: nothing matched; a rule matches no layer, or one that cannot be quantized; a layer
        is quantized already; a kernel holds NaN or inf (it is named).
      TypeError: not an nnx module; an unknown override, or one beside rules.

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
    already = [path for path, module in walk_modules(model) if is_quantized(module)]
    if already:
        raise ValueError(f"model is quantized already: {', '.join(already) or '(root)'}")
    plan = plan_quantization(model, config, **overrides)
    rules = {decision.path: decision.rule for decision in plan.quantized}
    made: dict[Any, Any] = {}

    def replace(path: str, module: nnx.Module) -> nnx.Module:
        rule, kind = rules.get(path), kind_of(module)
        if rule is None or kind is None or kind.quantize is None:
            return module
        dense = vars(module).get("kernel", vars(module).get("embedding"))
        layer: Any = kind.quantize(module, path, rule.settings)
        if isinstance(getattr(layer, "weight", None), Params4bit):
            # Modules that share a kernel share what becomes of it.
            key = id(dense), type(layer), getattr(layer, "fold", None), rule
            layer.weight = made.setdefault(key, layer.weight)
        return layer

    report(plan)
    return replace_modules(model, replace)


def dequantize_model(model: M) -> M:
    """The inverse of `quantize_model`: dense layers in the dtype of the originals.

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
        dense = dequantized(module)
        count += dense is not None
        return module if dense is None else dense

    dense = replace_modules(model, replace)
    if not count:
        raise ValueError("dequantize_model: nothing in the model is quantized")
    return dense
