"""Pretrained weights of a `q4jax.models.Llama`, from and to Hugging Face directories.

`from_pretrained` and `save_pretrained` convert directories, `from_state_dict` arrays in memory.
"""

from q4jax.models.pretrained.load import from_pretrained, from_state_dict
from q4jax.models.pretrained.save import save_pretrained

__all__ = ["from_pretrained", "from_state_dict", "save_pretrained"]
