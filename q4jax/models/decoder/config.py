"""Configuration of a decoder, from and to Hugging Face's `config.json`."""

import contextlib
import dataclasses
import functools
import json
import logging
from collections.abc import Mapping
from typing import Any

from q4jax.models.decoder import config_values as values
from q4jax.models.decoder.architectures import ARCHITECTURES
from q4jax.models.decoder.describe import IRRELEVANT, describe
from q4jax.models.decoder.entries import FULL, SLIDING, Entries
from q4jax.models.decoder.experts_config import ExpertsConfig, read_experts
from q4jax.models.decoder.from_fields import from_fields
from q4jax.models.decoder.mixer_spec import Attention, LatentAttention
from q4jax.models.decoder.rope_scaling import RopeScaling
from q4jax.models.decoder.spec import Decoder
from q4jax.models.decoder.text_models import text_entries
from q4jax.models.decoder.windows import read_windows

_LOG = logging.getLogger("q4jax")
_UNLIMITED = 2**20  # tokens, where nothing limits positions

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
class LlamaConfig:
    """Configuration of a decoder, with Hugging Face's names and defaults.

    The fields describe the models of the Llama family whole: llama, mistral, qwen2, qwen3, mixtral,
    qwen2_moe and qwen3_moe. Of other families `from_hf` makes a configuration, whose fields are
    their common sizes, and `entries` all of it.

    Attributes:
      attention_bias: whether all four attention projections have biases.
      qkv_bias: whether queries, keys and values alone have biases.
      qk_norm: whether queries and keys are normalized in each head.
      sliding_window: number of tokens, itself included, that a token attends to; None: unlimited.
      layer_types: "sliding_attention" or "full_attention" for each layer; None: all layers slide if
        there is a window.
      experts: sizes of the mixture of experts; None: each layer has one MLP.
      model_type: Hugging Face's name of the architecture.
      entries: `config.json` as text, for families that the other fields do not describe; else "".

    Raises:
      ValueError: the numbers of heads do not divide, `head_dim` is odd, `rope_theta` does not suit
        the scaling, or `layer_types` does not match the other fields.
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
    entries: str = dataclasses.field(default="", repr=False)

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.entries:  # `describe` has checked the rest
            return
        if self.head_dim < 1 or self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary embeddings pair it up")
        if self.rope_scaling is not None:
            self.rope_scaling.check(self.rope_theta, self.head_dim)
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
    def decoder(self) -> Decoder:
        """What a model of this configuration computes."""
        return _decoder(self)

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
        if scaling is None or scaling.rope_type in ("llama3", "longrope", "proportional"):
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
        config = text_entries(config)
        if str(config.get("model_type")) in ARCHITECTURES:
            # The fields cannot say everything, such as a layer without experts.
            with contextlib.suppress(NotImplementedError):
                return cls._from_fields(config)
        return _from_entries(config)

    @classmethod
    def _from_fields(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        model_type = config["model_type"]
        architecture = ARCHITECTURES[model_type]
        # transformers 4 has rope_theta outside of the dict.
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(rope, Mapping):
            raise ValueError(f"rope_parameters must be an object, got {rope!r}")
        for key, allowed in _FIXED.items():
            values.require(key, config.get(key, rope.get(key, allowed[0])), allowed)
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
        outside = found.get("original_max_position_embeddings")
        context = {} if outside is None else {"original_max_position_embeddings": outside}
        longest = fields.get("max_position_embeddings", cls.max_position_embeddings)
        fields["rope_scaling"] = RopeScaling.from_hf({**context, **rope}, longest)
        fields["experts"] = read_experts(architecture, config, found)
        return cls(**fields, **read_windows(architecture, config, found))

    def to_hf(self) -> dict[str, Any]:
        """Return the `config.json` of transformers 5 that `from_hf` reads, without `dtype`.

        Raises:
          ValueError: the `model_type` has no entries for some fields; the message names them.
        """
        if self.entries:
            entries = json.loads(self.entries)
            if LlamaConfig.from_hf(entries) != self:
                raise ValueError("fields of the config were changed, but not its entries")
            return entries
        architecture = ARCHITECTURES[self.model_type]
        entries = dataclasses.asdict(self)
        for name in (
            *("rope_scaling", "rope_theta", "experts", "layer_types", "qk_norm", "entries"),
        ):
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


@functools.lru_cache(maxsize=64)
def _decoder(config: LlamaConfig) -> Decoder:
    return describe(json.loads(config.entries))[0] if config.entries else from_fields(config)


def _from_entries(entries: Mapping[str, Any]) -> LlamaConfig:
    """Return the configuration of a family that the fields do not describe."""
    model_type = entries.get("model_type")
    found, used = describe(entries)
    reader = Entries(entries, {})
    unknown = sorted(entries.keys() - used - IRRELEVANT)
    if unknown:
        _LOG.info("config.json has entries that a %s has no use for: %s", model_type, unknown)
    mixers = [layer.mixer for layer in found.layers]
    mixer = next((m for m in mixers if isinstance(m, Attention | LatentAttention)), None)
    if mixer is None:
        raise NotImplementedError("layer_types: q4jax implements models with attention")
    rope = mixer.rope
    kv_heads, head_dim = mixer.sizes
    return LlamaConfig(
        vocab_size=found.vocab_size,
        hidden_size=found.hidden_size,
        intermediate_size=found.width,
        num_hidden_layers=len(found.layers),
        num_attention_heads=mixer.heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=reader.context_or_none or _UNLIMITED,
        rms_norm_eps=found.norm.eps,
        rope_theta=10000.0 if rope is None else rope.theta,
        rope_scaling=None if rope is None else rope.scaling,
        tie_word_embeddings=found.tied,
        model_type=str(entries["model_type"]),
        entries=json.dumps(entries, sort_keys=True),
    )


def _differ(one: LlamaConfig, other: LlamaConfig, field: str) -> bool:
    # layer_types None and a full list may mean the same.
    field = "windowed" if field == "layer_types" else field
    return getattr(one, field) != getattr(other, field)
