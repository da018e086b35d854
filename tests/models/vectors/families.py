"""Small configurations of the families beyond Llama's, each with its features switched on."""

F, S, C, L = "full_attention", "sliding_attention", "chunked_attention", "linear_attention"
TWO = {"num_hidden_layers": 2}
GRANITE = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.22,
    "logits_scaling": 3.0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SHARED = {**EXPERTS, "shared_expert_intermediate_size": 40}
LATENT = {
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
    "num_key_value_heads": 4,
    **TWO,
}
DELTA = {
    "head_dim": 16,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "layer_types": [L, L, F, L],
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4}
BLOCKS = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
# Their configurations have names of their own for most sizes.
OF_GPT = {"falcon", "gpt_neox", "gptj", "mpt", "opt", "gpt2", "bloom"}

CASES = {
    "qwen2_moe_dense_layers": (
        "qwen2_moe",
        {**SHARED, "mlp_only_layers": [2], "decoder_sparse_step": 1},
    ),
    "ministral": ("ministral", {"head_dim": 16, "sliding_window": 6, "layer_types": [F, S, S, S]}),
    "ministral3": (
        "ministral3",
        {
            **TWO,
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 8,
                "rope_theta": 1e4,
                "llama_4_scaling_beta": 0.3,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        },
    ),
    "seed_oss": ("seed_oss", {**TWO, "head_dim": 8, "attention_out_bias": True, "mlp_bias": True}),
    "arcee": ("arcee", {**TWO, "mlp_bias": True}),
    "ernie4_5": ("ernie4_5", {**TWO, "head_dim": 8, "use_bias": True}),
    "helium": ("helium", {**TWO, "head_dim": 8}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {**TWO, "head_dim": 8}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}),
    "granite": ("granite", {**TWO, **GRANITE, "attention_bias": True}),
    "apertus": ("apertus", TWO),
    "gemma": ("gemma", {**TWO, "head_dim": 16, "num_key_value_heads": 1}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": 6,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3_text": (
        "gemma3_text",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": 6,
            "layer_types": [S, S, F, S],
        },
    ),
    "gemma4_text": (
        "gemma4_text",
        {
            "head_dim": 8,
            "global_head_dim": 16,
            "sliding_window": 6,
            "layer_types": [S, F, S, F],
            "vocab_size_per_layer_input": 96,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "attention_k_eq_v": False,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma4_text_equal": (
        "gemma4_text",
        {
            **TWO,
            "head_dim": 8,
            "global_head_dim": 16,
            "sliding_window": 6,
            "layer_types": [S, F],
            "vocab_size_per_layer_input": 96,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
        },
    ),
    "phi3": (
        "phi3",
        {
            **TWO,
            "sliding_window": 6,
            "max_position_embeddings": 64,
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
                "short_factor": [1.0, 1.5],
                "long_factor": [2.0, 3.0],
            },
        },
    ),
    "phi": ("phi", {**TWO, "partial_rotary_factor": 0.5}),
    "cohere": ("cohere", {**TWO, "use_qk_norm": True, "logit_scale": 0.25}),
    "cohere2": ("cohere2", {"sliding_window": 6, "logit_scale": 0.25, "layer_types": [S, F, S, F]}),
    "stablelm": ("stablelm", {**TWO, "use_qkv_bias": True}),
    "stablelm_parallel": ("stablelm", {**TWO, "use_parallel_residual": True}),
    "starcoder2": ("starcoder2", {**TWO, "sliding_window": 6, "use_bias": True}),
    "olmo": ("olmo", {**TWO, "clip_qkv": 1.0}),
    "olmo2": ("olmo2", TWO),
    "olmo3": ("olmo3", {"sliding_window": 6}),
    "exaone4": ("exaone4", {"sliding_window": 6, "layer_types": [S, S, F, S]}),
    "glm": ("glm", {**TWO, "head_dim": 8, "attention_bias": True}),
    "glm4": ("glm4", {**TWO, "head_dim": 8, "partial_rotary_factor": 0.5}),
    "nemotron": ("nemotron", {**TWO, "head_dim": 8, "partial_rotary_factor": 0.5}),
    "falcon": ("falcon", {**BLOCKS, "multi_query": True, "bias": True}),
    "falcon_new": (
        "falcon",
        {**BLOCKS, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "falcon_serial": (
        "falcon",
        {**BLOCKS, "multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
    ),
    "gpt_neox": ("gpt_neox", {**BLOCKS, "rotary_pct": 0.5}),
    "gpt_neox_serial": ("gpt_neox", {**BLOCKS, "use_parallel_residual": False}),
    "gptj": ("gptj", {**GPT, "rotary_dim": 4, "n_positions": 64}),
    "mpt": ("mpt", {"d_model": 36, "n_layers": 2, "n_heads": 6, "max_seq_len": 64}),
    "opt": (
        "opt",
        {**BLOCKS, "max_position_embeddings": 64, "ffn_dim": 48, "word_embed_proj_dim": 32},
    ),
    "gpt2": ("gpt2", {**GPT, "n_positions": 64, "n_inner": 40}),
    "bloom": ("bloom", {"hidden_size": 36, "n_layer": 2, "n_head": 6}),
    "granitemoe": (
        "granitemoe",
        {**TWO, **GRANITE, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "olmoe": ("olmoe", {**TWO, **EXPERTS, "norm_topk_prob": True, "clip_qkv": 1.0}),
    "minimax_m2": (
        "minimax_m2",
        {**TWO, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "gpt_oss": (
        "gpt_oss",
        {
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 6,
            "layer_types": [S, F, S, F],
            "swiglu_limit": 1.0,
        },
    ),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {**TWO, "head_dim": 8, "num_experts": 4, "moe_topk": 2}),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_num_shared_experts": 2,
            "moe_intermediate_size": 24,
            "moe_layer_start_index": 1,
        },
    ),
    "phimoe": (
        "phimoe",
        {
            **TWO,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "attention_bias": True,
            "lm_head_bias": True,
        },
    ),
    "glm4_moe": (
        "glm4_moe",
        {**LATENT, "num_key_value_heads": 2, "head_dim": 8, "use_qk_norm": True},
    ),
    "deepseek_v2": (
        "deepseek_v2",
        {**LATENT, "q_lora_rank": None, "topk_method": "group_limited_greedy"},
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            **LATENT,
            "q_lora_rank": 20,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 8,
                "rope_theta": 1e4,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        },
    ),
    "llama4_text": (
        "llama4_text",
        {
            "head_dim": 8,
            "intermediate_size_mlp": 40,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 8,
            "no_rope_layers": [1, 1, 1, 0],
        },
    ),
    "qwen3_5_text": ("qwen3_5_text", DELTA),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", {**DELTA, **SHARED}),
    "qwen3_next": ("qwen3_next", {**DELTA, **SHARED, "norm_topk_prob": True}),
}
