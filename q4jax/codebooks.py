"""The tables of the number formats, public; `q4jax.core.codebooks` defines them."""

from q4jax.core.codebooks import (
    BLOCKSIZES,
    CODEBOOKS,
    DYNAMIC_MAP,
    DYNAMIC_THRESHOLDS,
    NESTED_BLOCKSIZE,
    Codebook,
    QuantType,
)

__all__ = [
    "BLOCKSIZES",
    "CODE",
    "CODEBOOKS",
    "DYNAMIC_MAP",
    "DYNAMIC_THRESHOLDS",
    "NESTED_BLOCKSIZE",
    "QUANT_TYPES",
    "SORTED_CODES",
    "THRESHOLDS",
    "Codebook",
    "QuantType",
]

QUANT_TYPES = tuple(CODEBOOKS)
CODE = {name: book.values for name, book in CODEBOOKS.items()}
SORTED_CODES = {name: book.sorted_codes for name, book in CODEBOOKS.items()}
THRESHOLDS = {name: book.thresholds for name, book in CODEBOOKS.items()}
