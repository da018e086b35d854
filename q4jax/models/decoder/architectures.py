"""Table of the Llama family's architectures: Hugging Face's `model_type`s and their differences.

To add one, add an entry to `ARCHITECTURES`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class WindowRule:
    """The layers that attend to the last `sliding_window` tokens only.

    Attributes:
      allowed: whether `sliding_window` may be set.
      switched: whether the window is used only if `use_sliding_window` is true.
      selects: function of a layer's index and `max_window_layers`: whether the layer uses the
        window. None: all layers do, and `config.json` has no `layer_types`.
    """

    allowed: bool = True
    switched: bool = True
    selects: Callable[[int, int], bool] | None = None


NO_LAYERS = WindowRule(allowed=False, switched=False)
"""No layer uses a window."""
ALL_LAYERS = WindowRule(switched=False)
"""All layers use the window."""
SWITCHED = WindowRule()
"""All layers use the window if `use_sliding_window` is true."""
UPPER_LAYERS = WindowRule(selects=lambda layer, first: layer >= first)
"""Layers from `max_window_layers` on use it if `use_sliding_window` is true."""
ALTERNATE_LAYERS = WindowRule(selects=lambda layer, first: layer < first and layer % 2 == 0)
"""Every other layer below `max_window_layers` uses it if `use_sliding_window` is true."""


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One `model_type` of Hugging Face.

    Attributes:
      name: its class in transformers.
      defaults: entries of its `config.json` with other defaults than `LlamaConfig`.
      biases: entries of its `config.json` that switch biases on.
      always: fields of `LlamaConfig` with a fixed value and no entry in `config.json`.
      windows: the layers that use the sliding window.
      experts: field of `ExpertsConfig` -> entry in `config.json`; empty: it has no experts.
      expert_names: submodule of the experts -> its name in checkpoints.
    """

    name: str
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    biases: tuple[str, ...] = ()
    always: Mapping[str, bool] = dataclasses.field(default_factory=dict)
    windows: WindowRule = NO_LAYERS
    experts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    expert_names: Mapping[str, str] = dataclasses.field(default_factory=dict)


_QWEN = {"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}
_QWEN_EXPERTS = {
    "num_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "intermediate_size": "moe_intermediate_size",
    "norm_topk_prob": "norm_topk_prob",
}
_MISTRAL = {"max_position_embeddings": 131072, "num_key_value_heads": 8}

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("LlamaForCausalLM", biases=("attention_bias", "mlp_bias")),
    "mistral": Architecture(
        "MistralForCausalLM", defaults=_MISTRAL | {"sliding_window": 4096}, windows=ALL_LAYERS
    ),
    "qwen2": Architecture(
        "Qwen2ForCausalLM",
        defaults=_QWEN | {"num_key_value_heads": 32},
        always={"qkv_bias": True},
        windows=UPPER_LAYERS,
    ),
    "qwen3": Architecture(
        "Qwen3ForCausalLM",
        defaults=_QWEN | {"num_key_value_heads": 32, "head_dim": 128},
        biases=("attention_bias",),
        always={"qk_norm": True},
        windows=UPPER_LAYERS,
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
        windows=ALL_LAYERS,
        experts={
            "num_experts": "num_local_experts",
            "num_experts_per_tok": "num_experts_per_tok",
            "intermediate_size": "intermediate_size",
        },
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
        windows=ALTERNATE_LAYERS,
        experts=_QWEN_EXPERTS | {"shared_intermediate_size": "shared_expert_intermediate_size"},
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
        windows=SWITCHED,
        experts=_QWEN_EXPERTS,
    ),
}
