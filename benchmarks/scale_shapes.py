"""The models whose memory and traffic `scale.py` asks the compiler for, and their meshes."""

import dataclasses
from typing import Any

from q4jax.models import LlamaConfig

_LLAMA_7B = LlamaConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=128,
    max_position_embeddings=4096,
)
_LLAMA_70B = LlamaConfig(
    vocab_size=32000,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=4096,
)
LLAMA_3_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=8192,
    rope_theta=500000.0,
)
_LLAMA_3_70B = dataclasses.replace(
    _LLAMA_70B, vocab_size=128256, max_position_embeddings=8192, rope_theta=500000.0
)
_TINY = LlamaConfig(  # for tests
    vocab_size=512,
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=128,
)
# The entries of each `config.json` that decide shapes and arithmetic.
_GEMMA_3_27B: dict[str, Any] = {
    "model_type": "gemma3_text",
    "vocab_size": 262208,
    "hidden_size": 5376,
    "intermediate_size": 21504,
    "num_hidden_layers": 62,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "query_pre_attn_scalar": 168,
    "sliding_window": 1024,
    "rope_theta": 1e6,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "tie_word_embeddings": True,
}
_QWEN3_32B: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 5120,
    "intermediate_size": 25600,
    "num_hidden_layers": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_theta": 1e6,
}
_QWEN3_30B_A3B: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "max_position_embeddings": 40960,
    "rope_theta": 1e6,
}
_GPT_OSS_20B: dict[str, Any] = {
    "model_type": "gpt_oss",
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "max_position_embeddings": 131072,
    "rope_theta": 150000.0,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
    },
}
MODELS: dict[str, LlamaConfig] = {
    "7b": _LLAMA_7B,
    "70b": _LLAMA_70B,
    "llama-3-8b": LLAMA_3_8B,
    "llama-3-70b": _LLAMA_3_70B,
    "tiny": _TINY,
    "gemma-3-27b": LlamaConfig.from_hf(_GEMMA_3_27B),
    "qwen3-32b": LlamaConfig.from_hf(_QWEN3_32B),
    "qwen3-30b-a3b": LlamaConfig.from_hf(_QWEN3_30B_A3B),
    "gpt-oss-20b": LlamaConfig.from_hf(_GPT_OSS_20B),
}
DENSE_MESHES = {
    8: {"fsdp": 8},
    64: {"fsdp": 16, "tensor": 4},
    256: {"data": 4, "fsdp": 16, "tensor": 4},
    512: {"data": 8, "fsdp": 16, "tensor": 4},
}
EXPERT_MESHES = {
    8: {"fsdp": 2, "expert": 4},
    64: {"fsdp": 8, "expert": 8},
    256: {"data": 4, "fsdp": 8, "expert": 8},
    512: {"data": 8, "fsdp": 8, "expert": 8},
}
EXPERTS = ("qwen3-30b-a3b", "gpt-oss-20b")


def mesh_sizes(name: str, devices: int) -> dict[str, int]:
    """Sizes of the mesh's axes for a model on so many devices."""
    return (EXPERT_MESHES if name in EXPERTS else DENSE_MESHES)[devices]
