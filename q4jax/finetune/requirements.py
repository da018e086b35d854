"""Optional packages, which are imported at first use."""

import importlib
from typing import Any

from q4jax.finetune.settings import SettingsError


def require(module: str, extra: str, reason: str) -> Any:
    """Import an optional package; SettingsError that names q4jax's extra if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise SettingsError(
            f"{reason}: {package} is not installed; pip install 'q4jax[{extra}]'"
        ) from None
