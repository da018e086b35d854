"""`QuantConfig`: how a model is quantized."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax.typing import DTypeLike

from q4jax.core.codebooks import QuantType, check_quant_type
from q4jax.core.spec import check_blocksize, float_dtype

# transformers' BitsAndBytesConfig, what has no meaning for 4 bits or none after loading.
_IGNORED = {
    "quant_method",
    "load_in_8bit",
    "_load_in_4bit",
    "_load_in_8bit",
    "bnb_4bit_quant_storage",
    "llm_int8_enable_fp32_cpu_offload",
    "llm_int8_has_fp16_weight",
    "llm_int8_threshold",
}


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """Which layers of a model become 4-bit, and how.

    Attributes:
      quant_type: "nf4" or "fp4".
      blocksize: 32, 64, 128, 256, 512, 1024, 2048 or 4096.
      compress_statistics: double quantization of the scales.
      dtype: compute dtype of the new layers; None: that of the layer each replaces.
      skip: layers to leave alone, by name or dotted path: "lm_head" skips every module of that
        name, "layers.mlp" everything under such a path.

    Raises:
      ValueError: a setting that is not allowed.

    Examples:
      >>> import q4jax
      >>> q4jax.QuantConfig(skip=("lm_head", "embed_tokens")).quant_type
      'nf4'
    """

    __module__ = "q4jax"

    quant_type: QuantType = "nf4"
    blocksize: int = 64
    compress_statistics: bool = True
    dtype: DTypeLike | None = None
    skip: tuple[str, ...] = ("lm_head",)

    def __post_init__(self):
        check_quant_type(self.quant_type)
        check_blocksize(self.blocksize)
        if self.dtype is not None:
            float_dtype(self.dtype)
        names: Any = self.skip
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"skip must be a tuple of names, got {names!r}")
        object.__setattr__(self, "skip", tuple(names))

    def skips(self, path: str) -> str | None:
        """Return the entry of `skip` that excludes the module at this dotted path, or None."""
        return next((name for name in self.skip if f".{name}." in f".{path}."), None)

    @classmethod
    def from_bnb_config(cls, config: Mapping[str, Any]) -> "QuantConfig":
        """Read transformers' `BitsAndBytesConfig`, given as a dict (`quantization_config`).

        Raises:
          ValueError: 8-bit loading, an unknown key, or a value that is not allowed.

        Examples:
          >>> import q4jax
          >>> q4jax.QuantConfig.from_bnb_config({"load_in_4bit": True}).quant_type
          'fp4'
        """
        given = {k: v for k, v in config.items() if k not in _IGNORED}
        if config.get("load_in_8bit") or not given.pop("load_in_4bit", False):
            raise ValueError(f"only load_in_4bit=True is supported, got {dict(config)}")
        method = config.get("quant_method", "bitsandbytes")
        if getattr(method, "value", method) != "bitsandbytes":
            raise ValueError(f"quant_method must be 'bitsandbytes', got {method!r}")
        dtype = given.pop("bnb_4bit_compute_dtype", None)
        skip = given.pop("llm_int8_skip_modules", None)
        found = cls(
            quant_type=given.pop("bnb_4bit_quant_type", "fp4"),
            compress_statistics=bool(given.pop("bnb_4bit_use_double_quant", False)),
            dtype=None if dtype is None else float_dtype(str(dtype).removeprefix("torch.")),
            skip=("lm_head",) if skip is None else tuple(skip),
        )
        if given:
            raise ValueError(f"unknown keys in a bitsandbytes config: {sorted(given)}")
        return found
