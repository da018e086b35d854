"""The operations on 4-bit weights: what their axes mean, and what one shard of each computes.

`q4jax.partition` runs them, on one device or on the shards of a mesh.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from q4jax.core import blockwise
from q4jax.core.blockwise import WeightArrays
from q4jax.core.spec import QuantSpec
from q4jax.ops import registry as implementations


class Dim(NamedTuple):
    """One axis of an array.

    Attributes:
      label: axes of one label are split alike; None: an axis that is never split.
      unit: elements that stay together: a split is between units.
    """

    label: str | None
    unit: int = 1


Dims = tuple[Dim, ...]
Axes = tuple[str, ...]
Split = Mapping[str, Axes]
"""Label -> mesh axes over which the axes of that label are split."""

_WHOLE = Dim(None)
_OUT = Dim("out")


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation with everything about it that is not an array.

    Its operands are pytrees of arrays: `(x, arrays, bias)` for "linear", `(g, arrays)` for
    "transposed", `(ids, arrays)` for "rows", `(arrays,)` for "dequantize", `(w,)` for "quantize"
    and `(absmax,)` for "compress", with `arrays` a `blockwise.WeightArrays`. Results are tuples.

    Attributes:
      name: "linear", "transposed", "rows", "dequantize", "quantize" or "compress".
      implementation: as `implementations.call` takes it.
      spec: of the weight.
      dtype: of the result of "rows" and "dequantize".
      whole: whether no device gives a part of the outputs of "linear" only; where the weight's are
        split, the parts are gathered.
    """

    name: str
    implementation: str | None
    spec: QuantSpec
    dtype: Any = None
    whole: bool = False

    @property
    def contraction(self) -> str | None:
        """The label that the operation sums over."""
        return {"linear": "in", "transposed": "out", "rows": "out"}.get(self.name)

    @property
    def gathers(self) -> bool:
        """Whether each shard needs the operands whole, though it gives its part of the results."""
        return self.name == "compress"

    def dims(self, *operands: Any) -> tuple[Any, tuple[Dims, ...]]:
        """What the axes of the operands (a pytree like them) and of the results mean."""
        spec = self.spec
        if self.name == "compress":
            lead = operands[0].ndim - len(spec.absmax_shape)
            scales = _weight(spec, lead, nested=True).absmax
            return (scales,), (scales, (_WHOLE,), ())
        if self.name == "quantize":
            lead = operands[0].ndim - len(spec.shape)
            weight = _weight(spec, lead, nested=False)
            return (weight.full,), (weight.packed, weight.absmax)
        arrays = operands[-1] if self.name != "linear" else operands[1]
        nested = arrays.offset is not None
        weight = _weight(spec, arrays.packed.ndim - len(spec.packed_shape), nested=nested)
        if self.name == "dequantize":
            return (weight.arrays,), (weight.full,)
        batch = operands[0].shape if self.name == "rows" else operands[0].shape[:-1]
        batch = _batch(batch)
        rows, columns = weight.full[-2:]
        if self.name == "rows":
            return (batch, weight.arrays), ((*batch, columns),)
        if self.name == "transposed":
            return ((*batch, rows), weight.arrays), ((*batch, columns),)
        bias = None if operands[2] is None else (rows,)
        return ((*batch, columns), weight.arrays, bias), ((*batch, _WHOLE if self.whole else rows),)

    def on_shard(self, split: Split, sizes: Mapping[str, int]) -> Callable[..., tuple[Array, ...]]:
        """The function of the operands' shards that gives the results' shards.

        Args:
          split: the labels that are split, none of them for whole operands.
          sizes: of the mesh axes in `split`.
        """
        return lambda *operands: _RUN[self.name](_Shard(self, split, sizes), *operands)


@dataclasses.dataclass(frozen=True)
class WholeFeatures:
    """The identity `(x,) -> (x,)` for `x [..., features]` whose features are never split."""

    name = "features"
    implementation = None
    contraction = None
    gathers = False

    def dims(self, x: Array) -> tuple[Any, tuple[Dims, ...]]:
        """As `Operation.dims`."""
        dims = (*_batch(x.shape[:-1]), _WHOLE)
        return (dims,), (dims,)

    def on_shard(self, split: Split, sizes: Mapping[str, int]) -> Callable[..., tuple[Array, ...]]:
        """As `Operation.on_shard`."""
        return lambda x: (x,)


def _batch(shape: tuple[int, ...]) -> Dims:
    return tuple(Dim(f"batch{i}") for i in range(len(shape)))


class _Weight(NamedTuple):
    """What the axes of a weight and of its arrays mean."""

    full: Dims
    packed: Dims
    absmax: Dims
    nested: bool

    @property
    def arrays(self) -> WeightArrays:
        """As the arrays lie in an operand."""
        statistics = ((_WHOLE,), ()) if self.nested else (None, None)
        return WeightArrays(self.packed, self.absmax, *statistics)  # type: ignore[arg-type]


def _weight(spec: QuantSpec, lead: int, *, nested: bool) -> _Weight:
    """In the row form whole blocks of a row stay together; the flat form is never split."""
    if not spec.in_rows:
        flat = (_WHOLE,) * (lead + 1)
        return _Weight((_WHOLE,) * (lead + len(spec.shape)), flat, flat, nested)
    rows = (*(Dim(f"lead{i}") for i in range(lead)), *(_OUT,) * (len(spec.shape) - 1))
    size = spec.blocksize
    last = (Dim("in", size), Dim("in", size // 2), Dim("in"))
    full, packed, absmax = ((*rows, dim) for dim in last)
    return _Weight(full, packed, absmax, nested)


def weight_dims(spec: QuantSpec, lead: int) -> tuple[Dims, Dims]:
    """What the axes of a weight's codes and of its scales mean, with `lead` axes in front."""
    weight = _weight(spec, lead, nested=spec.nested)
    return weight.packed, weight.absmax


@dataclasses.dataclass(frozen=True)
class _Shard:
    """One device's part of an operation."""

    operation: Operation
    split: Split
    sizes: Mapping[str, int]

    def parts(self, label: str | None) -> int:
        """Into how many parts a label is split."""
        return math.prod(self.sizes[axis] for axis in self.axes(label))

    def axes(self, label: str | None) -> Axes:
        """The mesh axes over which a label is split."""
        return tuple(self.split.get(label, ())) if label else ()

    def first(self, label: str | None, size: int) -> Array | int:
        """The number of this shard's first index, where a shard has `size`."""
        axes = self.axes(label)
        return lax.axis_index(axes) * size if axes else 0

    def weight(self, arrays: WeightArrays) -> tuple[WeightArrays, QuantSpec]:
        """This shard of the weight, as a weight of its own.

        Double-quantized scales are counted over the whole weight: where that is split, they are
        decoded here.
        """
        spec = self.operation.spec
        rows, row = spec.shape[:-1], spec.shape[-1]
        parts = (*(n // self.parts("out") for n in rows), row // self.parts("in"))
        if arrays.nested_absmax is None or arrays.offset is None:
            return arrays, dataclasses.replace(spec, shape=parts)
        dims = _weight(spec, arrays.absmax.ndim - len(spec.absmax_shape), nested=True).absmax
        if not any(self.axes(dim.label) for dim in dims):
            return arrays, spec
        shape = arrays.absmax.shape
        labels = [dim.label for dim in dims]
        first = [self.first(label, size) for label, size in zip(labels, shape, strict=True)]
        whole = tuple(size * self.parts(label) for label, size in zip(labels, shape, strict=True))
        index = blockwise.block_numbers(shape, first, whole)
        scales = blockwise.decode_absmax_at(
            index, arrays.absmax, arrays.nested_absmax, arrays.offset
        )
        plain = dataclasses.replace(spec, shape=parts, nested_blocksize=0)
        return WeightArrays(arrays.packed, scales, None, None), plain

    def call(self, *operands: Any, **static: Any) -> Any:
        """The implementation's operation of the same name."""
        implementation, name = self.operation.implementation, self.operation.name
        return implementations.call(implementation, name, *operands, **static)

    def total(self, part: Array) -> Array:
        """The sum of the shards' parts, in their dtype."""
        axes = self.axes(self.operation.contraction)
        return lax.psum(part, axes) if axes else part


def _linear(shard: _Shard, x: Array, arrays: WeightArrays, bias: Array | None) -> tuple[Array, ...]:
    arrays, spec = shard.weight(arrays)
    rows = x.reshape(-1, x.shape[-1])
    summed = bool(shard.axes("in"))
    y = shard.total(shard.call(rows, arrays, None if summed else bias, spec=spec))
    if summed and bias is not None:  # once, not in each part
        y = (y.astype(jnp.float32) + bias.astype(jnp.float32)).astype(y.dtype)
    if shard.operation.whole and shard.axes("out"):
        y = lax.all_gather(y, shard.axes("out"), axis=1, tiled=True)
    return (y.reshape(*x.shape[:-1], y.shape[-1]),)


def _transposed(shard: _Shard, g: Array, arrays: WeightArrays) -> tuple[Array, ...]:
    arrays, spec = shard.weight(arrays)
    dx = shard.total(shard.call(g.reshape(-1, g.shape[-1]), arrays, spec=spec))
    return (dx.reshape(*g.shape[:-1], dx.shape[-1]),)


def _rows(shard: _Shard, ids: Array, arrays: WeightArrays) -> tuple[Array, ...]:
    arrays, spec = shard.weight(arrays)
    dtype = shard.operation.dtype
    if not shard.axes("out"):
        return (blockwise.take_rows(arrays, ids, spec, dtype),)
    mine = ids - shard.first("out", spec.shape[0])
    inside = (mine >= 0) & (mine < spec.shape[0])
    rows = blockwise.take_rows(arrays, jnp.where(inside, mine, 0), spec, dtype)
    return (shard.total(jnp.where(inside[..., None], rows, 0)),)  # one of the parts is not zero


def _dequantize(shard: _Shard, arrays: WeightArrays) -> tuple[Array, ...]:
    arrays, spec = shard.weight(arrays)
    return (shard.call(arrays, spec=spec, dtype=shard.operation.dtype),)


def _quantize(shard: _Shard, w: Array) -> tuple[Array, ...]:
    spec = shard.operation.spec
    shape = w.shape[w.ndim - len(spec.shape) :]
    return tuple(shard.call(w, spec=dataclasses.replace(spec, shape=shape)))


def _compress(shard: _Shard, absmax: Array) -> tuple[Array, ...]:
    codes, nested_absmax, offset = shard.call(absmax)
    _, (dims, *_) = shard.operation.dims(absmax)
    for axis, dim in enumerate(dims):
        size = codes.shape[axis] // shard.parts(dim.label)
        codes = lax.dynamic_slice_in_dim(codes, shard.first(dim.label, size), size, axis)
    return codes, nested_absmax, offset


_RUN: dict[str, Callable[..., tuple[Array, ...]]] = {
    "linear": _linear,
    "transposed": _transposed,
    "rows": _rows,
    "dequantize": _dequantize,
    "quantize": _quantize,
    "compress": _compress,
}
