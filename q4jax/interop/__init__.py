"""Other people's files, in and out: bitsandbytes, Hugging Face, PEFT.

What is read may be hostile: every length, offset, name and number in a file is checked before
anything is allocated for it, and a file is taken whole or refused with a one-line error.
"""

from q4jax.interop.bitsandbytes import state_dict as bitsandbytes
from q4jax.interop.huggingface import load_save as huggingface
from q4jax.interop.peft import load_save as peft

__all__ = ["bitsandbytes", "huggingface", "peft"]
