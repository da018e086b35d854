"""`QuantState`: the scales of a 4-bit weight and their description, as a pytree."""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from q4jax.core import bnb_format, codebooks
from q4jax.core.blockwise import WeightArrays
from q4jax.core.spec import QuantSpec

_SEPARATOR = "__"


def with_tag(name: str, spec: QuantSpec) -> str:
    """Return the key of a quantized leaf, so that another description is another tree structure."""
    return f"{name}{_SEPARATOR}{spec.tag()}"


def split_tag(key: str) -> tuple[str, QuantSpec]:
    """Invert `with_tag`; ValueError where `key` has no tag."""
    name, separator, tag = key.partition(_SEPARATOR)
    if not separator:
        raise ValueError(f"not the key of a quantized leaf: {key!r}")
    return name, QuantSpec.parse(tag)


@jax.tree_util.register_pytree_with_keys_class
class QuantState:
    """The scales of a blockwise 4-bit weight, with everything needed to decode it.

    An ordinary, immutable pytree: `jit`, `grad`, `vmap`, `scan`, `device_put`, pickling and
    checkpoints carry it whole. Its static part, `spec`, is in the treedef and in the key names.

    Args:
      absmax: scales. Plain: float32. Double-quantized: uint8 codes of the scales.
        Row form `[*lead, out, in / blocksize]`, flat form `[*lead, blocks]`.
      nested_absmax: float32 `[*stacked, ceil(blocks / 256)]`, or None where plain.
      offset: float32 `[*stacked]`, the mean of the scales, or None where plain.
      spec: the static description.

    Leading axes come in two forms. *Stacked*: every array has them, as `jax.vmap` makes them.
    *Joint*: one call on an N-D weight; the nested statistics are shared and do not have them.
    """

    __module__ = "q4jax"

    __slots__ = ("absmax", "nested_absmax", "offset", "spec")
    absmax: Array
    nested_absmax: Array | None
    offset: Array | None
    spec: QuantSpec

    def __init__(
        self,
        absmax: Array,
        nested_absmax: Array | None,
        offset: Array | None,
        spec: QuantSpec,
    ):
        for name, value in zip(self.__slots__, (absmax, nested_absmax, offset, spec), strict=True):
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"QuantState is immutable; cannot set {name!r}")

    def __reduce__(self):
        return QuantState, (self.absmax, self.nested_absmax, self.offset, self.spec)

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], QuantSpec]:
        """Return the children with their key names, for jax; every name carries the tag."""
        names = ("absmax", "nested_absmax", "offset") if self.spec.nested else ("absmax",)
        key = jax.tree_util.GetAttrKey
        return [(key(with_tag(n, self.spec)), getattr(self, n)) for n in names], self.spec

    @classmethod
    def tree_unflatten(cls, spec: QuantSpec, leaves: Iterable[Any]) -> "QuantState":
        """Invert `tree_flatten_with_keys`, for jax; leaves may be anything."""
        absmax, *nested = leaves
        nested_absmax, offset = nested if spec.nested else (None, None)
        return cls(absmax, nested_absmax, offset, spec)

    @property
    def quant_type(self) -> str:
        """Either "nf4" or "fp4"."""
        return self.spec.quant_type

    @property
    def blocksize(self) -> int:
        """Elements that share one scale."""
        return self.spec.blocksize

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the weight that was quantized, and of the dequantized weight."""
        return self.spec.dtype

    @property
    def nested(self) -> bool:
        """Whether the scales are double-quantized."""
        return self.spec.nested

    @property
    def code(self) -> np.ndarray:
        """The codebook, float32 `[16]`."""
        return codebooks.CODEBOOKS[self.spec.quant_type].values

    @property
    def lead(self) -> tuple[int, ...]:
        """The leading axes, stacked and joint ones together."""
        shape = tuple(self.absmax.shape)
        return shape[: len(shape) - len(self.spec.absmax_shape)]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight: leading axes, then the spec's shape."""
        return self.lead + self.spec.shape

    def __repr__(self) -> str:
        lead = f", lead={self.lead}" if hasattr(self.absmax, "shape") and self.lead else ""
        return f"QuantState({self.spec.tag()}{lead})"

    def validate(self) -> None:
        """Raise ValueError, with the array's name, where dtypes or shapes do not fit the spec."""
        spec = self.spec
        _require_array("absmax", self.absmax, spec)
        lead = self.lead
        _check_array("absmax", self.absmax, jnp.uint8 if spec.nested else jnp.float32, lead, spec)
        if not spec.nested:
            if self.nested_absmax is not None or self.offset is not None:
                raise ValueError(f"nested_absmax and offset must be None in a plain {self!r}")
            return
        if self.nested_absmax is None or self.offset is None:
            raise ValueError(f"nested_absmax and offset must be arrays in a nested {self!r}")
        stacked = tuple(self.offset.shape)
        if stacked != lead[: len(stacked)] or self.offset.dtype != jnp.float32:
            raise ValueError(
                f"offset must be float32 of a prefix of the leading axes {lead}, got "
                f"{self.offset.dtype}{list(stacked)} for {spec.tag()}"
            )
        blocks = math.prod(self.absmax.shape[len(stacked) :])
        expected = (*stacked, -(-blocks // spec.nested_blocksize))
        found = tuple(self.nested_absmax.shape)
        if found != expected or self.nested_absmax.dtype != jnp.float32:
            raise ValueError(
                f"nested_absmax must be float32{list(expected)}, got "
                f"{self.nested_absmax.dtype}{list(found)} for {spec.tag()}"
            )

    def as_dict(self, packed: bool = True) -> dict[str, Any]:
        """Return the state as bitsandbytes' dict.

        Args:
          packed: True for arrays only, as in a state dict: the scalars are JSON in a uint8 array
            under `quant_state.bitsandbytes__<quant_type>`. False for one flat dict of both.

        Returns:
          numpy arrays `absmax`, `quant_map` and, where nested, `nested_absmax`,
          `nested_quant_map`, all flat; and the scalars.

        Raises:
          ValueError: the state is stacked and nested: bitsandbytes has one offset a weight.

        Examples:
          >>> import jax.numpy as jnp, q4jax
          >>> _, state = q4jax.quantize_4bit(jnp.ones((2, 64)), quant_type="nf4")
          >>> list(state.as_dict())
          ['absmax', 'quant_map', 'quant_state.bitsandbytes__nf4']
          >>> bytes(state.as_dict()["quant_state.bitsandbytes__nf4"]).decode()
          '{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [2, 64]}'
        """
        if self.offset is not None and self.offset.ndim:
            raise ValueError(
                f"a stacked state cannot be one bitsandbytes state: {self!r} has an offset "
                f"for each of {tuple(self.offset.shape)}; index it first"
            )
        return bnb_format.write(
            self.absmax, self.nested_absmax, self.offset, self.spec, self.shape, packed
        )

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> "QuantState":
        """Invert `as_dict`, for both of its forms; keys may have one common prefix.

        Raises:
          ValueError: keys are missing, unknown or given twice; a value is of the wrong type; an
            array does not fit the shape; a table is not the standard one.

        Examples:
          >>> import jax.numpy as jnp, q4jax
          >>> _, state = q4jax.quantize_4bit(jnp.ones((2, 64)), quant_type="nf4")
          >>> q4jax.QuantState.from_dict(state.as_dict())
          QuantState(nf4_b64_n0_float32_2x64)
        """
        absmax, nested_absmax, offset, spec = bnb_format.read(d)
        return cls(_on_device(absmax), _on_device(nested_absmax), _on_device(offset), spec)


def _on_device(array: Any) -> Any:
    """Copy to a JAX array; `jnp.asarray` would compile a program for each new shape."""
    return None if array is None else jax.device_put(np.array(array))


def _require_array(name: str, array: Any, spec: QuantSpec) -> None:
    if not hasattr(array, "dtype") or not hasattr(array, "shape"):
        kind = type(array).__name__
        raise ValueError(f"{name} must be an array for {spec.tag()}, got {kind}")


def _check_array(
    name: str, array: Array, dtype: Any, lead: tuple[int, ...], spec: QuantSpec
) -> None:
    base = spec.packed_shape if name == "packed" else spec.absmax_shape
    found, expected = tuple(array.shape), (*lead, *base)
    if array.dtype != dtype or found != expected:
        raise ValueError(
            f"{name} must be {np.dtype(dtype).name}{list(expected)} for {spec.tag()}, "
            f"got {array.dtype}{list(found)}"
        )


def unpack_weight(packed: Any, state: QuantState | None = None) -> tuple[Array, QuantState]:
    """Return the codes and the state of a weight in either form, checked to fit each other.

    Args:
      packed: uint8 codes, or a `Params4bit`, which stands for both arguments.
      state: the codes' state.

    Raises:
      TypeError: neither a Params4bit nor codes with their QuantState.
      ValueError: codes that are not uint8, or arrays that do not fit the state.
    """
    if hasattr(packed, "quant_state"):
        if state is not None:
            raise TypeError(f"state must not be given with a Params4bit, got {state!r}")
        packed, state = packed.packed, packed.quant_state
    if not isinstance(state, QuantState):
        # The text of an array has many lines.
        got = type(state).__name__ if hasattr(state, "shape") else repr(state)
        raise TypeError(f"state must be a QuantState (or pass a Params4bit for both), got {got}")
    _require_array("absmax", state.absmax, state.spec)
    _require_array("packed", packed, state.spec)
    _check_array("packed", packed, jnp.uint8, state.lead, state.spec)
    state.validate()
    return packed, state


def weight_arrays(packed: Array, state: QuantState) -> WeightArrays:
    """Return the arrays of a weight, as the implementations take them."""
    return WeightArrays(packed, state.absmax, state.nested_absmax, state.offset)
