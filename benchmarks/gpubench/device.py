"""What the measurements were made with: the GPU, its caches, versions."""

import ctypes
import datetime
import importlib.metadata
import platform
import re

import jax

_PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "jax-triton", "triton")
_ATTRIBUTES = {"multiprocessors": 16, "l2_bytes": 38, "clock_khz": 13, "memory_clock_khz": 36}
_L2_UNKNOWN = 128 * 2**20


def gpu():
    """The first GPU, or None."""
    try:
        return jax.devices("gpu")[0]
    except RuntimeError:
        return None


def describe(device):
    """A record of the device and the software; `l2_bytes` is a safe guess where it is not told."""
    about = {
        "date": datetime.date.today().isoformat(),
        "device": device.device_kind,
        "compute_capability": getattr(device, "compute_capability", None),
        "python": platform.python_version(),
        "versions": versions(_PACKAGES),
        "l2_bytes": _L2_UNKNOWN,
    }
    if device.platform == "gpu":
        about |= _driver(device.local_hardware_id or 0)
    return about


def versions(packages):
    """Those that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def folder_name(device):
    """`NVIDIA H200` -> `nvidia-h200`."""
    return re.sub("[^a-z0-9]+", "-", device.device_kind.lower()).strip("-")


def _driver(ordinal):
    """What the CUDA driver tells and jax does not; nothing where it cannot be asked."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        version, handle = ctypes.c_int(), ctypes.c_int()
        if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(handle), ordinal):
            return {}
        cuda.cuDriverGetVersion(ctypes.byref(version))
        found = {"driver_cuda": f"{version.value // 1000}.{version.value % 1000 // 10}"}
        for name, attribute in _ATTRIBUTES.items():
            value = ctypes.c_int()
            if not cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, handle):
                found[name] = value.value
        if not found.get("l2_bytes"):
            found.pop("l2_bytes", None)
        return found
    except (OSError, AttributeError):
        return {}
