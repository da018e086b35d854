"""Language models in Flax NNX, of the families that `from_pretrained` lists.

`from_pretrained` loads a Hugging Face directory, in full precision or in 4 bits, and `generate`
continues prompts.
"""

import warnings
from typing import Any

from q4jax.models.decoder import Llama, LlamaConfig, LlamaShardings, cross_entropy
from q4jax.models.generation import generate
from q4jax.models.pretrained import from_pretrained, from_state_dict, save_pretrained

__all__ = [
    "Llama",
    "LlamaConfig",
    "LlamaShardings",
    "cross_entropy",
    "from_pretrained",
    "from_state_dict",
    "generate",
    "save_pretrained",
]

for _name in __all__:
    globals()[_name].__module__ = __name__  # reprs and pickles do not depend on the file


def __getattr__(name: str) -> Any:
    if name == "from_tensors":
        warnings.warn("from_tensors is now from_state_dict", DeprecationWarning, stacklevel=2)
        return from_state_dict
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
