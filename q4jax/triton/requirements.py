"""Whether jax-triton is installed and works."""

import functools
import importlib.metadata
import importlib.util
import re
import sys

import jax

from q4jax.gpu.requirements import check_devices

_FIRST_WITH_JAX_0_12 = (0, 4, 2)
"""Versions of jax-triton before this fail under `jit` in jax 0.12."""


def check() -> None:
    """Raise NotImplementedError, with the reason, where no Triton kernel can be compiled."""
    if reason := _missing():
        raise NotImplementedError(
            f"implementation='triton' {reason}; 'pallas', 'xla' and None do without"
        )
    check_devices("triton")


@functools.cache
def _missing() -> str:
    """Return the missing requirement, or an empty text, without importing jax-triton."""
    if sys.version_info < (3, 12):
        return f"needs jax-triton, which needs Python 3.12; this is {sys.version.split()[0]}"
    try:
        found = importlib.metadata.version("jax-triton")
    except importlib.metadata.PackageNotFoundError:
        return "needs jax-triton, which is not installed (pip install 'q4jax[triton]')"
    if importlib.util.find_spec("triton") is None:
        return "needs triton, which is not installed (pip install 'q4jax[triton]')"
    if _numbers(jax.__version__) < (0, 11):
        return f"needs jax-triton, which needs jax 0.11; this is {jax.__version__}"
    if _numbers(jax.__version__) >= (0, 12) and _numbers(found) < _FIRST_WITH_JAX_0_12:
        return f"needs jax-triton, whose version {found} does not work under jax {jax.__version__}"
    return ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])
