"""Hugging Face's scaling of rotary embeddings to longer contexts."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from q4jax.models.decoder import config_values as values

# Required and optional entries of each rope type.
_REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
    "proportional": (),
}
_OPTIONAL: dict[str, tuple[str, ...]] = {
    "yarn": ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("factor", "attention_factor"),
    "proportional": ("factor", "partial_rotary_factor"),
}
# Other names: those of sections of three axes, which are one for text, and of an older release.
_ALIASES = {"mrope": "default", "su": "longrope"}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Scaling of rotary frequencies to a longer context.

    `rope_type` is one of

    - `"linear"`: all frequencies are divided by `factor`;
    - `"dynamic"`: the base grows with sequences longer than `max_position_embeddings`;
    - `"llama3"`: low frequencies are divided, high ones kept, and those between blended;
    - `"yarn"`: as llama3 with other bounds, and queries and keys are scaled by `attention_factor`;
    - `"longrope"`: each frequency is divided by its entry of `short_factor`, or of `long_factor` in
      texts longer than `original_max_position_embeddings`;
    - `"proportional"`: only the share `partial_rotary_factor` of the pairs turns.

    Fields that a type does not use keep their defaults. If `attention_factor` is None, it follows
    from `factor`, or from `mscale` and `mscale_all_dim`, as in transformers.

    Raises:
      ValueError: `high_freq_factor` is not above `low_freq_factor`.
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
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    partial_rotary_factor: float = 1.0

    def __post_init__(self) -> None:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor={self.high_freq_factor} must be above "
                f"low_freq_factor={self.low_freq_factor}"
            )

    def check(self, rope_theta: float, head_dim: int) -> None:
        """Raise ValueError for a base or width whose scaled frequencies are not finite."""
        if self.rope_type == "yarn" and rope_theta <= 1:
            raise ValueError(f"rope_theta={rope_theta} must be above 1 with rope_type 'yarn'")
        if self.rope_type == "dynamic" and head_dim == 2:
            raise ValueError("head_dim=2 must be above 2 with rope_type 'dynamic'")
        for name in ("short_factor", "long_factor") if self.rope_type == "longrope" else ():
            if len(getattr(self, name)) != head_dim // 2:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries, but heads have "
                    f"{head_dim // 2} rotated pairs"
                )

    @classmethod
    def from_hf(cls, rope: Mapping[str, Any], context: int = 0) -> "RopeScaling | None":
        """Parse `rope_scaling` or `rope_parameters`; return None for unscaled embeddings.

        Args:
          rope: the entries.
          context: `max_position_embeddings`, from which the factor of longrope follows.

        Raises:
          NotImplementedError: the rope type is not one of the class.
          ValueError: a required entry is missing, or a value is malformed.
        """
        rope_type = str(rope.get("rope_type", rope.get("type", "default")))
        rope_type = _ALIASES.get(rope_type, rope_type)
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
            name: _checked(name, rope[name], types[name])
            for name in (*_REQUIRED[rope_type], *optional)
        }
        if rope_type == "longrope":
            given.setdefault("factor", context / given["original_max_position_embeddings"])
        return cls(rope_type, **{"factor": 1.0, **given})

    def to_hf(self) -> dict[str, Any]:
        """Return the entries that `from_hf` reads."""
        names = (*_REQUIRED[self.rope_type], *_OPTIONAL.get(self.rope_type, ()))
        found = {name: getattr(self, name) for name in names}
        given = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in found.items()
            if value is not None
        }
        return {"rope_type": self.rope_type, **given}

    @property
    def scale(self) -> float:
        """Factor of queries and keys."""
        if self.rope_type not in ("yarn", "longrope"):
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.rope_type == "longrope":
            growth = math.log(self.factor) / math.log(self.original_max_position_embeddings)
            return 1.0 if self.factor <= 1 else math.sqrt(1 + growth)
        if self.mscale and self.mscale_all_dim:
            return self._magnitude(self.mscale) / self._magnitude(self.mscale_all_dim)
        return self._magnitude(1.0)

    @property
    def latent_scale(self) -> float:
        """Factor of the queries and keys of latent attention."""
        return self._magnitude(self.mscale_all_dim) if self.mscale_all_dim else 1.0

    def _magnitude(self, mscale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0


def _checked(name: str, value: Any, kind: Any) -> Any:
    if name in ("short_factor", "long_factor"):
        if not isinstance(value, list | tuple):
            raise ValueError(f"{name} must be a list of numbers, got {value!r}")
        return tuple(values.number(name, number) for number in value)
    return values.CHECKS.get(kind, values.number)(name, value)
