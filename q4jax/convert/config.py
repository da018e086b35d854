"""`QuantConfig`: how a model is quantized."""

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jax.typing import DTypeLike

from q4jax.core.argument_names import name_ours
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

# The end of a module's name in a dotted path; transformers takes a pattern that ends in a dot too.
_MODULE_END = r"(?:(?<=\.)|(?=\.)|\Z)"
HEAD = "lm_head"
_SHOWN = 8


@name_ours
@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """Which layers of a model become 4-bit, and how.

    Attributes:
      quant_type: "nf4" or "fp4".
      blocksize: 32, 64, 128, 256, 512, 1024, 2048 or 4096.
      compress_statistics: double quantization of the scales.
      dtype: compute dtype of the new layers; None: that of the layer each replaces.
      skip: modules to leave alone, with everything under them. An entry is a name or dotted path,
        wherever it stands in the module's path: "lm_head", "layers.mlp". Or it is what transformers
        takes in `llm_int8_skip_modules`: a regular expression for the beginning of the path, up to
        the end of a name ("model.layers.0.mlp", "model.layers.*.self_attn"), or the end of the path
        of a module that holds parameters ("down_proj"). An entry that matches no such module of a
        model is an error, but for "lm_head", which models with tied embeddings do not have.

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
    skip: tuple[str, ...] = (HEAD,)

    def __post_init__(self):
        check_quant_type(self.quant_type)
        check_blocksize(self.blocksize)
        if self.dtype is not None:
            float_dtype(self.dtype)
        object.__setattr__(self, "skip", _entries("skip", self.skip))

    def skips(self, path: str) -> str | None:
        """Return the entry of `skip` that excludes the module at this dotted path, or None."""
        return next((entry for entry in self.skip if _excludes(entry, path)), None)

    def require_skips(self, paths: Iterable[str]) -> None:
        """Raise ValueError where an entry of `skip` keeps none of a model's parameters.

        Args:
          paths: dotted paths of the modules that hold parameters, and of no others: an entry that
            is only the end of a parent's path ("lp" for "layers.mlp") keeps nothing in it.

        Raises:
          ValueError: an entry other than "lm_head" matches none of the paths.
        """
        found = list(dict.fromkeys(paths))
        idle = [
            entry
            for entry in self.skip
            if entry != HEAD and not any(_excludes(entry, path) for path in found)
        ]
        if idle:
            raise ValueError(
                f"skip has {', '.join(map(repr, idle))}, which no module matches; the modules are: "
                f"{list_paths(found)}"
            )

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
            blocksize=given.pop("bnb_4bit_blocksize", 64),
            skip=(HEAD,) if skip is None else _entries("llm_int8_skip_modules", skip),
        )
        if given:
            raise ValueError(f"unknown keys in a bitsandbytes config: {sorted(given)}")
        return found


def module_paths(leaves: Iterable[Sequence[str]]) -> list[str]:
    """Return the dotted paths of the modules that hold leaves.

    >>> module_paths([("layers", "0", "kernel"), ("layers", "0", "bias")])
    ['layers.0']
    """
    return list(dict.fromkeys(".".join(leaf[:-1]) for leaf in leaves))


def list_paths(paths: Sequence[str]) -> str:
    """Return the first few paths of a model's modules, for an error."""
    shown = ", ".join(path or "(root)" for path in paths[:_SHOWN])
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return f"{shown or 'none'}{more}"


def _entries(name: str, given: Any) -> tuple[str, ...]:
    """Return the entries of a skip list; ValueError if one could match nothing or everything."""
    entries = None if isinstance(given, str | bytes) or not hasattr(given, "__iter__") else [*given]
    if entries is None or not all(isinstance(entry, str) for entry in entries):
        raise ValueError(f"{name} must be a tuple of names, got {given!r}")
    for entry in entries:
        _compile_entry(entry)
    return tuple(entries)


def _excludes(entry: str, path: str) -> bool:
    """Return whether an entry of a skip list names the module at a path, or one above it."""
    if f".{entry}." in f".{path}." or path.endswith(entry):
        return True
    return _compile_entry(entry).match(path) is not None


@functools.cache
def _compile_entry(entry: str) -> "re.Pattern[str]":
    if not entry:
        raise ValueError("skip has an empty name, which would match every module")
    try:
        return re.compile(f"(?:{entry}){_MODULE_END}")
    except re.error as error:
        raise ValueError(f"skip has {entry!r}, which is no regular expression: {error}") from None
