"""The sizes and constants of a model of the Llama family, read from a `config.json`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from q4jax.models.llama import config_values as values
from q4jax.models.llama.architectures import ARCHITECTURES, Architecture
from q4jax.models.llama.rope_scaling import RopeScaling

MODEL_TYPES = tuple(ARCHITECTURES)
_MAX_LAYERS = 10_000
FULL, SLIDING = "full_attention", "sliding_attention"

# What the family would compute differently if these were set: the only values that the model here
# implements.
_ONLY = {
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
    """The experts that stand in the place of each MLP.

    Attributes:
      num_experts: how many there are.
      num_experts_per_tok: how many of them compute a token.
      intermediate_size: inner width of an expert.
      shared_intermediate_size: inner width of the expert that computes every token, behind a gate
        of its own; None: there is none.
      norm_topk_prob: whether the weights of a token's experts sum to 1.

    Raises:
      ValueError: more experts a token than there are.
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
    """A decoder-only model of the Llama family; the fields are Hugging Face's, with its defaults.

    Attributes:
      attention_bias: biases on all four projections of the attention.
      qkv_bias: biases on queries, keys and values alone.
      qk_norm: queries and keys are normalized head by head.
      sliding_window: how many tokens, itself included, a token attends to; None: all before it.
      layer_types: "sliding_attention" or "full_attention" of each layer; None: the former
        everywhere, where there is a window.
      experts: None: each layer has one MLP.
      model_type: what Hugging Face calls the architecture.

    Raises:
      ValueError: heads that do not divide, an odd `head_dim`, or layer types that do not fit.
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
                f"num_attention_heads={self.num_attention_heads} is no multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim < 1 or self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary embeddings pair it up")
        kinds = self.layer_types
        if kinds is None:
            return
        if len(kinds) != self.num_hidden_layers or set(kinds) - {FULL, SLIDING}:
            raise ValueError(
                f"layer_types must be {self.num_hidden_layers} times {FULL!r} or {SLIDING!r}, "
                f"got {kinds}"
            )
        if SLIDING in kinds and self.sliding_window is None:
            raise ValueError(f"layer_types has {SLIDING!r}, but sliding_window is None")

    @property
    def windowed(self) -> tuple[bool, ...]:
        """Whether each layer attends within the sliding window only."""
        if self.layer_types is None:
            return (self.sliding_window is not None,) * self.num_hidden_layers
        return tuple(kind == SLIDING for kind in self.layer_types)

    @property
    def context_length(self) -> int:
        """The longest text: `max_position_embeddings`, or to where rotary scaling stretches it."""
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
        """Reads the dict of a `config.json`, as written by transformers 4 or 5.

        Raises:
          NotImplementedError: another `model_type`, or a feature that this model does not have.
          ValueError: a size is missing, or sizes do not fit together.
        """
        model_type = config.get("model_type")
        if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
            raise NotImplementedError(
                f"model_type {model_type!r}: q4jax.models implements {', '.join(MODEL_TYPES)}"
            )
        kind = ARCHITECTURES[model_type]
        # transformers 5 keeps all that concerns rope in one dict; 4 had rope_theta beside it.
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(rope, Mapping):
            raise ValueError(f"rope_parameters must be an object, got {rope!r}")
        for key, allowed in _ONLY.items():
            _require(key, config.get(key, rope.get(key, allowed[0])), allowed)
        missing = [name for name in _REQUIRED if config.get(name) is None]
        if missing:
            raise ValueError(f"config.json of a {model_type} lacks {missing}")

        given = {key: value for key, value in config.items() if value is not None}
        found = {**kind.defaults, **given}
        flags = {"attention_bias", "mlp_bias", "qkv_bias", "qk_norm"} - {*kind.biases}
        fields: dict[str, Any] = {"model_type": model_type, **kind.always}
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
        fields["experts"] = _experts(kind, config, found)
        return cls(**fields, **_windows(kind, config, found))

    def to_hf(self) -> dict[str, Any]:
        """The dict that `from_hf` reads, as transformers 5 writes it (without `dtype`).

        Raises:
          ValueError: fields that the `model_type` has no entry for; they are named.
        """
        kind = ARCHITECTURES[self.model_type]
        entries = dataclasses.asdict(self)
        for name in ("rope_scaling", "rope_theta", "experts", "layer_types", "qk_norm"):
            del entries[name]
        for name in {"attention_bias", "mlp_bias", "qkv_bias"} - {*kind.biases}:
            del entries[name]
        scaling = {"rope_type": "default"} if not self.rope_scaling else self.rope_scaling.to_hf()
        if kind.windows in ("switched", "upper", "alternate"):
            entries["use_sliding_window"] = self.sliding_window is not None
        if kind.windows in ("upper", "alternate"):
            entries["layer_types"] = [SLIDING if slides else FULL for slides in self.windowed]
        if self.experts is not None and kind.experts is not None:
            block = self.experts
            entries[kind.experts] = block.num_experts
            entries["num_experts_per_tok"] = block.num_experts_per_tok
            if self.model_type != "mixtral":
                entries["moe_intermediate_size"] = block.intermediate_size
                entries["norm_topk_prob"] = block.norm_topk_prob
            if block.shared_intermediate_size is not None:
                entries["shared_expert_intermediate_size"] = block.shared_intermediate_size
        entries |= {
            "architectures": [kind.name],
            "hidden_act": "silu",
            "rope_parameters": {"rope_theta": self.rope_theta, **scaling},
        }
        read = LlamaConfig.from_hf(entries)
        lost = [f.name for f in dataclasses.fields(self) if _differ(self, read, f.name)]
        if lost:
            raise ValueError(f"a config.json of model_type {self.model_type!r} cannot say {lost}")
        return entries


def _differ(one: LlamaConfig, other: LlamaConfig, field: str) -> bool:
    # Two ways to say the same of every layer.
    field = "windowed" if field == "layer_types" else field
    return getattr(one, field) != getattr(other, field)


def _require(key: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise NotImplementedError(f"{key}={value!r}: q4jax implements {key}={allowed[0]!r}")


def _experts(
    kind: Architecture, config: Mapping[str, Any], found: Mapping[str, Any]
) -> ExpertsConfig | None:
    """The experts that a config asks for, which must stand in every layer."""
    if kind.experts is None:
        return None
    # transformers knows the number by either name.
    names = ("num_local_experts", "num_experts")
    given = {name: config[name] for name in names if config.get(name) is not None}
    if any(value != next(iter(given.values())) for value in given.values()):
        raise ValueError(f"config.json contradicts itself: {given}")
    count = next(iter(given.values()), kind.defaults[kind.experts])
    _require("mlp_only_layers", found.get("mlp_only_layers", []), ([],))
    _require("decoder_sparse_step", found.get("decoder_sparse_step", 1), (1,))
    width = "moe_intermediate_size" if "moe_intermediate_size" in found else "intermediate_size"
    shared = found.get("shared_expert_intermediate_size")
    name = "shared_expert_intermediate_size"
    return ExpertsConfig(
        values.size(kind.experts, count),
        values.size("num_experts_per_tok", found["num_experts_per_tok"]),
        values.size(width, found[width]),
        None if shared is None else values.size(name, shared),
        values.flag("norm_topk_prob", found.get("norm_topk_prob", False)),
    )


def _windows(
    kind: Architecture, config: Mapping[str, Any], found: Mapping[str, Any]
) -> dict[str, Any]:
    """`sliding_window` and `layer_types` of a `LlamaConfig`."""
    layers = values.size("num_hidden_layers", found["num_hidden_layers"])
    if layers > _MAX_LAYERS:  # before something is made for each
        raise ValueError(f"num_hidden_layers must be at most {_MAX_LAYERS}, got {layers}")
    window = config.get("sliding_window", kind.defaults.get("sliding_window"))
    if kind.windows == "none":
        _require("sliding_window", window, (None,))
    elif kind.windows != "all":
        switched = values.flag("use_sliding_window", found.get("use_sliding_window", False))
        window = window if switched else None
    if window is not None:
        window = values.size("sliding_window", window)
    kinds = [FULL if window is None else SLIDING] * layers
    if kind.windows in ("upper", "alternate"):
        if window is not None:
            first = found["max_window_layers"]
            if type(first) is not int:
                raise ValueError(f"max_window_layers must be an integer, got {first!r}")
            upper = kind.windows == "upper"
            slides = [i >= first if upper else i < first and not i % 2 for i in range(layers)]
            kinds = [SLIDING if slide else FULL for slide in slides]
        kinds = found.get("layer_types", kinds)
        if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
            raise ValueError(f"layer_types must be a list of texts, got {kinds!r}")
    else:
        _require("layer_types", found.get("layer_types", kinds), (kinds,))
    if all(kind == FULL for kind in kinds):
        return {"sliding_window": None}
    if all(kind == SLIDING for kind in kinds):
        return {"sliding_window": window}
    return {"sliding_window": window, "layer_types": tuple(kinds)}
