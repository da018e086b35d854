"""The table of families: how each `model_type` of Hugging Face differs from Llama.

To add a family that combines known features, add an entry to one of the three tables. A value is
what all models of the family have. A function of the entries of `config.json` (`Entries`) gives
what one model has.
"""

from collections.abc import Mapping

from q4jax.models.decoder.families.family import Family, Mixture
from q4jax.models.decoder.families.gpt_like import GPT
from q4jax.models.decoder.families.llama_like import DENSE
from q4jax.models.decoder.families.mixtures import MIXED

FAMILIES: Mapping[str, Family] = {**DENSE, **GPT, **MIXED}

__all__ = ["FAMILIES", "Family", "Mixture"]
