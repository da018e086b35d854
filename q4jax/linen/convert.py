"""Quantize the weights of any Linen model, whose code runs unchanged.

`quantize_model` finds the weights by tracing the model once. `merge_quantized` puts them among the
model's parameters: the model reads a dense array that is dequantized at that moment, in `nn.scan`,
`nn.vmap` and `nn.remat` too.
"""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict

from q4jax.convert.config import QuantConfig
from q4jax.convert.kernel_axes import KernelAxes
from q4jax.convert.plan import Conversion, Plan, make_decision, report
from q4jax.convert.registry import describe_layer, resolve_axes
from q4jax.convert.rules import Config, Rules
from q4jax.linen.adapter import ADAPTERS, AdaptedBox
from q4jax.linen.quantized_param import QuantizedBox
from q4jax.linen.unmerged import Unmerged
from q4jax.linen.variables import COLLECTION, WEIGHT_NAMES
from q4jax.ops.params import Params4bit

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.BatchNorm, nn.GroupNorm)
Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A layer that was called."""

    name: str
    conversion: Conversion
    axes: Mapping[str, KernelAxes]


def quantize_model(
    model: nn.Module,
    variables: Mapping[str, Any],
    *args: Any,
    config: Config = None,
    **kwargs: Any,
) -> dict[str, Any]:
    r"""Quantize the variables of a Linen model, whose code and layers stay as they are.

    The weights of `nn.Dense`, `nn.DenseGeneral` and `nn.Einsum` become 4-bit, those in
    `nn.MultiHeadDotProductAttention` too, and those of classes registered by `register_layer`;
    `nn.Embed` only where a rule asks for it. For a model that uses the 4-bit layers of
    `q4jax.linen`, use `quantize_variables`.

    Args:
      model: a Linen module.
      variables: its variables; those that are not quantized are kept.
      *args: arguments of `model.apply`, arrays or `jax.ShapeDtypeStruct`s; only shapes matter.
      config: as for `q4jax.quantize_model`; paths are Linen's, such as "layers/attn/query".
      **kwargs: keyword arguments of `model.apply`, and `method`.

    Returns:
      The variables, with 4-bit weights in the collection "quant" and the others in "params". Pass
      them to the model through `merge_quantized`. In the place of each 4-bit weight, "params" has a
      mark without arrays; a model that reads one raises a ValueError that says so.

    Raises:
      ValueError: for the reasons of `q4jax.quantize_model`; there is no "params".
      TypeError: `model` is not a Linen module; a field of the config is given beside it.

    Examples:
      >>> import jax, jax.numpy as jnp, q4jax
      >>> from flax import linen as nn
      >>> model, x = nn.MultiHeadDotProductAttention(4), jnp.ones((1, 3, 64))
      >>> variables = model.init(jax.random.key(0), x)
      >>> small = q4jax.linen.quantize_model(model, variables, x)
      >>> small["quant"]["query"]["kernel"].weight
      Params4bit(uint8[64, 32], nf4_b64_n256_float32_64x64)
      >>> model.apply(q4jax.linen.merge_quantized(small), x).shape
      (1, 3, 64)
    """
    _check_call(model, variables, kwargs)
    params = flatten_dict(variables["params"])
    plan, layers = _plan(model, variables, args, kwargs, Rules(config, {}))
    report(plan)
    quant = flatten_dict(variables.get(COLLECTION, {}))
    for decision in plan.quantized:
        at = tuple(filter(None, decision.path.split("/")))
        assert decision.rule is not None
        for name, axes in layers[at].axes.items():
            where, leaf = "/".join((*at, name)), params.pop((*at, name))
            settings = decision.rule.settings
            quant[(*at, name)] = QuantizedBox.quantize(
                meta.unbox(leaf), axes, where, variable=None, **settings
            )
            params[(*at, name)] = Unmerged(where)
    return {**variables, "params": unflatten_dict(params), COLLECTION: unflatten_dict(quant)}


def plan_quantization(
    model: nn.Module,
    variables: Mapping[str, Any],
    *args: Any,
    config: Config = None,
    **kwargs: Any,
) -> Plan:
    """Return what `quantize_model`, which takes the same arguments, would do with each layer."""
    _check_call(model, variables, kwargs)
    return _plan(model, variables, args, kwargs, Rules(config, {}))[0]


def _check_call(model: Any, variables: Any, kwargs: Mapping[str, Any]) -> None:
    """Raise an error for a model of NNX, for variables without "params", and for stray settings."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a flax.linen.Module, got {type(model).__name__}")
    if not isinstance(variables, Mapping) or not isinstance(variables.get("params"), Mapping):
        got = f"the keys {list(variables)}" if isinstance(variables, Mapping) else type(variables)
        raise ValueError(f"variables must hold a dict 'params', got {got}")
    settings = {field.name for field in dataclasses.fields(QuantConfig)} & kwargs.keys()
    method = kwargs.get("method") or "__call__"
    own = inspect.signature(getattr(model, method) if isinstance(method, str) else method)
    if not any(p.kind is p.VAR_KEYWORD for p in own.parameters.values()):
        for name in sorted(settings - own.parameters.keys()):
            raise TypeError(
                f"the model has no argument {name!r}; for a setting of the quantization, pass "
                f"config=QuantConfig({name}=...)"
            )


def merge_quantized(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the 4-bit weights into "params", where the model's code reads its parameters.

    It is pure and cheap. Call it inside of `jit` and `grad`, on the "params" that are
    differentiated and the "quant" that is not. Adapters of these weights (`add_lora`), in the
    collection "lora", are added when the weights are read. `flax.linen.unbox` of the result has the
    dense weights.

    Args:
      variables: the variables that `quantize_model` or `add_lora` returned.

    Raises:
      ValueError: a 4-bit weight and a parameter have the same path; a 4-bit weight is missing; a
        weight lacks the axes of its kernel, as a checkpoint that was restored without a target
        does.

    Examples:
      >>> import jax, jax.numpy as jnp, q4jax
      >>> from flax import linen as nn
      >>> model, x = nn.Dense(32), jnp.ones((1, 64))
      >>> small = q4jax.linen.quantize_model(model, model.init(jax.random.key(0), x), x)
      >>> def loss(params):
      ...     variables = {"params": params, "quant": small["quant"]}
      ...     return model.apply(q4jax.linen.merge_quantized(variables), x).sum()
      >>> jax.tree.map(jnp.shape, jax.grad(loss)(small["params"]))
      {'bias': (32,), 'kernel': Unmerged('kernel')}
    """
    params = flatten_dict(variables.get("params", {}))
    lora = flatten_dict(variables.get(ADAPTERS, {}))
    rest: dict[Path, Any] = {}
    for path, weight in flatten_dict(variables.get(COLLECTION, {})).items():
        where = "/".join(path)
        if not isinstance(weight, QuantizedBox):
            if isinstance(weight, Params4bit) and path[-1] not in WEIGHT_NAMES.values():
                raise ValueError(
                    f"{where} in {COLLECTION!r} must be what quantize_model made, got a "
                    "bare Params4bit; restore a checkpoint with these variables as the target"
                )
            rest[path] = weight
            continue
        if not isinstance(params.get(path, Unmerged(where)), Unmerged):
            raise ValueError(f"{where} is in 'params' and, 4-bit, in {COLLECTION!r}")
        adapter = lora.pop(path, None)
        params[path] = weight if adapter is None else AdaptedBox(weight, adapter)
    for path, leaf in params.items():
        if isinstance(leaf, Unmerged):
            raise ValueError(f"{'/'.join(path)} is 4-bit, but not in {COLLECTION!r} of variables")
    placed = {**variables, "params": unflatten_dict(params)}
    for name, tree in ((COLLECTION, rest), (ADAPTERS, lora)):
        placed[name] = unflatten_dict(tree)
    return {n: tree for n, tree in placed.items() if tree or n not in (COLLECTION, ADAPTERS)}


def _plan(
    model: nn.Module, variables: Mapping[str, Any], args: Any, kwargs: Any, rules: Rules
) -> tuple[Plan, dict[Path, _Layer]]:
    layers = _watch(model, variables, args, kwargs)
    plan = Plan()
    for path, layer in sorted(layers.items()):
        plan.append(make_decision("/".join(path), layer.name, layer.conversion, rules))
    modules = {"/".join(path[:-1]) for path in flatten_dict(variables["params"])}
    rules.require_matches([decision.path for decision in plan], sorted(modules))
    return plan, layers


def _watch(
    model: nn.Module, variables: Mapping[str, Any], args: Any, kwargs: Any
) -> dict[Path, _Layer]:
    """Trace the model, and return its layers with weights by their path."""
    found: dict[Path, _Layer] = {}

    def look(run: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        result = run(*args, **kwargs)
        module = context.module
        calls = any("__call__" in vars(cls) for cls in type(module).__mro__)
        if context.method_name == "__call__" or not (calls or context.method_name == "setup"):
            own = meta.unbox(dict(module.variables.get("params", {})))
            shapes = {n: v.shape for n, v in own.items() if hasattr(v, "shape")}
            layer = _layer(module, shapes, *(args if calls else ()), **(kwargs if calls else {}))
            at = tuple(module.path)
            if layer is not None:
                found[at] = layer if at not in found else _merge(found[at], layer)
        return result

    flat, treedef = jax.tree.flatten((args, kwargs))
    # A dtype as an argument (`jnp.bfloat16`) is a class with an attribute `dtype`.
    is_array = [hasattr(leaf, "dtype") and not isinstance(leaf, type) for leaf in flat]
    arrays = {i: leaf for i, leaf in enumerate(flat) if is_array[i]}

    def run(variables: Any, arrays: dict[int, Any]) -> Any:
        filled = [arrays.get(i, leaf) for i, leaf in enumerate(flat)]
        args, kwargs = jax.tree.unflatten(treedef, filled)
        return model.apply(variables, *args, **kwargs)

    # A model that jits its own methods would not run again where it has run before.
    with nn.intercept_methods(look), jax.disable_jit():
        jax.eval_shape(run, variables, arrays)
    return found


def _merge(one: _Layer, other: _Layer) -> _Layer:
    """Merge two layers of one scope (`nn.share_scope`), or one that was called twice."""
    if one.axes and other.axes:
        return dataclasses.replace(one, axes={**other.axes, **one.axes})
    return one if one.axes else other


def _layer(module: nn.Module, shapes: dict[str, Any], *args: Any, **kwargs: Any) -> _Layer | None:
    name = type(module).__name__
    axes = describe_layer(module, shapes, *args, **kwargs)
    embedding = axes is None and isinstance(module, nn.Embed)
    if axes is None:
        axes = _flax_axes(module, shapes, *args, **kwargs)
    if isinstance(axes, str):
        return _Layer(name, Conversion(axes), {})
    return None if axes is None else _Layer(name, Conversion(None, is_embedding=embedding), axes)


def _flax_axes(
    module: nn.Module, shapes: dict[str, Any], *args: Any, **kwargs: Any
) -> Mapping[str, KernelAxes] | str | None:
    """Return the axes of a Flax layer's weights; the reason why it is kept; or None."""
    kernel = tuple(shapes.get("kernel", ()))
    if isinstance(module, nn.Dense):
        return {"kernel": KernelAxes(kernel, (0,))}
    if isinstance(module, nn.DenseGeneral):
        batch, inputs = (
            1 if isinstance(axes, int) else len(axes) for axes in (module.batch_dims, module.axis)
        )
        return {
            "kernel": KernelAxes(kernel, tuple(range(batch, batch + inputs)), tuple(range(batch)))
        }
    if isinstance(module, nn.Einsum):
        text = args[1] if len(args) > 1 else kwargs.get("einsum_str")
        return resolve_axes({"kernel": text or module.einsum_str or ""}, shapes)
    if isinstance(module, nn.Embed):
        return {"embedding": KernelAxes(shapes["embedding"], (1,))}
    if isinstance(module, nn.Conv | nn.ConvTranspose):
        return "a convolution"
    weights = sorted(name for name, shape in shapes.items() if len(shape) > 1)
    if weights and not isinstance(module, _NORMS):
        return f"its class is unknown; register_layer for its {weights}"
    return None
