"""`quantize_model` and `dequantize_model` for NNX models, and `plan_quantization`."""

from typing import Any, TypeVar

from flax import nnx

from q4jax.convert.plan import Decision, Plan, make_decision, report
from q4jax.convert.rules import Config, Rules
from q4jax.nnx.converters import conversion_of, is_quantized, to_dense
from q4jax.nnx.traverse import check_module, holds_parameters, iter_modules, replace_modules
from q4jax.ops.params import Params4bit

M = TypeVar("M")


def plan_quantization(model: Any, config: Config = None, **overrides: Any) -> Plan:
    """Return what `quantize_model` would do with each layer, without doing it.

    Args:
      model: the model, as for `quantize_model`.
      config: the configuration, as for `quantize_model`.
      **overrides: fields of the config, as for `quantize_model`.

    Raises:
      ValueError: a rule matches no layer, or a layer that cannot be quantized; an entry of `skip`
        matches no module.
      TypeError: an unknown override, or one beside rules.

    Examples:
      >>> import q4jax
      >>> from flax import nnx
      >>> print(q4jax.plan_quantization(nnx.Embed(4, 64, rngs=nnx.Rngs(0))))
      (root) (Embed): kept: an embedding; QuantRule(embeddings=True) takes it
    """
    return apply_rules(model, Rules(config, overrides))


def apply_rules(model: Any, rules: Rules) -> Plan:
    """Return the decision for each layer of a model; errors are those of `plan_quantization`."""
    plan, paths = Plan(), []
    for path, module in iter_modules(model):
        decision = _decide(path, module, rules)
        if decision is not None:
            plan.append(decision)
        if decision is not None or holds_parameters(module):
            paths.append(path)
    rules.require_matches([decision.path for decision in plan], paths)
    return plan


def _decide(path: str, module: nnx.Module, rules: Rules) -> Decision | None:
    """Return None for a module that is not a layer with a weight."""
    layer = type(module).__name__
    if is_quantized(module):
        return Decision(path, layer, False, "quantized already")
    conversion = conversion_of(module)
    return None if conversion is None else make_decision(path, layer, conversion, rules)


def quantize_model(model: M, config: Config = None, **overrides: Any) -> M:
    r"""Return a model with 4-bit layers, which shares all other arrays with the original.

    `nnx.Linear`, `nnx.LinearGeneral` and `nnx.Einsum` become `Linear4bit`, `LinearGeneral4bit` and
    `Einsum4bit`, in `nnx.MultiHeadAttention` too. Where a rule asks for it, `nnx.Embed` becomes
    `Embedding4bit`. Classes registered by `register_layer` keep their type; only their weights
    become 4-bit.

    Args:
      model: an nnx module, or a single layer; it is not changed. Kernels with leading axes
        (`nnx.vmap`) become stacked weights.
      config: a `QuantConfig`; a list of `QuantRule`s, of which the first that matches a layer's
        path decides; or None for `QuantConfig()`: nf4, blocksize 64, double quantization, all
        layers but `lm_head`.
      **overrides: fields of the config, such as `quant_type="fp4"`.

    Returns:
      The new model. Layers that were kept are logged with the reasons to the logger "q4jax" (INFO);
      `plan_quantization` returns them. A layer that q4jax cannot quantize is a UserWarning.

    Raises:
      ValueError: no layer matches; a rule matches no layer, or one that cannot be quantized; an
        entry of `skip` matches no module; a layer is quantized already; a kernel holds NaN or inf
        (the error names it).
      TypeError: `model` is not an nnx module; an override is unknown, or given beside rules.

    Examples:
      >>> import jax.numpy as jnp, q4jax
      >>> from flax import nnx
      >>> model = nnx.Sequential(nnx.Linear(64, 128, rngs=nnx.Rngs(0)), nnx.relu)
      >>> small = q4jax.quantize_model(model)
      >>> type(small.layers[0]).__name__, small(jnp.ones((1, 64))).shape
      ('Linear4bit', (1, 128))
    """
    check_module(model)
    already = [path for path, module in iter_modules(model) if is_quantized(module)]
    if already:
        raise ValueError(f"model is quantized already: {', '.join(already) or '(root)'}")
    plan = plan_quantization(model, config, **overrides)
    rules = {decision.path: decision.rule for decision in plan.quantized}
    made: dict[Any, Any] = {}

    def replace(path: str, module: nnx.Module) -> nnx.Module:
        rule, conversion = rules.get(path), conversion_of(module)
        if rule is None or conversion is None or conversion.quantize is None:
            return module
        dense = vars(module).get("kernel", vars(module).get("embedding"))
        layer: Any = conversion.quantize(module, path, rule.settings)
        if isinstance(getattr(layer, "weight", None), Params4bit):
            # Modules that share a kernel share its 4-bit weight.
            key = id(dense), type(layer), getattr(layer, "kernel_axes", None), rule
            layer.weight = made.setdefault(key, layer.weight)
        return layer

    report(plan)
    return replace_modules(model, replace)


def dequantize_model(model: M) -> M:
    """Return a model with dense layers in the dtype of the originals: invert `quantize_model`.

    Args:
      model: an nnx module; it is not changed.

    Raises:
      ValueError: nothing in it is quantized.
      TypeError: `model` is not an nnx module.

    Examples:
      >>> import q4jax
      >>> from flax import nnx
      >>> model = q4jax.quantize_model(nnx.Linear(64, 32, rngs=nnx.Rngs(0)))
      >>> type(q4jax.dequantize_model(model)).__name__
      'Linear'
    """
    check_module(model)
    count = 0

    def replace(_: str, module: nnx.Module) -> nnx.Module:
        nonlocal count
        dense = to_dense(module)
        count += dense is not None
        return module if dense is None else dense

    dense = replace_modules(model, replace)
    if not count:
        raise ValueError("dequantize_model: nothing in the model is quantized")
    return dense
