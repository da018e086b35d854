"""Families of Llama's shape: rotary embeddings, RMSNorm and one MLP a layer, or nearly so."""

from collections.abc import Mapping
from typing import Any

from q4jax.models.decoder.entries import ALL_SLIDE, SLIDING, Entries
from q4jax.models.decoder.families.common import (
    ATTENTION_BIAS,
    BIASES,
    GRANITE,
    HEAD_NORM,
    HUNYUAN,
    LAYER_NORM,
    MLP_BIAS,
    USE_BIAS,
    flag,
    number,
)
from q4jax.models.decoder.families.family import Family
from q4jax.models.decoder.mixer_spec import Temperature


def _root(c: Entries) -> float:
    return c.size("hidden_size") ** 0.5


_SANDWICH = {
    "after_mixer": "post_attention_layernorm",
    "before_mlp": "pre_feedforward_layernorm",
    "after_mlp": "post_feedforward_layernorm",
}


_POST = {**_SANDWICH, "before_mixer": "", "before_mlp": ""}


_GEMMA: dict[str, Any] = {
    "norm": {"offset": 1.0},
    "act": ("hidden_activation", "hidden_act"),
    "decoder": {"embed_scale": _root},
    "attention": ATTENTION_BIAS,
}


_QUERY_SCALE = {"scale": lambda c: c.number("query_pre_attn_scalar") ** -0.5}


_COHERE: dict[str, Any] = {
    "norm": {"kind": "layer"},
    "eps": ("layer_norm_eps",),
    "interleaved": True,
    "layer": {"parallel": True, "before_mlp": ""},
    "decoder": {"logit_scale": lambda c: c.number("logit_scale")},
}

_WINDOW = {"sliding_window": 4096}

DENSE: Mapping[str, Family] = {
    "llama": Family(**BIASES),
    "mistral": Family(windows="all"),
    "qwen2": Family(windows="typed", attention={"bias": True}, defaults=_WINDOW),
    "qwen3": Family(windows="typed", attention={**ATTENTION_BIAS, **HEAD_NORM}, defaults=_WINDOW),
    "ministral": Family(windows="typed", every=ALL_SLIDE),
    "ministral3": Family(
        windows="all",
        attention={
            "temperature": lambda c: Temperature(
                c.rope_entry("llama_4_scaling_beta"),
                c.rope_entry("original_max_position_embeddings"),
            )
        },
    ),
    "seed_oss": Family(
        attention={"bias": flag("attention_bias"), "out_bias": flag("attention_out_bias")},
        mlp=MLP_BIAS,
    ),
    "arcee": Family(attention=ATTENTION_BIAS, mlp={"gate": "", **MLP_BIAS}),
    "ernie4_5": Family(interleaved=True, **USE_BIAS),
    "helium": Family(interleaved=True, attention={"bias": flag("attention_bias")}, mlp=MLP_BIAS),
    "hunyuan_v1_dense": Family(attention=HUNYUAN),
    "smollm3": Family(
        windows="typed",
        defaults=_WINDOW,
        **BIASES,
        rope=lambda c, layer: c.has_rope(layer),
    ),
    "granite": Family(**GRANITE),
    "apertus": Family(
        attention={**ATTENTION_BIAS, **HEAD_NORM},
        layer={"before_mixer": "attention_layernorm", "before_mlp": "feedforward_layernorm"},
        mlp={"gate": ""},
    ),
    "gemma": Family(**_GEMMA, defaults={"hidden_activation": "gelu_pytorch_tanh"}),
    "gemma2": Family(
        **{
            **_GEMMA,
            "attention": {**ATTENTION_BIAS, **_QUERY_SCALE},
        },
        windows="typed",
        every=2,
        layer=_SANDWICH,
    ),
    "gemma3_text": Family(
        **{
            **_GEMMA,
            "attention": {**ATTENTION_BIAS, **HEAD_NORM, **_QUERY_SCALE},
        },
        defaults={"rope_theta": 1e6, "rope_local_base_freq": 10000.0},
        windows="typed",
        every=6,
        layer=_SANDWICH,
    ),
    "gemma4_text": Family(
        act=("hidden_activation",),
        windows="typed",
        every=6,
        attention={**ATTENTION_BIAS, **HEAD_NORM, "norm_values": True, "scale": 1.0},
        layer={**_SANDWICH, "scaled": True},
        decoder={"embed_scale": _root, "logit_cap": number("final_logit_softcapping")},
        fixed={
            "enable_moe_block": (False, None),
            "use_bidirectional_attention": (None, "vision"),
        },
    ),
    "phi3": Family(windows="all", attention={"qkv": "qkv_proj"}, mlp={"gate_up": "gate_up_proj"}),
    "phi": Family(
        norm=LAYER_NORM,
        eps=("layer_norm_eps",),
        final="model.final_layernorm",
        layer={"parallel": True, "before_mlp": ""},
        attention={"o": "dense", "bias": True, "out_bias": True},
        mlp={"gate": "", "up": "fc1", "down": "fc2", "bias": True},
        decoder={"head_bias": True},
        defaults={"partial_rotary_factor": 0.5},
        fixed={"qk_layernorm": (False,)},
    ),
    "cohere": Family(
        **_COHERE,
        attention={
            **ATTENTION_BIAS,
            "norm_over": lambda c: "each" if c.flag("use_qk_norm") else "",
        },
    ),
    "cohere2": Family(
        **_COHERE,
        windows="typed",
        every=4,
        attention=ATTENTION_BIAS,
        rope=lambda c, layer: c.layer_type(layer, 4) == SLIDING,
    ),
    "stablelm": Family(
        norm=LAYER_NORM,
        eps=("layer_norm_eps",),
        attention={"bias": flag("use_qkv_bias")},
        layer={
            "parallel": flag("use_parallel_residual"),
            "before_mlp": lambda c: (
                "" if c.flag("use_parallel_residual") else "post_attention_layernorm"
            ),
        },
        defaults={"partial_rotary_factor": 0.25},
        fixed={"qk_layernorm": (False,)},
    ),
    "starcoder2": Family(
        norm=LAYER_NORM,
        eps=("norm_epsilon",),
        windows="all",
        attention=USE_BIAS["attention"],
        mlp={"gate": "", "up": "c_fc", "down": "c_proj", **USE_BIAS["mlp"]},
    ),
    "olmo": Family(
        norm={"kind": "layer", "scale": False, "eps": 1e-5},
        attention={**ATTENTION_BIAS, "clip": number("clip_qkv")},
    ),
    "olmo2": Family(attention={**ATTENTION_BIAS, "norm_over": "all"}, layer=_POST),
    "olmo3": Family(
        windows="typed", every=4, attention={**ATTENTION_BIAS, "norm_over": "all"}, layer=_POST
    ),
    "exaone4": Family(
        windows="typed",
        every=4,
        attention=HEAD_NORM,
        layer=_POST,
        rope=lambda c, layer: (
            not (c.optional_size("sliding_window") and c.layer_type(layer, 4) != SLIDING)
        ),
    ),
    "glm": Family(
        interleaved=True,
        attention={"bias": flag("attention_bias")},
        mlp={"gate_up": "gate_up_proj"},
        defaults={"partial_rotary_factor": 0.5},
    ),
    "glm4": Family(
        interleaved=True,
        attention={"bias": flag("attention_bias")},
        mlp={"gate_up": "gate_up_proj"},
        layer={"after_mixer": "post_self_attn_layernorm", "after_mlp": "post_mlp_layernorm"},
        defaults={"partial_rotary_factor": 0.5},
    ),
    "nemotron": Family(
        norm={**LAYER_NORM, "offset": 1.0},
        eps=("norm_eps",),
        attention=ATTENTION_BIAS,
        mlp={"gate": "", **MLP_BIAS},
        defaults={"partial_rotary_factor": 0.5},
    ),
}
