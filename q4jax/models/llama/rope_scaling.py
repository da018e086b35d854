"""How rotary embeddings are stretched to a longer context, as Hugging Face describes it."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from q4jax.models.llama import config_values as values

# What each rope type needs, and what it may have besides.
_NEEDED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": ("factor", "original_max_position_embeddings"),
}
_OPTIONAL: dict[str, tuple[str, ...]] = {
    "yarn": (
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched to a longer context.

    `rope_type` is one of

    - `"linear"`: all frequencies are divided by `factor`;
    - `"dynamic"`: the base grows with the sequence, once it is longer than
      `max_position_embeddings`;
    - `"llama3"`: low frequencies are divided, high ones kept, those between blended;
    - `"yarn"`: the same with other bounds, and queries and keys are scaled by `attention_factor`.

    Fields that a type does not use keep their defaults. `attention_factor` None: from `factor`, or
    from `mscale` and `mscale_all_dim`, as transformers does.
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
        """Reads `rope_scaling` or `rope_parameters`; None for plain rotary embeddings.

        Raises:
          NotImplementedError: another rope type than those of the class.
          ValueError: a value that the rope type needs is missing, or a value is malformed.
        """
        kind = str(rope.get("rope_type", rope.get("type", "default")))
        if kind not in _NEEDED:
            raise NotImplementedError(f"rope_type {kind!r}: q4jax implements {sorted(_NEEDED)}")
        missing = [name for name in _NEEDED[kind] if rope.get(name) is None]
        if missing:
            raise ValueError(f"rope_type {kind!r} needs {missing}, got {dict(rope)}")
        if kind == "default":
            return None
        optional = [name for name in _OPTIONAL.get(kind, ()) if rope.get(name) is not None]
        types = {field.name: field.type for field in dataclasses.fields(cls)}
        given = {
            name: values.CHECKS.get(types[name], values.number)(name, rope[name])
            for name in (*_NEEDED[kind], *optional)
        }
        return cls(kind, **given)

    def to_hf(self) -> dict[str, Any]:
        """The entries that `from_hf` reads."""
        names = (*_NEEDED[self.rope_type], *_OPTIONAL.get(self.rope_type, ()))
        found = {name: getattr(self, name) for name in names}
        given = {name: value for name, value in found.items() if value is not None}
        return {"rope_type": self.rope_type, **given}

    @property
    def scale(self) -> float:
        """What queries and keys are multiplied with."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._magnitude(self.mscale) / self._magnitude(self.mscale_all_dim)
        return self._magnitude(1.0)

    def _magnitude(self, mscale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0
