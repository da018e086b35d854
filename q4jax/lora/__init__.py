"""LoRA adapters on frozen layers, 4-bit or dense: `add_lora`, `merge_lora`, `AdapterBank`."""

from q4jax.lora.adapter import Adapter, LoRAEmbedding4bit, LoRALinear4bit
from q4jax.lora.bank import AdapterBank
from q4jax.lora.inject import add_lora
from q4jax.lora.merge import MergeErrors, merge_lora
from q4jax.lora.weight import LoRAWeight

__all__ = [
    "Adapter",
    "AdapterBank",
    "LoRAEmbedding4bit",
    "LoRALinear4bit",
    "LoRAWeight",
    "MergeErrors",
    "add_lora",
    "merge_lora",
]
