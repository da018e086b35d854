"""Third-party checkpoint formats: bitsandbytes, Hugging Face and PEFT, read and written.

Files may be hostile: every length, offset, name and number is checked before memory is allocated
for it. A malformed file raises a one-line error and nothing is loaded.
"""

from q4jax.interop import bitsandbytes, huggingface, peft

__all__ = ["bitsandbytes", "huggingface", "peft"]
