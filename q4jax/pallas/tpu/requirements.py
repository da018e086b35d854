"""The requirements of the TPU kernels: the chip, Pallas's operations for it, the dtype."""

import importlib
import re
from importlib import metadata
from typing import Any

import jax
import numpy as np

# Mosaic compiles no gather along sublanes for these: "not supported by this TPU generation".
_WITHOUT_GATHERS = ("TPU v2", "TPU v3", "TPU v4")
_OLDEST_LIBTPU = (0, 0, 42)  # with which the kernels were compiled
_NEEDED = (
    "CompilerParams",
    "InterpretParams",
    "PrefetchScalarGridSpec",
    "bitcast",
    "pack_elementwise",
)


def check_pallas(implementation: str) -> None:
    """Raise NotImplementedError where this jax's Pallas lacks an operation of the kernels.

    Args:
      implementation: which one asks, for the error.
    """
    try:
        module: Any = importlib.import_module("jax.experimental.pallas.tpu")
        missing = [name for name in _NEEDED if not hasattr(module, name)]
    except ImportError:
        missing = ["TPU backend"]
    if missing:
        raise NotImplementedError(
            f"implementation={implementation!r} needs {', '.join(missing)} of Pallas, which jax "
            f"{jax.__version__} does not have; 'xla' and None work"
        )


def check_libtpu(implementation: str) -> None:
    """Raise NotImplementedError where the libtpu that is installed is older than one that serves.

    A program may be compiled elsewhere, so that none has to be installed.
    """
    try:
        version = metadata.version("libtpu")
    except metadata.PackageNotFoundError:
        return
    if tuple(map(int, re.findall(r"\d+", version)[:3])) < _OLDEST_LIBTPU:
        oldest = ".".join(map(str, _OLDEST_LIBTPU))
        raise NotImplementedError(
            f"implementation={implementation!r} needs libtpu {oldest} or newer, not {version}; "
            f"'xla' and None work"
        )


def check_x64(implementation: str) -> None:
    """Raise NotImplementedError where integers are 64 bits wide, which no TPU register is."""
    if jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        raise NotImplementedError(
            f"implementation={implementation!r} does not serve jax_enable_x64=True on TPUs, whose "
            f"index maps have 32 bits; 'xla' and None work"
        )


def check_chip(implementation: str) -> None:
    """Raise NotImplementedError where a visible or targeted TPU has no gather along sublanes."""
    kinds = {device.device_kind for device in jax.devices() if device.platform == "tpu"}
    target = jax.sharding.get_abstract_mesh().abstract_device
    if target is not None and target.platform == "tpu":
        kinds = {target.device_kind}
    for kind in sorted(kinds):
        if kind.startswith(_WITHOUT_GATHERS):
            raise NotImplementedError(
                f"implementation={implementation!r} looks codes up by gathers along sublanes, "
                f"which {kind} does not have; TPU v5e and newer do; 'xla' and None work"
            )


def check_dtype(implementation: str, dtype: np.dtype[Any]) -> None:
    """Raise NotImplementedError for products in float16, which no TPU computes."""
    if dtype == np.float16:
        raise NotImplementedError(
            f"implementation={implementation!r} serves products in bfloat16 and float32 on TPUs, "
            f"which have no float16; 'xla' and None work"
        )
