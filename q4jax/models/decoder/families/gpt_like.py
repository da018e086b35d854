"""Families of GPT-2's shape: LayerNorm, two projections in an MLP, one for q, k and v."""

from collections.abc import Mapping
from typing import Any

from q4jax.models.decoder.families.common import ATTENTION_BIAS, LAYER_NORM, flag
from q4jax.models.decoder.families.family import Family

_GPT: dict[str, Any] = {
    "norm": LAYER_NORM,
    "eps": ("layer_norm_epsilon",),
    "kv_heads": (),
    "layers": "transformer.h",
    "embed": "transformer.wte",
    "final": "transformer.ln_f",
    "width": lambda c: c.optional_size("n_inner", "ffn_hidden_size") or 4 * c.hidden,
}


_H_TO_4H = {"gate": "", "up": "dense_h_to_4h", "down": "dense_4h_to_h"}

GPT: Mapping[str, Family] = {
    "falcon": Family(
        **{
            **_GPT,
            "embed": "transformer.word_embeddings",
            "kv_heads": ("num_kv_heads", "n_head_kv"),
        },
        act=("activation",),
        rope=lambda c, layer: not c.flag("alibi"),
        attention={
            "qkv": "query_key_value",
            "o": "dense",
            "grouped": lambda c: c.flag("new_decoder_architecture") or not c.flag("multi_query"),
            "bias": flag("bias"),
            "out_bias": flag("bias"),
            "alibi": lambda c: c.alibi_slopes("falcon") if c.flag("alibi") else None,
        },
        layer={
            "mixer_name": "self_attention",
            "parallel": lambda c: c.flag("new_decoder_architecture") or c.flag("parallel_attn"),
            "before_mixer": lambda c: "ln_attn" if c.two_falcon_norms() else "input_layernorm",
            "before_mlp": lambda c: (
                "ln_mlp"
                if c.two_falcon_norms()
                else ""
                if c.flag("parallel_attn") or c.flag("new_decoder_architecture")
                else "post_attention_layernorm"
            ),
        },
        mlp={**_H_TO_4H, "bias": flag("bias")},
    ),
    "gpt_neox": Family(
        norm=LAYER_NORM,
        eps=("layer_norm_eps",),
        kv_heads=(),
        layers="gpt_neox.layers",
        embed="gpt_neox.embed_in",
        final="gpt_neox.final_layer_norm",
        head="embed_out",
        attention={"qkv": "query_key_value", "grouped": True, "o": "dense", **ATTENTION_BIAS},
        layer={"mixer_name": "attention", "parallel": flag("use_parallel_residual")},
        mlp={**_H_TO_4H, "bias": True},
        defaults={"partial_rotary_factor": 0.25},
    ),
    "gptj": Family(
        **_GPT,
        act=("activation_function",),
        interleaved=True,
        attention={"o": "out_proj"},
        layer={
            "mixer_name": "attn",
            "before_mixer": "ln_1",
            "before_mlp": "",
            "parallel": True,
        },
        mlp={"gate": "", "up": "fc_in", "down": "fc_out", "bias": True},
        decoder={"head_bias": True},
    ),
    "mpt": Family(
        **{
            **_GPT,
            "norm": {"kind": "layer"},
            "layers": "transformer.blocks",
            "final": "transformer.norm_f",
            "width": lambda c: c.size("expansion_ratio") * c.hidden,
        },
        rope=lambda c, layer: False,
        attention={
            "qkv": "Wqkv",
            "o": "out_proj",
            "alibi": lambda c: c.alibi_slopes("mpt"),
            "clip": lambda c: c.section("attn_config").optional_number("clip_qkv"),
            "scale": lambda c: (
                c.section("attn_config").optional_number("softmax_scale") or c.even_head_dim**-0.5
            ),
        },
        layer={
            "mixer_name": "attn",
            "mlp_name": "ffn",
            "before_mixer": "norm_1",
            "before_mlp": "norm_2",
        },
        mlp={"gate": "", "act": "gelu"},
        fixed={
            "attn_config": (),
            "logit_scale": (None,),
            "no_bias": (True,),
        },
    ),
    "opt": Family(
        norm=LAYER_NORM,
        eps=(),
        kv_heads=(),
        act=("activation_function",),
        width=lambda c: c.size("ffn_dim"),
        layers="model.decoder.layers",
        embed="model.decoder.embed_tokens",
        final="model.decoder.final_layer_norm",
        positions="model.decoder.embed_positions",
        rope=lambda c, layer: False,
        attention={"o": "out_proj", "bias": flag("enable_bias"), "out_bias": flag("enable_bias")},
        layer={
            "before_mixer": "self_attn_layer_norm",
            "before_mlp": "final_layer_norm",
            "mlp_name": "",
        },
        mlp={"gate": "", "up": "fc1", "down": "fc2", "bias": flag("enable_bias")},
        decoder={
            "positions": lambda c: c.size("max_position_embeddings") + 2,
            "position_offset": 2,
        },
        fixed={
            "do_layer_norm_before": (True,),
            "_remove_final_layer_norm": (False,),
            "layer_norm_elementwise_affine": (True,),
            "word_embed_proj_dim": (lambda c: c.hidden, None),
        },
    ),
    "gpt2": Family(
        **_GPT,
        act=("activation_function",),
        positions="transformer.wpe",
        rope=lambda c, layer: False,
        conv1d=True,
        attention={"qkv": "c_attn", "o": "c_proj", "bias": True, "out_bias": True},
        layer={"mixer_name": "attn", "before_mixer": "ln_1", "before_mlp": "ln_2"},
        mlp={"gate": "", "up": "c_fc", "down": "c_proj", "bias": True},
        decoder={"positions": lambda c: c.size("n_positions")},
        fixed={
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "reorder_and_upcast_attn": (False,),
            "add_cross_attention": (False,),
        },
    ),
    "bloom": Family(
        **{**_GPT, "embed": "transformer.word_embeddings"},
        embed_norm="transformer.word_embeddings_layernorm",
        rope=lambda c, layer: False,
        attention={
            "qkv": "query_key_value",
            "grouped": True,
            "o": "dense",
            "bias": True,
            "out_bias": True,
            "alibi": lambda c: c.alibi_slopes("bloom"),
        },
        layer={"mixer_name": "self_attention"},
        mlp={**_H_TO_4H, "bias": True, "act": "gelu_pytorch_tanh"},
        decoder={"embed_norm": True},
        fixed={"apply_residual_connection_post_layernorm": (False,)},
    ),
}
