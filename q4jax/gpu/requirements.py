"""The requirements of the GPU kernels: Pallas's Triton backend, the GPU, rows of whole blocks."""

import functools
import importlib
from typing import Any

import jax

from q4jax.core.spec import QuantSpec

_MOST_BLOCKS = 2**31 - 2**13  # so that the numbers of the last program's blocks are below 2^31


@functools.cache
def triton(implementation: str = "pallas") -> Any:
    """Return the module `jax.experimental.pallas.triton`.

    Args:
      implementation: which one asks, for the error.

    Raises:
      NotImplementedError: this jax has none.
    """
    try:
        return importlib.import_module("jax.experimental.pallas.triton")
    except ImportError:
        raise NotImplementedError(
            f"implementation={implementation!r} needs Pallas's Triton backend, which jax "
            f"{jax.__version__} does not have; 'xla' and None work"
        ) from None


def check_rows(implementation: str, spec: QuantSpec) -> None:
    """Raise NotImplementedError where blocks cross rows."""
    if not spec.in_rows:
        raise NotImplementedError(
            f"implementation={implementation!r} needs rows that are whole blocks; the last axis of "
            f"{spec.shape} is not a multiple of blocksize {spec.blocksize}"
        )


def check_size(implementation: str, blocks: int) -> None:
    """Raise NotImplementedError where the kernels could not number a weight's blocks."""
    if blocks > _MOST_BLOCKS:
        raise NotImplementedError(
            f"implementation={implementation!r} serves weights of at most {_MOST_BLOCKS} blocks, "
            f"which it numbers in 32 bits; this one has {blocks}; 'xla' and None work"
        )


def check_devices(implementation: str = "pallas") -> None:
    """Raise NotImplementedError where a visible GPU is older than Ampere (sm_80).

    Args:
      implementation: which one asks, for the error.
    """
    for device in jax.devices():
        capability = getattr(device, "compute_capability", None)
        if device.platform != "gpu" or not isinstance(capability, str):
            continue
        major, _, minor = capability.partition(".")
        if major.isdigit() and int(major) < 8:
            raise NotImplementedError(
                f"implementation={implementation!r} needs compute capability 8.0 (Ampere) or "
                f"newer; {device.device_kind} has {major}.{minor}; 'xla' and None work"
            )
