"""The description of a model of the Llama family, from the fields of its configuration."""

from typing import Any

from q4jax.models.decoder.mixer_spec import Attention, Norm, Rope, View
from q4jax.models.decoder.spec import MLP, Decoder, Experts, Layer


def from_fields(config: Any) -> Decoder:
    """Return what a model computes, given a `LlamaConfig` that has no `entries`."""
    norm = Norm(eps=config.rms_norm_eps)
    rope = Rope(
        config.head_dim, config.rope_theta, config.max_position_embeddings, config.rope_scaling
    )
    return Decoder(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        layers=tuple(
            Layer(_attention(config, norm, rope, windowed), _mlp(config), norm)
            for windowed in config.windowed
        ),
        norm=norm,
        tied=config.tie_word_embeddings,
    )


def _attention(config: Any, norm: Norm, rope: Rope, windowed: bool) -> Attention:
    return Attention(
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        scale=config.head_dim**-0.5,
        view=View(window=config.sliding_window if windowed else None),
        bias=config.attention_bias or config.qkv_bias,
        out_bias=config.attention_bias,
        rope=rope,
        norm=norm if config.qk_norm else None,
    )


def _mlp(config: Any) -> MLP | Experts:
    if config.experts is None:
        return MLP(config.intermediate_size, bias=config.mlp_bias)
    experts = config.experts
    shared = experts.shared_intermediate_size
    return Experts(
        count=experts.num_experts,
        per_token=experts.num_experts_per_tok,
        expert=MLP(experts.intermediate_size, bias=config.mlp_bias),
        renormalize=experts.norm_topk_prob,
        shared="" if shared is None else "shared_expert",
        shared_mlp=None if shared is None else MLP(shared, bias=config.mlp_bias),
        shared_gate="" if shared is None else "shared_expert_gate",
    )
