"""Configuration of the Llama family, from and to Hugging Face's `config.json`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from q4jax.models.llama import config_values as values
from q4jax.models.llama.architectures import ARCHITECTURES, Architecture
from q4jax.models.llama.rope_scaling import RopeScaling

MODEL_TYPES = tuple(ARCHITECTURES)
_MAX_LAYERS = 10_000
FULL, SLIDING = "full_attention", "sliding_attention"

# Entries of config.json that are supported at these values only.
_FIXED = {
    "hidden_act": ("silu", "swish"),
    "pretraining_tp": (1, None),
    "partial_rotary_factor": (1.0,),
}
_REQUIRED: tuple[str, ...] = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """Sizes of a mixture of experts that replaces the MLP of every layer.

    Attributes:
      num_experts: number of experts.
      num_experts_per_tok: number of experts that compute each token.
      intermediate_size: inner width of an expert.
      shared_intermediate_size: inner width of the gated expert that computes every token; None:
        there is no shared expert.
      norm_topk_prob: whether the weights of a token's experts are normalized to sum to 1.

    Raises:
      ValueError: `num_experts_per_tok` exceeds `num_experts`.
    """

    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    shared_intermediate_size: int | None = None
    norm_topk_prob: bool = False

    def __post_init__(self) -> None:
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} is more than "
                f"num_experts={self.num_experts}"
            )


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Configuration of a decoder of the Llama family, with Hugging Face's names and defaults.

    Attributes:
      attention_bias: whether all four attention projections have biases.
      qkv_bias: whether queries, keys and values alone have biases.
      qk_norm: whether queries and keys are normalized in each head.
      sliding_window: number of tokens, itself included, that a token attends to; None: unlimited.
      layer_types: "sliding_attention" or "full_attention" for each layer; None: all layers slide if
        there is a window.
      experts: sizes of the mixture of experts; None: each layer has one MLP.
      model_type: Hugging Face's name of the architecture.

    Raises:
      ValueError: the numbers of heads do not divide, `head_dim` is odd, or `layer_types` does not
        match the other fields.
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
    qkv_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None
    experts: ExpertsConfig | None = None
    model_type: str = "llama"

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim < 1 or self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary embeddings pair it up")
        types = self.layer_types
        if types is None:
            return
        if len(types) != self.num_hidden_layers or set(types) - {FULL, SLIDING}:
            raise ValueError(
                f"layer_types must be {self.num_hidden_layers} times {FULL!r} or {SLIDING!r}, "
                f"got {types}"
            )
        if SLIDING in types and self.sliding_window is None:
            raise ValueError(f"layer_types has {SLIDING!r}, but sliding_window is None")

    @property
    def windowed(self) -> tuple[bool, ...]:
        """Whether each layer uses the sliding window."""
        if self.layer_types is None:
            return (self.sliding_window is not None,) * self.num_hidden_layers
        return tuple(layer_type == SLIDING for layer_type in self.layer_types)

    @property
    def context_length(self) -> int:
        """Length of the longest text, with rotary scaling."""
        scaling = self.rope_scaling
        if scaling is None or scaling.rope_type == "llama3":
            return self.max_position_embeddings
        if scaling.rope_type == "yarn":
            stretched = scaling.factor * scaling.original_max_position_embeddings
        else:
            stretched = scaling.factor * self.max_position_embeddings
        return max(self.max_position_embeddings, int(stretched))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """Parse a `config.json` of transformers 4 or 5.

        Raises:
          NotImplementedError: the `model_type` or a feature is not supported.
          ValueError: a size is missing, or sizes contradict each other.
        """
        model_type = config.get("model_type")
        if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
            raise NotImplementedError(
                f"model_type {model_type!r}: q4jax.models implements {', '.join(MODEL_TYPES)}"
            )
        architecture = ARCHITECTURES[model_type]
        # transformers 4 has rope_theta outside of the dict.
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(rope, Mapping):
            raise ValueError(f"rope_parameters must be an object, got {rope!r}")
        for key, allowed in _FIXED.items():
            _require(key, config.get(key, rope.get(key, allowed[0])), allowed)
        missing = [name for name in _REQUIRED if config.get(name) is None]
        if missing:
            raise ValueError(f"config.json of a {model_type} lacks {missing}")

        given = {key: value for key, value in config.items() if value is not None}
        found = {**architecture.defaults, **given}
        flags = {"attention_bias", "mlp_bias", "qkv_bias", "qk_norm"} - {*architecture.biases}
        fields: dict[str, Any] = {"model_type": model_type, **architecture.always}
        for field in dataclasses.fields(cls):
            if field.type in values.CHECKS and field.name in found and field.name not in flags:
                fields[field.name] = values.CHECKS[field.type](field.name, found[field.name])
        heads = fields["num_attention_heads"]
        fields.setdefault("num_key_value_heads", heads)
        if "num_key_value_heads" in config and config["num_key_value_heads"] is None:
            fields["num_key_value_heads"] = heads
        fields.setdefault("head_dim", fields["hidden_size"] // heads)
        theta = rope.get("rope_theta", found.get("rope_theta", 10000.0))
        fields["rope_theta"] = values.number("rope_theta", theta)
        fields["rope_scaling"] = RopeScaling.from_hf(rope)
        fields["experts"] = _experts(architecture, config, found)
        return cls(**fields, **_windows(architecture, config, found))

    def to_hf(self) -> dict[str, Any]:
        """Return the `config.json` of transformers 5 that `from_hf` reads, without `dtype`.

        Raises:
          ValueError: the `model_type` has no entries for some fields; the message names them.
        """
        architecture = ARCHITECTURES[self.model_type]
        entries = dataclasses.asdict(self)
        for name in ("rope_scaling", "rope_theta", "experts", "layer_types", "qk_norm"):
            del entries[name]
        for name in {"attention_bias", "mlp_bias", "qkv_bias"} - {*architecture.biases}:
            del entries[name]
        scaling = {"rope_type": "default"} if not self.rope_scaling else self.rope_scaling.to_hf()
        if architecture.windows.switched:
            entries["use_sliding_window"] = self.sliding_window is not None
        if architecture.windows.selects is not None:
            entries["layer_types"] = [SLIDING if slides else FULL for slides in self.windowed]
        if self.experts is not None:
            values_of = dataclasses.asdict(self.experts)
            given = {name: values_of[field] for field, name in architecture.experts.items()}
            entries |= {name: value for name, value in given.items() if value is not None}
        entries |= {
            "architectures": [architecture.name],
            "hidden_act": "silu",
            "rope_parameters": {"rope_theta": self.rope_theta, **scaling},
        }
        read = LlamaConfig.from_hf(entries)
        lost = [f.name for f in dataclasses.fields(self) if _differ(self, read, f.name)]
        if lost:
            raise ValueError(
                f"a config.json of model_type {self.model_type!r} cannot describe {lost}"
            )
        return entries


def _differ(one: LlamaConfig, other: LlamaConfig, field: str) -> bool:
    # layer_types None and a full list may mean the same.
    field = "windowed" if field == "layer_types" else field
    return getattr(one, field) != getattr(other, field)


def _require(key: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise NotImplementedError(f"{key}={value!r}: q4jax implements {key}={allowed[0]!r}")


def _experts(
    architecture: Architecture, config: Mapping[str, Any], found: Mapping[str, Any]
) -> ExpertsConfig | None:
    """Return the experts of a `config.json`; NotImplementedError if some layers have none."""
    if not architecture.experts:
        return None
    # transformers accepts the number under either name.
    names = ("num_local_experts", "num_experts")
    given = {name: config[name] for name in names if config.get(name) is not None}
    if any(value != next(iter(given.values())) for value in given.values()):
        raise ValueError(f"config.json contradicts itself: {given}")
    number = architecture.experts["num_experts"]
    count = next(iter(given.values()), architecture.defaults[number])
    _require("mlp_only_layers", found.get("mlp_only_layers", []), ([],))
    _require("decoder_sparse_step", found.get("decoder_sparse_step", 1), (1,))
    width = architecture.experts["intermediate_size"]
    shared = architecture.experts.get("shared_intermediate_size", "")
    return ExpertsConfig(
        values.size(number, count),
        values.size("num_experts_per_tok", found["num_experts_per_tok"]),
        values.size(width, found[width]),
        values.size(shared, found[shared]) if shared in found else None,
        values.flag("norm_topk_prob", found.get("norm_topk_prob", False)),
    )


def _windows(
    architecture: Architecture, config: Mapping[str, Any], found: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the fields `sliding_window` and `layer_types` of a `LlamaConfig`."""
    layers = values.size("num_hidden_layers", found["num_hidden_layers"])
    if layers > _MAX_LAYERS:  # checked before a list of this length is built
        raise ValueError(f"num_hidden_layers must be at most {_MAX_LAYERS}, got {layers}")
    rule = architecture.windows
    window = config.get("sliding_window", architecture.defaults.get("sliding_window"))
    if not rule.allowed:
        _require("sliding_window", window, (None,))
    if rule.switched and not values.flag(
        "use_sliding_window", found.get("use_sliding_window", False)
    ):
        window = None
    if window is not None:
        window = values.size("sliding_window", window)
    types = [FULL if window is None else SLIDING] * layers
    if rule.selects is None:
        _require("layer_types", found.get("layer_types", types), (types,))
    else:
        if window is not None:
            first = found["max_window_layers"]
            if type(first) is not int:
                raise ValueError(f"max_window_layers must be an integer, got {first!r}")
            types = [SLIDING if rule.selects(layer, first) else FULL for layer in range(layers)]
        types = found.get("layer_types", types)
        if not isinstance(types, list) or not all(isinstance(name, str) for name in types):
            raise ValueError(f"layer_types must be a list of texts, got {types!r}")
    if all(name == FULL for name in types):
        return {"sliding_window": None}
    if all(name == SLIDING for name in types):
        return {"sliding_window": window}
    return {"sliding_window": window, "layer_types": tuple(types)}
