"""The `quantization_config` of a `config.json`, read and written."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from q4jax.convert.config import QuantConfig
from q4jax.interop.huggingface.linear_layers import skip_list
from q4jax.ops.params import Params4bit


def read_quantization(config: Mapping[str, Any], path: Path) -> QuantConfig | None:
    """Return how a directory is quantized, or None if it is in full precision.

    Args:
      config: the content of `config.json`.
      path: its path, for error messages.

    Raises:
      NotImplementedError: the method is not bitsandbytes' 4 bits; the message names it.
      ValueError: the entry is malformed.
    """
    entry = config.get("quantization_config")
    if entry is None:
        return None
    if not isinstance(entry, dict):
        raise ValueError(f"{path}: quantization_config must be an object, got {entry!r}")
    method = entry.get("quant_method", "bitsandbytes")
    if method != "bitsandbytes":
        raise NotImplementedError(
            f"{path} is quantized already (quant_method={method!r}); q4jax reads bitsandbytes' "
            "4-bit checkpoints and those in full precision"
        )
    if entry.get("load_in_8bit") or entry.get("_load_in_8bit"):
        raise NotImplementedError(f"{path} is LLM.int8 (load_in_8bit), which is not supported")
    skip = entry.get("llm_int8_skip_modules")
    named = isinstance(skip, list) and all(isinstance(name, str) for name in skip)
    if skip is not None and not named:
        raise ValueError(f"{path}: llm_int8_skip_modules must be a list of names, got {skip!r}")
    try:
        return QuantConfig.from_bnb_config(entry)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def bnb_config(
    flat: Mapping[str, Any],
    quant_storage: str,
    compute_dtype: str | None,
    config: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any] | None:
    """Return the `quantization_config` that describes weights; None if none is 4-bit.

    Args:
      flat: `Params4bit` or array by name.
      quant_storage: dtype that holds the codes in the files.
      compute_dtype: `bnb_4bit_compute_dtype`; None: the dtype before quantization.
      config: the content of `config.json`, whose `model_type` says which weights are those of
        linear layers. Without a type that is known, names and shapes say it (`is_linear`).

    Raises:
      ValueError: the 4-bit weights differ in quant type or in double quantization.
    """
    quantized = {n: w.quant_state.spec for n, w in flat.items() if isinstance(w, Params4bit)}
    # (quant_type, double quantization) -> name of the first weight that has both
    formats = {(spec.quant_type, spec.nested): name for name, spec in reversed(quantized.items())}
    if not formats:
        return None
    if len(formats) > 1:
        raise ValueError(f"one quantization_config cannot describe all of {formats}")
    ((quant_type, nested),) = formats
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": nested,
        "bnb_4bit_compute_dtype": compute_dtype or next(iter(quantized.values())).dtype.name,
        "bnb_4bit_quant_storage": quant_storage,
        "llm_int8_skip_modules": skip_list(config, flat),
        "llm_int8_threshold": 6.0,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
    }
