"""The sizes and constants of a Llama model, read from a Hugging Face `config.json`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

MODEL_TYPES = ("llama",)

# What Llama would compute differently if these were set: the only values that this model
# implements.
_ONLY = {
    "hidden_act": ("silu", "swish"),
    "pretraining_tp": (1,),
    "partial_rotary_factor": (1.0,),
    "sliding_window": (None,),
}
_REQUIRED: tuple[str, ...] = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
# The largest size of anything: what int32 indices reach.
_LARGEST = 2**31 - 1
_MAX_NUMBER = 1e30


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched to a longer context.

    `rope_type` is `"linear"` (divide by `factor`) or `"llama3"` (divide the low
    frequencies, keep the high ones, blend between; the three last fields are used by it alone).
    """

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    @classmethod
    def from_hf(cls, rope: Mapping[str, Any]) -> "RopeScaling | None":
        """Reads `rope_scaling` or `rope_parameters`; None for plain rotary embeddings.

        Raises:
          NotImplementedError: the rope type is not `default`, `linear` or `llama3`.
          ValueError: a value that the rope type needs is missing.
        """
        kind = str(rope.get("rope_type", rope.get("type", "default")))
        needed = {
            "default": (),
            "linear": ("factor",),
            "llama3": tuple(f.name for f in dataclasses.fields(cls) if f.name != "rope_type"),
        }
        if kind not in needed:
            raise NotImplementedError(f"rope_type {kind!r}: q4jax implements {sorted(needed)}")
        missing = [name for name in needed[kind] if name not in rope]
        if missing:
            raise ValueError(f"rope_type {kind!r} needs {missing}, got {dict(rope)}")
        if kind == "default":
            return None
        checks: dict[str, Any] = {
            f.name: _size if f.type is int else _number for f in dataclasses.fields(cls)
        }
        return cls(kind, **{name: checks[name](name, rope[name]) for name in needed[kind]})


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """A decoder-only Llama; the fields are Hugging Face's, with its defaults.

    Raises:
      ValueError: heads that do not divide, or an odd `head_dim`.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is no multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary embeddings pair it up")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """Reads the dict of a `config.json`, as written by transformers 4 or 5.

        Raises:
          NotImplementedError: another `model_type`, or a feature that this model does not have.
          ValueError: a size is missing, or sizes do not fit together.
        """
        model_type = config.get("model_type")
        if model_type not in MODEL_TYPES:
            raise NotImplementedError(
                f"model_type {model_type!r}: q4jax.models implements {', '.join(MODEL_TYPES)}"
            )
        # transformers 5 keeps all that concerns rope in one dict; 4 had rope_theta beside it.
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(rope, Mapping):
            raise ValueError(f"rope_parameters must be an object, got {rope!r}")
        for key, allowed in _ONLY.items():
            value = config.get(key, rope.get(key, allowed[0]))
            if value not in allowed:
                raise NotImplementedError(f"{key}={value!r}: q4jax implements {key}={allowed[0]!r}")
        missing = [name for name in _REQUIRED if config.get(name) is None]
        if missing:
            raise ValueError(f"config.json of a llama lacks {missing}")

        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            if config.get(field.name) is not None and field.type in _CHECKS:
                values[field.name] = _CHECKS[field.type](field.name, config[field.name])
        heads = values["num_attention_heads"]
        values.setdefault("num_key_value_heads", heads)
        values.setdefault("head_dim", values["hidden_size"] // heads)
        theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
        values["rope_theta"] = _number("rope_theta", theta)
        values["rope_scaling"] = RopeScaling.from_hf(rope)
        return cls(**values)

    def to_hf(self) -> dict[str, Any]:
        """The dict that `from_hf` reads, as transformers 5 writes it (without `dtype`)."""
        values = dataclasses.asdict(self)
        scaling = values.pop("rope_scaling") or {"rope_type": "default"}
        if scaling["rope_type"] == "linear":
            scaling = {"rope_type": "linear", "factor": scaling["factor"]}
        return values | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "rope_parameters": {"rope_theta": values.pop("rope_theta"), **scaling},
        }


def _size(name: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= _LARGEST:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return value


def _number(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value <= _MAX_NUMBER:
        raise ValueError(f"{name} must be a positive number, got {value!r}")
    return float(value)


def _flag(name: str, value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return value


_CHECKS: Mapping[Any, Any] = {int: _size, float: _number, bool: _flag}
