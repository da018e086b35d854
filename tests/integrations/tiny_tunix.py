"""Tiny models of tunix, and the configs of transformers' models that compute the same."""

import importlib

import jax.numpy as jnp

SIZES = {"num_layers": 2, "embed_dim": 64, "hidden_dim": 128, "num_heads": 4, "head_dim": 16}
SIZES |= {"num_kv_heads": 2}
QWEN = {"vocab_size": 96, "rope_theta": 10_000, "norm_eps": 1e-6}
QWEN |= {"dtype": jnp.float32, "param_dtype": jnp.float32}
GEMMA2 = {"num_embed": 96, "final_logit_softcap": 30.0, "attn_logits_soft_cap": 50.0}
GEMMA2 |= {"use_post_attn_norm": True, "use_post_ffw_norm": True, "sliding_window_size": 8}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2}

# Name -> tunix's package of models, its config, the module that reads safetensors.
MODELS = {
    "llama3": ("llama3", {"vocab_size": 96, "rope_theta": 10_000, "norm_eps": 1e-5}, "params"),
    "qwen2": ("qwen2", QWEN, "params"),
    "qwen3": ("qwen3", QWEN, "params"),
    "qwen3_moe": ("qwen3", QWEN | MIXTURE | {"hidden_dim": 64}, "params"),
    "gemma2": ("gemma", GEMMA2, "params_safetensors"),
    "gemma2_without_groups": ("gemma", GEMMA2 | {"num_kv_heads": 4}, "params_safetensors"),
    "gemma3": (
        "gemma3",
        {"num_embed": 96, "sliding_window_size": 8, "param_dtype": jnp.float32},
        "params_safetensors",
    ),
}

_THEIRS = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
_THEIRS |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
_THEIRS |= {"head_dim": 16, "tie_word_embeddings": False, "initializer_range": 0.1}
_GEMMA = {"tie_word_embeddings": True, "query_pre_attn_scalar": 16, "sliding_window": 8}
_GEMMA |= {"attn_implementation": "eager"}
# tunix 0.1.7 turns the heads of Llama 3 and Qwen 3 by 1,000,000, whatever `rope_theta` says.
TRANSFORMERS = {
    "llama3": ("LlamaConfig", {"rope_theta": 1e6, "rms_norm_eps": 1e-5}),
    "qwen2": ("Qwen2Config", {"rope_theta": 1e4}),
    "qwen3": ("Qwen3Config", {"rope_theta": 1e6}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        MIXTURE | {"rope_theta": 1e6, "moe_intermediate_size": 64, "norm_topk_prob": True},
    ),
    "gemma2": ("Gemma2Config", _GEMMA),
    "gemma2_without_groups": ("Gemma2Config", _GEMMA | {"num_key_value_heads": 4}),
    "gemma3": ("Gemma3TextConfig", _GEMMA | {"rope_theta": 1e4, "rope_local_base_freq": 1e4}),
}


def package_of(name):
    """The module of tunix with the model and its config, and the one that reads safetensors."""
    package, _, params = MODELS[name]
    found = (importlib.import_module(f"tunix.models.{package}.{m}") for m in ("model", params))
    return tuple(found)


def config_of(name):
    module, _ = package_of(name)
    own = dict(MODELS[name][1])
    if MODELS[name][0] == "gemma":
        kinds = module.AttentionType
        own["attention_types"] = (kinds.LOCAL_SLIDING, kinds.GLOBAL)
    return module.ModelConfig(**SIZES | own)


def class_of(name):
    module, _ = package_of(name)
    return getattr(
        module,
        {"llama3": "Llama3", "gemma": "Gemma"}.get(MODELS[name][0], MODELS[name][0].capitalize()),
    )


def transformers_config(name):
    import transformers

    cls, own = TRANSFORMERS[name]
    return getattr(transformers, cls)(**_THEIRS | own)
