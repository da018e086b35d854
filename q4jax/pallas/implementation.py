"""What the kernels serve, and how a call becomes a kernel with its tile."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from q4jax.core.blockwise import WeightArrays, in_layout
from q4jax.core.spec import QuantSpec
from q4jax.gpu import requirements as backend
from q4jax.gpu import tiles
from q4jax.gpu.cuda_call import kernel_call
from q4jax.pallas import dequantize, quantize
from q4jax.pallas import inline_ptx as ptx
from q4jax.pallas import matmul as linear
from q4jax.pallas import matmul_transpose as transposed


class Operations:
    """The four operations of an implementation, compiled for a GPU or interpreted.

    Served are nf4 and fp4, every block size, every float dtype, plain and nested scales, any M and
    N, and any K that is a multiple of the block size.

    Args:
      name: "pallas" or "pallas_interpret".
    """

    def __init__(self, name: str):
        self.name = name
        self.interpret = name == "pallas_interpret"

    def quantize(self, w: Array, *, spec: QuantSpec) -> tuple[Array, Array]:
        """Codes and plain scales, in the spec's layout."""
        packed, absmax = self._run(quantize.quantize, spec, w)
        return in_layout(w.shape, packed, absmax, spec)

    def dequantize(self, arrays: WeightArrays, *, spec: QuantSpec, dtype: np.dtype[Any]) -> Array:
        """The weight in its full shape."""
        return self._run(dequantize.dequantize, spec, arrays, dtype=dtype)

    def linear(
        self, x: Array, arrays: WeightArrays, bias: Array | None, *, spec: QuantSpec
    ) -> Array:
        """`x @ W.T + bias`: [M, K] -> [M, N] in x's dtype."""
        if not x.shape[0]:
            return jnp.zeros((0, spec.shape[0]), x.dtype)
        tile = tiles.choose("linear", x.shape[0], spec.shape, x.dtype)
        return self._run(linear.linear, spec, x, arrays, bias, tile=tile)

    def transposed(self, g: Array, arrays: WeightArrays, *, spec: QuantSpec) -> Array:
        """`g @ W`: [M, N] -> [M, K] in g's dtype."""
        if not g.shape[0]:
            return jnp.zeros((0, spec.shape[1]), g.dtype)
        tile = tiles.choose("transposed", g.shape[0], spec.shape, g.dtype)
        return self._run(transposed.transposed, spec, g, arrays, tile=tile)

    def _run(self, kernel: Callable[..., Any], spec: QuantSpec, *args: Any, **static: Any) -> Any:
        backend.triton(self.name)
        backend.check_rows(self.name, spec)
        if self.interpret:
            ptx.register_emulation()
            return kernel(*args, spec=spec, interpret=True, **static)
        backend.check_devices()
        return kernel_call(self.name, kernel, *args, spec=spec, interpret=False, **static)


class WhereVerified(Operations):
    """The kernels where they have been seen right on this kind of GPU, and are the faster way.

    For more rows than the table's crossover, decoding the weight for one dense product is.
    """

    def linear(
        self, x: Array, arrays: WeightArrays, bias: Array | None, *, spec: QuantSpec
    ) -> Array:
        """As named, up to the crossover."""
        self._check_rows("linear", x)
        return super().linear(x, arrays, bias, spec=spec)

    def transposed(self, g: Array, arrays: WeightArrays, *, spec: QuantSpec) -> Array:
        """As named, up to the crossover."""
        self._check_rows("transposed", g)
        return super().transposed(g, arrays, spec=spec)

    def _check_rows(self, operation: str, x: Array) -> None:
        most = tiles.crossover(operation, x.dtype)
        if x.shape[0] > most:
            raise NotImplementedError(f"a dense product is faster for more than {most} rows")

    def _run(self, kernel: Callable[..., Any], spec: QuantSpec, *args: Any, **static: Any) -> Any:
        kinds = {device.device_kind for device in jax.devices() if device.platform == "gpu"}
        if not kinds or not kinds <= set(tiles.verified()):
            raise NotImplementedError("the kernels are not verified on these devices")
        return super()._run(kernel, spec, *args, **static)
