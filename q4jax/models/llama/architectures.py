"""What Hugging Face's models of the Llama family have in common, and in what they differ: data."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One `model_type` of Hugging Face.

    Attributes:
      name: its class.
      defaults: values of its config where they are not those of `LlamaConfig`.
      biases: the entries of its config that switch biases on.
      always: fields of `LlamaConfig` that it has without an entry.
      windows: the layers whose attention reaches back `sliding_window` tokens: none, all, or, with
        `use_sliding_window`, all, those from `max_window_layers` on, or each other one below it.
      experts: how its config calls the number of experts; None: it has no experts.
      expert_names: how its checkpoints call the block of experts and its parts.
    """

    name: str
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    biases: tuple[str, ...] = ()
    always: Mapping[str, bool] = dataclasses.field(default_factory=dict)
    windows: Literal["none", "all", "switched", "upper", "alternate"] = "none"
    experts: str | None = None
    expert_names: Mapping[str, str] = dataclasses.field(default_factory=dict)


_QWEN = {"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}
_MISTRAL = {"max_position_embeddings": 131072, "num_key_value_heads": 8}

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("LlamaForCausalLM", biases=("attention_bias", "mlp_bias")),
    "mistral": Architecture(
        "MistralForCausalLM", defaults=_MISTRAL | {"sliding_window": 4096}, windows="all"
    ),
    "qwen2": Architecture(
        "Qwen2ForCausalLM",
        defaults=_QWEN | {"num_key_value_heads": 32},
        always={"qkv_bias": True},
        windows="upper",
    ),
    "qwen3": Architecture(
        "Qwen3ForCausalLM",
        defaults=_QWEN | {"num_key_value_heads": 32, "head_dim": 128},
        biases=("attention_bias",),
        always={"qk_norm": True},
        windows="upper",
    ),
    "mixtral": Architecture(
        "MixtralForCausalLM",
        defaults=_MISTRAL
        | {
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        },
        windows="all",
        experts="num_local_experts",
        expert_names={
            "mlp": "block_sparse_moe",
            "gate_proj": "w1",
            "up_proj": "w3",
            "down_proj": "w2",
        },
    ),
    "qwen2_moe": Architecture(
        "Qwen2MoeForCausalLM",
        defaults=_QWEN
        | {
            "num_key_value_heads": 16,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "qkv_bias": True,
        },
        biases=("qkv_bias",),
        windows="alternate",
        experts="num_experts",
    ),
    "qwen3_moe": Architecture(
        "Qwen3MoeForCausalLM",
        defaults=_QWEN
        | {
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
        biases=("attention_bias",),
        always={"qk_norm": True},
        windows="switched",
        experts="num_experts",
    ),
}
