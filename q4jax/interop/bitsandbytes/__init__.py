"""bitsandbytes' state dicts and safetensors files, read and written byte for byte.

`load_file` and `save_file` convert files, `from_state_dict` and `to_state_dict` dicts in memory;
`load_state_dict` fills an NNX model, and `named_parameters` names its weights.
"""

from q4jax.interop.bitsandbytes.nnx_module import load_state_dict, named_parameters
from q4jax.interop.bitsandbytes.state_dict import (
    from_state_dict,
    load_file,
    save_file,
    to_state_dict,
)

__all__ = [
    "from_state_dict",
    "load_file",
    "load_state_dict",
    "named_parameters",
    "save_file",
    "to_state_dict",
]
