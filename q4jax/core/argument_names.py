"""`name_ours`: errors that give q4jax's name for an argument known by another name elsewhere."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

OURS = {
    # PyTorch and bitsandbytes
    "bias": ("use_bias",),
    "compute_dtype": ("dtype",),
    "torch_dtype": ("dtype",),
    "input_features": ("in_features",),
    "output_features": ("out_features",),
    "embedding_dim": ("features",),
    "quant_state": ("state",),
    "block_size": ("blocksize",),
    "double_quant": ("compress_statistics",),
    # transformers
    "quantization_config": ("quantization", "config"),
    "bnb_4bit_quant_type": ("quant_type",),
    "bnb_4bit_compute_dtype": ("dtype",),
    "bnb_4bit_use_double_quant": ("compress_statistics",),
    "bnb_4bit_blocksize": ("blocksize",),
    "llm_int8_skip_modules": ("skip",),
    # PEFT
    "r": ("rank",),
    "lora_alpha": ("alpha",),
    "lora_dropout": ("dropout",),
    "use_rslora": ("rslora",),
    "use_dora": ("dora",),
    "target_modules": ("targets",),
}
"""A name elsewhere -> the names that q4jax's functions have for it."""

NEEDLESS = {
    "load_in_4bit": "q4jax quantizes to 4 bits only",
    "load_in_8bit": "q4jax quantizes to 4 bits only",
    "quant_storage": "codes in memory are uint8",
    "bnb_4bit_quant_storage": "codes in memory are uint8",
    "device": "results lie where their inputs do",
    "device_map": "mesh= or sharding= place a model",
    "out": "JAX's arrays cannot be written to",
    "task_type": "an adapter serves every task",
}
"""A name elsewhere that has no counterpart -> the reason."""


def name_ours(function: F) -> F:
    """Decorate a function, or a class for its constructor, to name its own argument in errors.

    A call by a name of PyTorch, bitsandbytes, transformers or PEFT that the function does not have
    is a TypeError that says which argument it is here. Other names are Python's own error.

    Examples:
      >>> import q4jax
      >>> q4jax.QuantConfig(bnb_4bit_quant_type="nf4")
      Traceback (most recent call last):
      TypeError: QuantConfig has no argument 'bnb_4bit_quant_type'; here it is 'quant_type'
    """
    if isinstance(function, type):
        function.__init__ = name_ours(function.__init__)  # type: ignore[misc]
        return function

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for name in kwargs:
            if name in OURS or name in NEEDLESS:
                _check(function, name)
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]


def _check(function: Callable[..., Any], name: str) -> None:
    own = inspect.signature(function).parameters
    if name in own:
        return
    called = function.__qualname__.removesuffix(".__init__")
    ours = [candidate for candidate in OURS.get(name, ()) if candidate in own]
    if ours or (name in OURS and any(p.kind is p.VAR_KEYWORD for p in own.values())):
        here = (ours or OURS[name])[0]
        raise TypeError(f"{called} has no argument {name!r}; here it is {here!r}")
    if name in NEEDLESS:
        raise TypeError(f"{called} has no argument {name!r}; leave it out: {NEEDLESS[name]}")
