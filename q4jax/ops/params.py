"""`Params4bit`, a quantized weight as one pytree."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from q4jax.core.argument_names import name_ours
from q4jax.core.blockwise import WeightArrays
from q4jax.core.bnb_format import as_numpy
from q4jax.core.codebooks import QuantType
from q4jax.core.spec import QuantSpec
from q4jax.core.state import QuantState, unpack_weight, weight_arrays
from q4jax.ops.dequantize import dequantize_4bit
from q4jax.ops.not_an_array import NotAnArray
from q4jax.ops.quantize import quantize_4bit, require_finite


@jax.tree_util.register_pytree_with_keys_class
class Params4bit(NotAnArray):
    """A 4-bit weight as one pytree; every function takes it in the place of (packed, state).

    An immutable pytree of at most four arrays. It has no `shape` and no `dtype`, so that nothing
    takes it for an array; those of the weight are `quant_state.shape` and `quant_state.dtype`. Its
    use as an array is a TypeError that names what to call.

    Args:
      packed: uint8 codes, two a byte. Row form `[*lead, out, in/2]`, flat form `[*lead, bytes]`.
      quant_state: the scales and the static description.

    Examples:
      >>> import jax, jax.numpy as jnp, q4jax
      >>> w = jax.random.normal(jax.random.key(0), (128, 256))
      >>> weight = q4jax.Params4bit.quantize(w, quant_type="nf4")
      >>> weight
      Params4bit(uint8[128, 128], nf4_b64_n0_float32_128x256)
      >>> weight.nbytes * 8 / w.size
      4.5
      >>> q4jax.matmul_4bit(jnp.ones((2, 256)), weight).shape
      (2, 128)
    """

    __module__ = "q4jax"

    __slots__ = ("packed", "quant_state")
    packed: Array
    quant_state: QuantState

    def __init__(self, packed: Array, quant_state: QuantState):
        object.__setattr__(self, "packed", packed)
        object.__setattr__(self, "quant_state", quant_state)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"Params4bit is immutable; cannot set {name!r}")

    def __reduce__(self):
        return Params4bit, (self.packed, self.quant_state)

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], None]:
        """Return the children with their key names, for jax."""
        key = jax.tree_util.GetAttrKey
        return [(key("packed"), self.packed), (key("quant_state"), self.quant_state)], None

    @classmethod
    def tree_unflatten(cls, _: None, children: Iterable[Any]) -> "Params4bit":
        """Invert `tree_flatten_with_keys`, for jax; children may be anything."""
        packed, quant_state = children
        return cls(packed, quant_state)

    def __repr__(self) -> str:
        state: Any = self.quant_state  # whatever a transformation may have put there
        if not isinstance(state, QuantState):
            return f"Params4bit({state!r})"
        tag = state.spec.tag()
        if not hasattr(self.packed, "dtype"):
            return f"Params4bit({tag})"
        return f"Params4bit({self.packed.dtype}{list(self.packed.shape)}, {tag})"

    def _advice(self) -> str:
        return (
            f"{self!r} is a 4-bit weight and no array: q4jax.matmul_4bit(x, weight) is x @ W.T, "
            f"weight.dequantize() the array, weight.quant_state has its shape and dtype"
        )

    @classmethod
    @name_ours
    def quantize(
        cls,
        w: Array,
        blocksize: int = 64,
        compress_statistics: bool = False,
        quant_type: QuantType = "fp4",
        *,
        check_finite: bool = True,
        implementation: str | None = None,
    ) -> "Params4bit":
        """Quantize a weight: `quantize_4bit` with its two results as one pytree."""
        packed, state = quantize_4bit(
            w,
            blocksize,
            compress_statistics,
            quant_type,
            check_finite=check_finite,
            implementation=implementation,
        )
        return cls(packed, state)

    @name_ours
    def dequantize(self, dtype: Any = None, *, implementation: str | None = None) -> Array:
        """Return the weight in its full shape: `dequantize_4bit`."""
        return dequantize_4bit(self.packed, self.quant_state, dtype, implementation=implementation)

    @property
    def arrays(self) -> WeightArrays:
        """The weight's arrays, as the implementations take them."""
        return weight_arrays(self.packed, self.quant_state)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays of the weight."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def partition_names(self, names: Sequence[Any]) -> "Params4bit":
        """Return the partition names of each array, given those of the weight.

        Codes and scales go together; double quantization's own statistics are replicated, but for
        leading axes.

        Args:
          names: names of mesh axes or logical axes, or None, for each axis of the weight.

        Raises:
          ValueError: not one name for each axis; a name for an axis of a matrix whose rows are not
            whole blocks: its arrays are flat.

        Examples:
          >>> import jax.numpy as jnp, q4jax
          >>> weight = q4jax.Params4bit.quantize(jnp.ones((2, 64)), compress_statistics=True)
          >>> names = weight.partition_names(("mlp", "embed"))
          >>> names.packed, names.quant_state.absmax, names.quant_state.nested_absmax
          (('mlp', 'embed'), ('mlp', 'embed'), (None,))
        """
        state = self.quant_state
        ndim, split = len(state.shape), [n for n in names[len(state.lead) :] if n is not None]
        if len(names) != ndim:
            raise ValueError(f"{self!r} has {ndim} axes, its partition names are {tuple(names)}")
        if split and not state.spec.in_rows:
            raise ValueError(
                f"{self!r} cannot be partitioned over {', '.join(map(repr, split))}: its rows of "
                f"{state.spec.shape[-1]} are not whole blocks of {state.blocksize}"
            )
        leaves, tree = jax.tree.flatten(self)
        lead = tuple(names[: len(state.lead)])

        def of(leaf: Array) -> tuple[Any, ...]:
            if leaf.ndim == ndim:
                return tuple(names)
            return (*lead, *(None,) * leaf.ndim)[: leaf.ndim]

        return cast("Params4bit", jax.tree.unflatten(tree, map(of, leaves)))

    def unstack(self) -> "Params4bit":
        """Turn the joint form (one call on an N-D weight) into the stacked one, exactly.

        Every array of the result has the leading axes, so `scan`, `vmap` and indexing work.

        Raises:
          ValueError: a matrix does not hold a whole number of blocks, or, with double
            quantization, of 256 blocks: then neighbours share a scale.
        """
        state = as_params4bit(self).quant_state
        spec = state.spec
        stacked = 0 if state.offset is None else state.offset.ndim
        if len(spec.shape) <= 2 and (state.offset is None or stacked == len(state.lead)):
            return self
        lead, (rows, columns) = state.shape[:-2], state.shape[-2:]
        if rows * columns % spec.blocksize:
            raise ValueError(
                f"cannot unstack {self!r}: a matrix of {rows}x{columns} is not a whole number of "
                f"blocks of {spec.blocksize}"
            )
        blocks = rows * columns // spec.blocksize
        if spec.nested and blocks % spec.nested_blocksize:
            raise ValueError(
                f"cannot unstack {self!r}: the {blocks} blocks of a matrix are not a multiple of "
                f"{spec.nested_blocksize}, so matrices share nested scales; jax.vmap of "
                f"Params4bit.quantize over the leading axes gives each its own"
            )
        matrix = QuantSpec.from_shape(
            (rows, columns), spec.dtype, spec.quant_type, spec.blocksize, spec.nested
        )
        packed = self.packed.reshape(*lead, *matrix.packed_shape)
        absmax = state.absmax.reshape(*lead, *matrix.absmax_shape)
        if state.nested_absmax is None or state.offset is None:
            return Params4bit(packed, QuantState(absmax, None, None, matrix))
        nested_absmax = state.nested_absmax.reshape(*lead, -1)
        offset = state.offset.reshape(*state.offset.shape, *(1,) * (len(lead) - stacked))
        offset = jnp.broadcast_to(offset, lead)
        return Params4bit(packed, QuantState(absmax, nested_absmax, offset, matrix))

    def state_dict(self, prefix: str = "weight") -> dict[str, np.ndarray]:
        """Return bitsandbytes' state dict of the weight, with codes as uint8 `[bytes, 1]`.

        Args:
          prefix: the name of the weight; its statistics follow as `<prefix>.absmax` and so on.
        """
        data = {prefix: np.asarray(self.packed).reshape(-1, 1)}
        statistics = self.quant_state.as_dict(packed=True)
        return data | {f"{prefix}.{name}": value for name, value in statistics.items()}

    @classmethod
    def from_prequantized(cls, data: Any, quantized_stats: Mapping[str, Any]) -> "Params4bit":
        """Build the weight from bitsandbytes' arrays.

        Args:
          data: codes, `[bytes, 1]` or any shape: uint8, or a float or int8 array that contains
            their bytes (`quant_storage`).
          quantized_stats: its statistics, as `QuantState.from_dict` takes them.

        Raises:
          ValueError: statistics that `from_dict` refuses; more or fewer bytes than they describe.
        """
        if not isinstance(quantized_stats, Mapping):
            kind = type(quantized_stats).__name__
            raise ValueError(f"quantized_stats must be a dict of arrays, got {kind}")
        state = QuantState.from_dict(dict(quantized_stats))
        codes = np.ascontiguousarray(as_numpy("data", data)).reshape(-1).view(np.uint8)
        shape = (*state.lead, *state.spec.packed_shape)
        if codes.size != math.prod(shape):
            raise ValueError(
                f"data must hold {math.prod(shape)} bytes for {state.spec.tag()}, got {codes.size}"
            )
        return cls(jnp.asarray(codes.reshape(shape)), state)


def as_params4bit(packed: Array | Params4bit, state: QuantState | None = None) -> Params4bit:
    """Join the two forms in which functions take a weight, checked as by `unpack_weight`."""
    return Params4bit(*unpack_weight(packed, state))


def quantize_stacked(
    w: Array, name: str = "w", *, check_finite: bool = True, **settings: Any
) -> Params4bit:
    """Quantize a matrix, or a stack of them into the stacked form.

    Args:
      w: `[*lead, out, in]`; every array of the result has the axes `lead`.
      name: what errors call it.
      check_finite: raise where a concrete `w` holds NaN or inf.
      **settings: the others of `quantize_4bit`.

    Raises:
      ValueError: as `quantize_4bit`.
    """
    if check_finite:
        require_finite(w, name)

    def quantize(w: Array) -> Params4bit:
        return Params4bit.quantize(w, check_finite=False, **settings)

    for _ in w.shape[:-2]:
        quantize = jax.vmap(quantize)
    return quantize(w)
