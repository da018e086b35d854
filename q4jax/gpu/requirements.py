"""The requirements of the GPU kernels: Pallas's Triton backend, the GPU, rows of whole blocks."""

import functools
import importlib
from collections.abc import Callable
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


def check_devices(
    implementation: str = "pallas",
    serves: Callable[[int], bool] = lambda major: major >= 8,
    needs: str = "8.0 (Ampere) or newer",
) -> None:
    """Raise NotImplementedError where a visible GPU is not one that an implementation serves.

    Args:
      implementation: which one asks, for the error.
      serves: whether it does, by the first number of a GPU's compute capability.
      needs: what it serves, for the error.
    """
    for device in jax.devices():
        capability = getattr(device, "compute_capability", None)
        if device.platform != "gpu" or not isinstance(capability, str):
            continue
        major = capability.partition(".")[0]
        if major.isdigit() and not serves(int(major)):
            raise NotImplementedError(
                f"implementation={implementation!r} needs compute capability {needs}; "
                f"{device.device_kind} has {capability}; 'xla' and None work"
            )
