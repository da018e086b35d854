"""Families with a mixture of experts, latent attention or a linear attention."""

from collections.abc import Mapping
from typing import Any

from q4jax.models.decoder.entries import Entries
from q4jax.models.decoder.families.common import (
    ATTENTION_BIAS,
    GRANITE,
    HEAD_NORM,
    HUNYUAN,
    LAYER_NORM,
    MLP_BIAS,
    USE_BIAS,
    flag,
    number,
)
from q4jax.models.decoder.families.family import Family, Mixture
from q4jax.models.decoder.mixer_spec import Temperature


def _shared_width(c: Entries) -> int:
    count = c.optional_size("n_shared_experts", "moe_num_shared_experts") or 0
    return count * c.size("moe_intermediate_size")


def _qwen_sparse(c: Entries, layer: int) -> bool:
    step = c.size("decoder_sparse_step")
    return layer not in c.integers("mlp_only_layers") and (layer + 1) % step == 0


_SHARED_EXPERT: dict[str, Any] = {
    "shared": "shared_expert",
    "shared_width": lambda c: c.size("shared_expert_intermediate_size"),
}


_SHARED_GATE = {"shared_gate": "shared_expert_gate"}


_BLOCK_SPARSE: dict[str, Any] = {
    "width": ("intermediate_size",),
    "name": "block_sparse_moe",
    "names": ("w1", "w3", "w2"),
}


_DEEPSEEK: dict[str, Any] = {
    "in_layer": lambda c, layer: layer >= c.integer("first_k_dense_replace"),
    "count": ("n_routed_experts", "num_experts", "num_local_experts"),
    "width": ("moe_intermediate_size",),
    "shared": "shared_experts",
    "shared_width": _shared_width,
    "renormalize": flag("norm_topk_prob"),
    "scale": lambda c: c.number("routed_scaling_factor"),
    "groups": True,
}


_SIGMOID = {"score": "sigmoid", "correction": "e_score_correction_bias", "group_best": 2}


_DELTA: dict[str, Any] = {
    "norm": {"offset": 1.0},
    "mixer": "delta",
    "every": 4,
    "attention": {**ATTENTION_BIAS, "norm_over": "head", "gated": True},
    "defaults": {
        "partial_rotary_factor": 0.25,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
    },
}

MIXED: Mapping[str, Family] = {
    "mixtral": Family(
        windows="all",
        mixture=Mixture(width=("intermediate_size",), renormalize=True),
        renamed={"mlp": "block_sparse_moe", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
    ),
    "qwen2_moe": Family(
        windows="typed",
        attention={"bias": flag("qkv_bias")},
        mixture=Mixture(
            **_SHARED_EXPERT,
            in_layer=_qwen_sparse,
            renormalize=flag("norm_topk_prob"),
            others=_SHARED_GATE,
        ),
    ),
    "qwen3_moe": Family(
        windows="all",
        defaults={"head_dim": 128},
        attention={**ATTENTION_BIAS, **HEAD_NORM},
        mixture=Mixture(in_layer=_qwen_sparse, renormalize=flag("norm_topk_prob")),
    ),
    "granitemoe": Family(
        **GRANITE,
        mixture=Mixture(
            width=("intermediate_size",),
            name="block_sparse_moe",
            names=("input_linear", "output_linear"),
            others={"score": "top", "router": "router.layer", "inner": "", "layout": "out_in"},
        ),
    ),
    "olmoe": Family(
        attention={**ATTENTION_BIAS, "norm_over": "all", "clip": number("clip_qkv")},
        mixture=Mixture(width=("intermediate_size",), renormalize=flag("norm_topk_prob")),
    ),
    "minimax_m2": Family(
        attention={"norm_over": "all"},
        mixture=Mixture(
            **_BLOCK_SPARSE,
            renormalize=True,
            others={"score": "sigmoid", "correction": "e_score_correction_bias"},
        ),
    ),
    "gpt_oss": Family(
        windows="typed",
        every=2,
        attention={**ATTENTION_BIAS, "sinks": True},
        mlp={"limit": lambda c: c.optional_number("swiglu_limit") or 7.0},
        fixed={"swiglu_alpha": (1.702,)},
        mixture=Mixture(
            names=("gate_up_proj", "down_proj"),
            others={
                "score": "top",
                "router": "router",
                "router_bias": True,
                "layout": "in_out",
            },
        ),
    ),
    "hunyuan_v1_moe": Family(
        attention=HUNYUAN,
        mixture=Mixture(
            width=("intermediate_size",),
            per_token=("moe_topk",),
            shared="shared_mlp",
            shared_width=lambda c: c.size("intermediate_size"),
            renormalize=True,
            others={"router": "gate.wg"},
        ),
    ),
    "ernie4_5_moe": Family(
        interleaved=True,
        **USE_BIAS,
        decoder={"head_bias": flag("use_bias")},
        mixture=Mixture(
            count=("moe_num_experts",),
            per_token=("moe_k",),
            in_layer=lambda c, layer: c.in_ernie_mixture(layer),
            shared="shared_experts",
            shared_width=_shared_width,
            renormalize=True,
            others={"correction": "moe_statics.e_score_correction_bias"},
        ),
    ),
    "phimoe": Family(
        norm=LAYER_NORM,
        windows="all",
        attention=ATTENTION_BIAS,
        decoder={"head_bias": flag("lm_head_bias")},
        mixture=Mixture(
            **_BLOCK_SPARSE,
            others={"score": "sparsemixer", "jitter": number("router_jitter_noise")},
        ),
        defaults={"router_jitter_noise": 0.01},
    ),
    "glm4_moe": Family(
        attention={
            "bias": flag("attention_bias"),
            "norm_over": lambda c: "head" if c.flag("use_qk_norm") else "",
        },
        mixture=Mixture(
            **_DEEPSEEK, others={**_SIGMOID, "correction": "gate.e_score_correction_bias"}
        ),
        defaults={"norm_topk_prob": True, "partial_rotary_factor": 0.5},
    ),
    "deepseek_v2": Family(
        mixer="latent",
        interleaved=True,
        mlp=MLP_BIAS,
        mixture=Mixture(**{**_DEEPSEEK, "renormalize": False}),
        defaults={"n_group": 1, "topk_group": 1, "norm_topk_prob": True},
        fixed={"topk_method": ("greedy", "group_limited_greedy")},
    ),
    "deepseek_v3": Family(
        mixer="latent",
        mixture=Mixture(
            **_DEEPSEEK, others={**_SIGMOID, "correction": "gate.e_score_correction_bias"}
        ),
        defaults={"norm_topk_prob": True},
    ),
    "llama4_text": Family(
        windows="typed",
        chunks=True,
        interleaved=True,
        rope=lambda c, layer: c.has_rope(layer),
        attention={
            **ATTENTION_BIAS,
            "norm_over": lambda c: "head" if c.flag("use_qk_norm") else "",
            "norm_last": True,
            "bare_norm": True,
            "unrotated_temperature": lambda c: (
                Temperature(c.number("attn_scale"), c.number("floor_scale"), 1.0)
                if c.flag("attn_temperature_tuning")
                else None
            ),
        },
        layer={"mlp_name": "feed_forward"},
        width=lambda c: c.size("intermediate_size_mlp"),
        mixture=Mixture(
            width=("intermediate_size",),
            in_layer=lambda c, layer: (
                layer in c.integers("moe_layers")
                if c.get("moe_layers")
                else (layer + 1) % c.size("interleave_moe_layer_step") == 0
            ),
            names=("gate_up_proj", "down_proj"),
            shared="shared_expert",
            shared_width=lambda c: c.size("intermediate_size"),
            others={"score": "input", "router": "router", "layout": "in_out"},
        ),
    ),
    "qwen3_5_text": Family(**_DELTA),
    "qwen3_5_moe_text": Family(
        **_DELTA, mixture=Mixture(**_SHARED_EXPERT, renormalize=True, others=_SHARED_GATE)
    ),
    "qwen3_next": Family(
        **_DELTA,
        delta_fused=True,
        mixture=Mixture(
            **_SHARED_EXPERT,
            in_layer=_qwen_sparse,
            renormalize=flag("norm_topk_prob"),
            others=_SHARED_GATE,
        ),
    ),
}
