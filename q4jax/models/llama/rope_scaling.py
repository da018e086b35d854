"""Hugging Face's scaling of rotary embeddings to longer contexts."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from q4jax.models.llama import config_values as values

# Required and optional entries of each rope type.
_REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
_OPTIONAL: dict[str, tuple[str, ...]] = {
    "yarn": ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Scaling of rotary frequencies to a longer context.

    `rope_type` is one of

    - `"linear"`: all frequencies are divided by `factor`;
    - `"dynamic"`: the base grows with sequences longer than `max_position_embeddings`;
    - `"llama3"`: low frequencies are divided, high ones kept, and those between blended;
    - `"yarn"`: as llama3 with other bounds, and queries and keys are scaled by `attention_factor`.

    Fields that a type does not use keep their defaults. If `attention_factor` is None, it follows
    from `factor`, or from `mscale` and `mscale_all_dim`, as in transformers.
    """

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    @classmethod
    def from_hf(cls, rope: Mapping[str, Any]) -> "RopeScaling | None":
        """Parse `rope_scaling` or `rope_parameters`; return None for unscaled embeddings.

        Raises:
          NotImplementedError: the rope type is not one of the class.
          ValueError: a required entry is missing, or a value is malformed.
        """
        rope_type = str(rope.get("rope_type", rope.get("type", "default")))
        if rope_type not in _REQUIRED:
            raise NotImplementedError(
                f"rope_type {rope_type!r}: q4jax implements {sorted(_REQUIRED)}"
            )
        missing = [name for name in _REQUIRED[rope_type] if rope.get(name) is None]
        if missing:
            raise ValueError(f"rope_type {rope_type!r} needs {missing}, got {dict(rope)}")
        if rope_type == "default":
            return None
        optional = [name for name in _OPTIONAL.get(rope_type, ()) if rope.get(name) is not None]
        types = {field.name: field.type for field in dataclasses.fields(cls)}
        given = {
            name: values.CHECKS.get(types[name], values.number)(name, rope[name])
            for name in (*_REQUIRED[rope_type], *optional)
        }
        return cls(rope_type, **given)

    def to_hf(self) -> dict[str, Any]:
        """Return the entries that `from_hf` reads."""
        names = (*_REQUIRED[self.rope_type], *_OPTIONAL.get(self.rope_type, ()))
        found = {name: getattr(self, name) for name in names}
        given = {name: value for name, value in found.items() if value is not None}
        return {"rope_type": self.rope_type, **given}

    @property
    def scale(self) -> float:
        """Factor of queries and keys."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._magnitude(self.mscale) / self._magnitude(self.mscale_all_dim)
        return self._magnitude(1.0)

    def _magnitude(self, mscale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0
