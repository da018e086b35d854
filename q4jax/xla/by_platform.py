"""Choose between forms of an operation when a program is lowered for a platform."""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

from jax import lax


@functools.cache
def can_compile_for_tpu() -> bool:
    """Return whether this process has the TPU compiler."""
    return importlib.util.find_spec("libtpu") is not None


def by_platform(
    *operands: Any, tpu: Callable[..., Any], default: Callable[..., Any], **others: Any
) -> Any:
    """Call the form of the platform that the program is lowered for, as `lax.platform_dependent`.

    JAX traces every form. Without libtpu nothing is compiled for TPUs, so theirs is left out; a
    program that is exported for TPUs from such a process has the default form.

    Args:
      *operands: the arguments of each form.
      tpu: the form for TPUs.
      default: the form for all others.
      **others: forms for other platforms by name.
    """
    forms = others | ({"tpu": tpu} if can_compile_for_tpu() else {})
    if not forms:
        return default(*operands)
    return lax.platform_dependent(*operands, default=default, **forms)
