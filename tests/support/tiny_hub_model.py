"""A tiny model's Hugging Face directory, with a tokenizer of bytes and a chat template."""

import json
from pathlib import Path

import tokenizers
from flax import nnx

from q4jax.models import Llama, LlamaConfig, save_pretrained

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]


def byte_tokenizer() -> tokenizers.Tokenizer:
    """A token for each byte, and special ones after them."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bpe = tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[])
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def tokenizer_config(template: str | None = TEMPLATE) -> dict:
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}}
    return config if template is None else config | {"chat_template": template}


def write_model(folder: Path, vocab_size: int = 264) -> Path:
    """Write a random Llama of 2 layers, and its tokenizer."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=128,
    )
    save_pretrained(Llama(config, rngs=nnx.Rngs(0)), folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config()))
    return folder
