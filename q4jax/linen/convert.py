"""Linen models that do not know of 4 bits, on 4-bit weights.

`quantize_params` finds the weights by watching the model run once on shapes. `place_weights` puts
them where the model looks for its parameters: it reads a dense array, decoded at that moment, also
inside of `nn.scan`, `nn.vmap` and `nn.remat`. The model's code is not touched.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn
from flax import serialization
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from q4jax.convert.kernel_axes import KernelAxes
from q4jax.convert.plan import Conversion, Plan, make_decision, report
from q4jax.convert.quantized_param import QuantizedParam
from q4jax.convert.registry import describe_layer, resolve_axes
from q4jax.convert.rules import Config, Rules

COLLECTION = "quant"
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.BatchNorm, nn.GroupNorm)
Path = tuple[str, ...]


@jax.tree_util.register_pytree_with_keys_class
class BoxedWeight(QuantizedParam, meta.AxisMetadata[Array]):
    """A 4-bit weight in the place of a parameter: a box that Linen opens where it is read."""

    def unbox(self) -> Array:
        """The owner's array."""
        return self.decode()

    def replace_boxed(self, val: Any) -> Any:
        """What is put into the place of the weight stays what it is."""
        return val

    def add_axis(self, index: int, params: dict[Any, Any]) -> "BoxedWeight":
        """Codes and scales have the axis; there is nothing to note."""
        return self

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "BoxedWeight":
        """The inverse."""
        return self


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A module that was seen at work."""

    name: str
    conversion: Conversion
    axes: Mapping[str, KernelAxes]


def quantize_params(
    model: nn.Module,
    variables: Mapping[str, Any],
    *args: Any,
    config: Config = None,
    **kwargs: Any,
) -> dict[str, Any]:
    r"""The variables of a Linen model with the weights of its layers in 4 bits.

    `nn.Dense`, `nn.DenseGeneral`, `nn.Einsum`, so also what `nn.MultiHeadDotProductAttention` is
    made of, and the classes that `register_layer` was told of; `nn.Embed` where a rule asks for it.
    For the 4-bit layers of `q4jax.linen` in a model of your own use `quantize_variables`.

    Args:
      model: any Linen module.
      variables: its variables; those that are not quantized are kept.
      *args: what `model.apply` takes, arrays or `jax.ShapeDtypeStruct`s; only shapes matter.
      config: as for `quantize_model`; paths are Linen's, such as "layers/attn/query".
      **kwargs: the same; `method` too.

    Returns:
      The variables: 4-bit weights in a collection "quant", the rest of "params" as it was. Hand
      them to the model through `place_weights`.

    Raises:
      ValueError: as `quantize_model`; there is no "params".

    Example:
      >>> import jax, jax.numpy as jnp, q4jax
      >>> from flax import linen as nn
      >>> model, x = nn.MultiHeadDotProductAttention(4), jnp.ones((1, 3, 64))
      >>> variables = model.init(jax.random.key(0), x)
      >>> small = q4jax.linen.quantize_params(model, variables, x)
      >>> small["quant"]["query"]["kernel"].weight
      Params4bit(uint8[64, 32], nf4_b64_n256_float32_64x64)
      >>> model.apply(q4jax.linen.place_weights(small), x).shape
      (1, 3, 64)
    """
    if not isinstance(variables.get("params"), Mapping):
        raise ValueError(f"variables must hold a dict 'params', got the keys {list(variables)}")
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
            quant[(*at, name)] = BoxedWeight.quantize(
                meta.unbox(leaf), axes, where, variable=None, **settings
            )
    return {**variables, "params": unflatten_dict(params), COLLECTION: unflatten_dict(quant)}


def plan_params(
    model: nn.Module,
    variables: Mapping[str, Any],
    *args: Any,
    config: Config = None,
    **kwargs: Any,
) -> Plan:
    """What `quantize_params` would do, layer by layer, without doing it; the same arguments."""
    return _plan(model, variables, args, kwargs, Rules(config, {}))[0]


def place_weights(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Variables for the model's own code: the 4-bit weights in the places of its parameters.

    Pure and cheap: call it inside of `jit` and `grad`, on the "params" that are differentiated and
    the "quant" that is not. `flax.linen.unbox` of the result has the dense weights.

    Args:
      variables: what `quantize_params` returned.

    Raises:
      ValueError: a weight and a parameter are at one place.

    Example:
      >>> import jax, jax.numpy as jnp, q4jax
      >>> from flax import linen as nn
      >>> model, x = nn.Dense(32), jnp.ones((1, 64))
      >>> small = q4jax.linen.quantize_params(model, model.init(jax.random.key(0), x), x)
      >>> def loss(params):
      ...     variables = {"params": params, "quant": small["quant"]}
      ...     return model.apply(q4jax.linen.place_weights(variables), x).sum()
      >>> jax.tree.map(jnp.shape, jax.grad(loss)(small["params"]))
      {'bias': (32,)}
    """
    params = flatten_dict(variables.get("params", {}))
    rest: dict[Path, Any] = {}
    for path, weight in flatten_dict(variables.get(COLLECTION, {})).items():
        if not isinstance(weight, BoxedWeight):
            rest[path] = weight
        elif params.setdefault(path, weight) is not weight:
            raise ValueError(f"{'/'.join(path)} is in 'params' and, 4-bit, in {COLLECTION!r}")
    placed = {**variables, "params": unflatten_dict(params), COLLECTION: unflatten_dict(rest)}
    return {name: tree for name, tree in placed.items() if name != COLLECTION or tree}


def _plan(
    model: nn.Module, variables: Mapping[str, Any], args: Any, kwargs: Any, rules: Rules
) -> tuple[Plan, dict[Path, _Layer]]:
    layers = _watch(model, variables, args, kwargs)
    plan = Plan()
    for path, layer in sorted(layers.items()):
        plan.append(make_decision("/".join(path), layer.name, layer.conversion, rules))
    rules.require_matches([decision.path for decision in plan])
    return plan, layers


def _watch(
    model: nn.Module, variables: Mapping[str, Any], args: Any, kwargs: Any
) -> dict[Path, _Layer]:
    """The layers with weights, by their path, from one run on shapes."""
    found: dict[Path, _Layer] = {}

    def look(run: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        result = run(*args, **kwargs)
        module = context.module
        calls = any("__call__" in vars(kind) for kind in type(module).__mro__)
        if context.method_name == "__call__" or not (calls or context.method_name == "setup"):
            own = meta.unbox(dict(module.variables.get("params", {})))
            shapes = {n: v.shape for n, v in own.items() if hasattr(v, "shape")}
            layer = _layer(module, shapes, *(args if calls else ()), **(kwargs if calls else {}))
            at = tuple(module.path)
            if layer is not None:
                found[at] = layer if at not in found else _merge(found[at], layer)
        return result

    flat, treedef = jax.tree.flatten((args, kwargs))
    arrays = {i: leaf for i, leaf in enumerate(flat) if hasattr(leaf, "dtype")}

    def run(variables: Any, arrays: dict[int, Any]) -> Any:
        filled = [arrays.get(i, leaf) for i, leaf in enumerate(flat)]
        args, kwargs = jax.tree.unflatten(treedef, filled)
        return model.apply(variables, *args, **kwargs)

    # A model that jits its own methods would not run again where it has run before.
    with nn.intercept_methods(look), jax.disable_jit():
        jax.eval_shape(run, variables, arrays)
    return found


def _merge(one: _Layer, other: _Layer) -> _Layer:
    """Two modules of one scope (`nn.share_scope`), or one that was called twice."""
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
    """The weights of Flax's own layers; a string, why not; None where there is none."""
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


def _fill(box: BoxedWeight, state: Any) -> BoxedWeight:
    weight = serialization.from_state_dict(box.weight, state)
    return BoxedWeight(weight, box.kernel_axes, box.dtype, box.variable)


serialization.register_serialization_state(
    BoxedWeight, lambda box: serialization.to_state_dict(box.weight), _fill
)
