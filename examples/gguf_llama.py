"""Load a Llama and its tokenizer from a GGUF file, the format of llama.cpp."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import q4jax
from q4jax.models import Llama, LlamaConfig, from_state_dict, save_pretrained

_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_CONFIG = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "rope.dimension_count",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
_OPTIONAL = ("num_key_value_heads", "head_dim", "rope_theta")
_SCALING = "llama.rope.scaling.type"
_CONTROL = 3  # token type of special tokens such as <|endoftext|>


def load(path: Path, quantization: q4jax.QuantConfig | None = None) -> Llama:
    """Load the model, in float32 or quantized tensor by tensor.

    Raises:
      NotImplementedError: its architecture or rotary embedding is not SmolLM2's.
      ValueError: the header has a value out of range.
    """
    reader = gguf.GGUFReader(path)
    config = read_config(reader)
    return from_state_dict(config, GGUFTensors(reader, config), quantization)


def directory(path: Path) -> Path:
    """Return the model as a Hugging Face directory in nf4, beside its file; write it once.

    Raises:
      NotImplementedError, ValueError: as `load`.
    """
    target = path.with_suffix(".nf4")
    if not target.is_dir():
        model = load(path, q4jax.QuantConfig())
        save_pretrained(model, target, tokenizer=load_tokenizer(path))
        config = json.dumps({"eos_token": "<|endoftext|>"})
        (target / "tokenizer_config.json").write_text(config)
    return target


def load_tokenizer(path: Path) -> Tokenizer:
    """Load the model's byte-level BPE tokenizer.

    Raises:
      NotImplementedError: the tokenizer is not SmolLM2's.
    """
    reader = gguf.GGUFReader(path)
    name = (field(reader, "tokenizer.ggml.model"), field(reader, "tokenizer.ggml.pre"))
    if name != ("gpt2", "smollm"):
        raise NotImplementedError(f"tokenizer {name}: only ('gpt2', 'smollm') is read")
    tokens = field(reader, "tokenizer.ggml.tokens")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = field(reader, "tokenizer.ggml.token_type")
    special = [token for token, type_ in zip(tokens, types, strict=True) if type_ == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return tokenizer


def field(reader: gguf.GGUFReader, name: str) -> Any:
    """Return the value of an entry of the metadata."""
    return entry(reader, name).contents()


def entry(reader: gguf.GGUFReader, name: str) -> gguf.ReaderField:
    """Return an entry of the metadata; ValueError if it is missing."""
    if name not in reader.fields:
        raise ValueError(f"the GGUF file has no {name!r}")
    return reader.fields[name]


def read_config(reader: gguf.GGUFReader) -> LlamaConfig:
    """Return the config that the metadata describes."""
    if field(reader, "general.architecture") != "llama" or _SCALING in reader.fields:
        raise NotImplementedError("only GGUF files of plain llama models are read")

    entries = {
        "vocab_size": len(entry(reader, "tokenizer.ggml.tokens").data),
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
    }
    for hf, ggml in _CONFIG.items():
        if f"llama.{ggml}" in reader.fields or hf not in _OPTIONAL:
            entries[hf] = field(reader, f"llama.{ggml}")
    # The checks of a config.json hold for these values, too.
    config = LlamaConfig.from_hf({"model_type": "llama", **entries})
    if config.num_hidden_layers > len(reader.tensors):
        raise ValueError(
            f"llama.block_count={config.num_hidden_layers} in a file of {len(reader.tensors)} "
            "tensors"
        )
    return config


class GGUFTensors(Mapping[str, np.ndarray]):
    """The tensors of a GGUF file by Hugging Face's name, dequantized to float32 on lookup."""

    def __init__(self, reader: gguf.GGUFReader, config: LlamaConfig):
        stored = {tensor.name: tensor for tensor in reader.tensors}
        names = dict(_TOP)
        for layer in range(config.num_hidden_layers):
            for hf, ggml in _LAYER.items():
                names[f"model.layers.{layer}.{hf}.weight"] = f"blk.{layer}.{ggml}.weight"
        self._tensors = {hf: stored.pop(ggml) for hf, ggml in names.items() if ggml in stored}
        self._tensors |= stored  # other tensors keep their names, so that loading refuses them
        self._head_dim = config.head_dim

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        value = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            if value.shape[0] % self._head_dim:
                raise ValueError(f"{name} has {value.shape[0]} rows for heads of {self._head_dim}")
            # Features of a rotary pair are adjacent in GGUF, half a head apart in Hugging Face.
            pairs = value.reshape(-1, self._head_dim // 2, 2, value.shape[-1])
            value = pairs.swapaxes(1, 2).reshape(value.shape)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
