"""`Linear4bit` and its variants for Flax NNX."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from q4jax.convert.kernel_axes import KernelAxes
from q4jax.core.argument_names import name_ours
from q4jax.core.codebooks import QuantType
from q4jax.nnx.base import NO_RNGS, Quantized, other_class, to_sharding
from q4jax.nnx.dense_view import DenseView
from q4jax.nnx.variables import (
    SHARDING_METADATA,
    split_metadata,
    to_variables,
    transpose_metadata,
)
from q4jax.ops.matmul import in_compute_dtype, matmul_4bit
from q4jax.ops.params import Params4bit, as_params4bit

_kernel_init = nnx.initializers.lecun_normal()


class Linear4bit(Quantized):
    """A linear layer with a frozen 4-bit weight: `x @ W.T + bias`.

    It is differentiable in its input and its bias. The weight is a `Params4bit` of `Frozen4bit`
    Variables; only the bias is an `nnx.Param`, so save all of `nnx.state(model)` in a checkpoint
    and not `nnx.state(model, nnx.Param)`.

    Args:
      in_features: width of the input.
      out_features: width of the output.
      use_bias: whether to add a bias.
      dtype: dtype of the computation and of the result; None takes the input's, and float32 for
        float64.
      param_dtype: dtype of the weight before quantization, and of the bias.
      quant_type: "nf4" or "fp4".
      blocksize: elements that share a scale: 32, 64, 128, 256, 512, 1024, 2048 or 4096.
      compress_statistics: whether to quantize the scales too.
      kernel_init: initializer, called as `nnx.Linear` calls it, for an `[in, out]` kernel.
      bias_init: initializer of the bias, `[out]`.
      kernel_metadata: metadata of the weight's Variables. `{"out_sharding": (in, out)}` names the
        mesh axes or logical axes of the kernel, and applies to codes and scales. Metadata that
        `nnx.with_partitioning` adds to `kernel_init` applies too.
      bias_metadata: metadata of the bias.
      implementation: how the layer is computed; see `matmul_4bit`.
      rngs: random streams.

    Raises:
      ValueError: quant_type, blocksize, dtype or param_dtype is not allowed; when called, the input
        does not fit, or the weight is not the one that the layer was made for.

    Examples:
      >>> import jax.numpy as jnp, q4jax
      >>> from flax import nnx
      >>> layer = q4jax.Linear4bit(256, 128, quant_type="nf4", rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 256), jnp.bfloat16)).dtype.name
      'bfloat16'
      >>> layer.weight.quant_state.spec.tag()
      'nf4_b64_n256_float32_128x256'
    """

    __module__ = "q4jax"

    @name_ours
    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        quant_type: QuantType = "fp4",
        blocksize: int = 64,
        compress_statistics: bool = True,
        kernel_init: nnx.Initializer = _kernel_init,
        bias_init: nnx.Initializer = nnx.initializers.zeros,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        self.in_features = in_features
        self.out_features = out_features
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.quant_type = quant_type
        self.blocksize = blocksize
        self.compress_statistics = compress_statistics
        self.implementation = implementation
        self._spec((out_features, in_features))
        kernel = kernel_init(rngs.params(), (in_features, out_features), param_dtype)
        kernel, metadata = split_metadata(kernel, kernel_metadata)
        if isinstance(kernel, Params4bit):
            self.weight = to_variables(kernel)
        else:
            self._store(jnp.swapaxes(kernel, -1, -2), "kernel", transpose_metadata(metadata))
        bias = bias_init(rngs.params(), (out_features,), param_dtype) if use_bias else None
        self.bias = nnx.data(None) if bias is None else nnx.Param(bias, **bias_metadata)

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """Map `[..., in_features]` to `[..., out_features]`, in the compute dtype.

        Args:
          inputs: `[..., in_features]`.
          out_sharding: the sharding of the result on explicit mesh axes, as for `nnx.Linear`.
        """
        weight = self._load((self.out_features, self.in_features))
        x = in_compute_dtype(inputs, self.dtype)
        bias = None if self.bias is None else self.bias[...]
        y = matmul_4bit(x, weight, bias=bias, implementation=self.implementation)
        return to_sharding(y, out_sharding)

    @property
    def kernel(self) -> DenseView:
        """The shape `[*lead, in, out]` and dtype of the dense kernel; `.dequantize()` makes it."""
        axes = KernelAxes((self.in_features, self.out_features), in_axes=(0,))
        return DenseView(self, "kernel", axes)

    @classmethod
    def from_weight(cls, weight: Params4bit, *, dtype: DTypeLike | None = None) -> Self:
        """Make a layer without bias from a weight that is quantized already.

        Args:
          weight: a matrix `[out, in]`, or a stack of them.
          dtype: dtype of the computation and of the result; None takes the input's.

        Raises:
          ValueError: the weight is not a matrix, or its arrays do not fit its description.

        Examples:
          >>> import jax.numpy as jnp, q4jax
          >>> weight = q4jax.Params4bit.quantize(jnp.ones((32, 64)), quant_type="nf4")
          >>> q4jax.Linear4bit.from_weight(weight)(jnp.ones((1, 64))).shape
          (1, 32)
        """
        spec = as_params4bit(weight).quant_state.spec
        if len(spec.shape) != 2:
            raise ValueError(f"weight must be a matrix or a stack of them, got {weight!r}")
        settings: dict[str, Any] = {"quant_type": spec.quant_type} if cls is Linear4bit else {}
        settings |= {"param_dtype": spec.dtype, "blocksize": spec.blocksize, "use_bias": False}
        settings |= {"compress_statistics": spec.nested, "kernel_init": lambda *_: weight}
        layer = cls(spec.shape[1], spec.shape[0], dtype=dtype, rngs=NO_RNGS, **settings)
        if layer.quant_type != spec.quant_type:
            raise ValueError(f"{cls.__name__} is {layer.quant_type}, the weight is {spec.tag()}")
        return layer

    @classmethod
    def from_linear(cls, linear: nnx.Linear, *, name: str = "kernel", **settings: Any) -> Self:
        """Make a 4-bit layer from an `nnx.Linear`, which is not changed; they share the bias.

        Args:
          linear: a layer whose kernel may have leading axes, as `nnx.vmap` makes them.
          name: the name of the kernel in errors.
          **settings: dtype (None takes `linear`'s), quant_type, blocksize, compress_statistics and
            implementation, as for the class.

        Raises:
          TypeError: `linear` is not an `nnx.Linear`, or its arithmetic was replaced.
          ValueError: for the reasons of the class; the kernel holds NaN or inf.

        Examples:
          >>> import jax.numpy as jnp, q4jax
          >>> from flax import nnx
          >>> linear = nnx.Linear(64, 32, rngs=nnx.Rngs(0))
          >>> q4jax.LinearNF4.from_linear(linear)(jnp.ones((1, 64))).shape
          (1, 32)
        """
        reason = unsupported_reason(linear)
        if reason:
            raise TypeError(f"{name}: cannot quantize a {type(linear).__name__}: {reason}")
        kernel = linear.kernel[...]
        metadata = linear.kernel.get_metadata()
        settings["dtype"] = linear.dtype if settings.get("dtype") is None else settings["dtype"]
        fixed: dict[str, Any] = {
            "use_bias": False,
            "param_dtype": kernel.dtype,
            "kernel_init": lambda *_: kernel,
            "kernel_metadata": {
                name: metadata[name] for name in SHARDING_METADATA if name in metadata
            },
            "rngs": NO_RNGS,
        }
        try:
            layer = cls(linear.in_features, linear.out_features, **fixed, **settings)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        layer.use_bias = linear.use_bias
        layer.bias = linear.bias
        return layer


class LinearNF4(Linear4bit):
    """`Linear4bit` with quant_type "nf4"."""

    __module__ = "q4jax"

    @name_ours
    def __init__(self, in_features: int, out_features: int, **settings: Any):
        super().__init__(in_features, out_features, quant_type="nf4", **settings)


class LinearFP4(Linear4bit):
    """`Linear4bit` with quant_type "fp4"."""

    __module__ = "q4jax"

    @name_ours
    def __init__(self, in_features: int, out_features: int, **settings: Any):
        super().__init__(in_features, out_features, quant_type="fp4", **settings)


def unsupported_reason(linear: Any) -> str | None:
    """The reason why a module cannot become a `Linear4bit`, or None."""
    if isinstance(linear, Linear4bit):
        return "it is quantized already"
    if type(linear) is not nnx.Linear:
        return other_class(nnx.Linear, linear)
    if linear.dot_general is not jax.lax.dot_general:
        return "its dot_general was replaced"
    return None


def to_linear(layer: Linear4bit) -> nnx.Linear:
    """Make an `nnx.Linear` with the dequantized kernel `[*lead, in, out]`; they share the bias."""
    kernel = layer.kernel.dequantize()
    linear = nnx.Linear(
        layer.in_features,
        layer.out_features,
        use_bias=False,
        dtype=layer.dtype,
        param_dtype=kernel.dtype,
        kernel_init=lambda *_: kernel,
        rngs=NO_RNGS,
    )
    linear.use_bias = layer.use_bias
    linear.bias = layer.bias
    return linear
