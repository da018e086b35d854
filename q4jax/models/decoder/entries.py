"""The entries of a `config.json`, checked when they are read, with the names that were read."""

import math
from collections.abc import Mapping
from typing import Any

from q4jax.models.decoder import config_values as values

MAX_LAYERS = 10_000
FULL, SLIDING = "full_attention", "sliding_attention"
ALL_SLIDE = -1  # in place of the period of layers that attend fully


class Entries:
    """A view of the entries. Missing ones have the family's default; null is none.

    Attributes:
      used: the names that were looked up.
    """

    def __init__(self, given: Mapping[str, Any], defaults: Mapping[str, Any]):
        self._given = given
        self._defaults = defaults
        self.used: set[str] = set()

    def get(self, *names: str) -> Any:
        """Return the first of these entries that is not null, or the first default, or None."""
        self.used.update(names)
        given = any(name in self._given for name in names)
        found = self._given if given else self._defaults
        return next((found[name] for name in names if found.get(name) is not None), None)

    def is_given(self, *names: str) -> bool:
        """Return whether one of these entries is there, not as a default."""
        self.used.update(names)
        return any(self._given.get(name) is not None for name in names)

    def _required(self, *names: str) -> Any:
        found = self.get(*names)
        if found is None:
            raise ValueError(f"config.json of a {self._given.get('model_type')} lacks {names[0]!r}")
        return found

    def size(self, *names: str) -> int:
        """Return a positive integer."""
        return values.size(names[0], self._required(*names))

    def optional_size(self, *names: str) -> int | None:
        """Return a positive integer, or None where there is none, or 0."""
        found = self.get(*names)
        return None if found is None or found == 0 else values.size(names[0], found)

    def integer(self, name: str) -> int:
        """Return an integer from 0 on."""
        found = self._required(name)
        return 0 if type(found) is int and found == 0 else values.size(name, found)

    def integers(self, name: str) -> list[int]:
        """Return a list of integers; empty where there is none."""
        found = self.get(name) or []
        if not isinstance(found, list) or not all(type(value) is int for value in found):
            raise ValueError(f"{name} must be a list of integers, got {found!r}")
        return found

    def number(self, *names: str) -> float:
        """Return a positive number."""
        return values.number(names[0], self._required(*names))

    def optional_number(self, *names: str) -> float | None:
        """Return a positive number, or None where there is none."""
        found = self.get(*names)
        return None if found is None else values.number(names[0], found)

    def flag(self, name: str) -> bool:
        """Return a boolean; False where there is none."""
        found = self.get(name)
        return False if found is None else values.flag(name, found)

    def section(self, name: str) -> "Entries":
        """Return the entries in an entry."""
        found = self.get(name) or {}
        if not isinstance(found, Mapping):
            raise ValueError(f"{name} must be an object, got {found!r}")
        return Entries(found, {})

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.size("hidden_size", "n_embd", "d_model")

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self.size("num_attention_heads", "n_head", "n_heads")

    @property
    def even_head_dim(self) -> int:
        """The width of the residual stream by the number of heads."""
        if self.hidden < self.heads:
            raise ValueError(f"{self.hidden} features cannot be split between {self.heads} heads")
        return self.hidden // self.heads

    @property
    def layers(self) -> int:
        """Number of layers."""
        count = self.size("num_hidden_layers", "n_layer", "n_layers")
        if count > MAX_LAYERS:  # checked before lists of this length are built
            raise ValueError(f"num_hidden_layers must be at most {MAX_LAYERS}, got {count}")
        return count

    @property
    def own_keys(self) -> int:
        """Number of the first layers, which have keys and values of their own (Gemma 4)."""
        return self.layers - (self.optional_size("num_kv_shared_layers") or 0)

    @property
    def context(self) -> int:
        """The largest number of positions; 2048 where it is not said."""
        return self.context_or_none or 2048

    @property
    def context_or_none(self) -> int | None:
        """The largest number of positions; None: it is not said."""
        names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
        return self.optional_size(*names)

    def layer_type(self, layer: int, every: int) -> str:
        """Return the type of a layer; without `layer_types`, each layer of `every` is full."""
        types = self.get("layer_types")
        if types is None:
            pattern = self.get("sliding_window_pattern", "_sliding_window_pattern")
            every = pattern if type(pattern) is int else every
            if every == ALL_SLIDE:
                return SLIDING if self.get("sliding_window") else FULL
            return FULL if not every or (layer + 1) % every == 0 else SLIDING
        if not isinstance(types, list) or len(types) != self.layers:
            raise ValueError(f"layer_types must be a list of {self.layers} texts, got {types!r}")
        return str(types[layer])

    def has_rope(self, layer: int) -> bool:
        """Return whether a layer has rotary embeddings, by `no_rope_layers`, which is 0 if not."""
        found, interval = self.integers("no_rope_layers"), self.size("no_rope_layer_interval")
        if found and len(found) != self.layers:
            raise ValueError(f"no_rope_layers must have {self.layers} entries, got {found}")
        return bool(found[layer]) if found else (layer + 1) % interval != 0

    def rope_entry(self, name: str) -> float:
        """Return a number of `rope_parameters`."""
        return self.section("rope_parameters").number(name)

    def alibi_slopes(self, kind: str) -> tuple[float, ...]:
        """Return the slope of each head's bias, as Bloom or MPT has them.

        Heads beyond a power of two take slopes between those of the others. Falcon scales Bloom's
        as its products.
        """
        heads = self.heads
        if kind == "mpt":
            largest = self.section("attn_config").optional_number("alibi_bias_max") or 8.0
            power = 2 ** math.ceil(math.log2(heads))
            slopes = [2.0 ** -(largest * i / power) for i in range(1, power + 1)]
            return tuple((slopes[1::2] + slopes[::2])[:heads] if power != heads else slopes)
        power = 2 ** math.floor(math.log2(heads))
        slopes = [2.0 ** (-8 * i / power) for i in range(1, power + 1)]
        slopes += [2.0 ** (-8 * i / (2 * power)) for i in range(1, 2 * (heads - power), 2)]
        scale = self.even_head_dim**-0.5 if kind == "falcon" else 1.0
        return tuple(slope * scale for slope in slopes)

    def two_falcon_norms(self) -> bool:
        """Return whether a parallel layer of Falcon has a norm for each of its branches."""
        new = self.flag("new_decoder_architecture")
        return new and self.get("num_ln_in_parallel_attn") in (None, 2)

    def in_ernie_mixture(self, layer: int) -> bool:
        """Return whether a layer of Ernie 4.5 has experts."""
        last = self.get("moe_layer_end_index")
        end = self.layers - 1 if last in (None, -1) else self.integer("moe_layer_end_index")
        step = self.optional_size("moe_layer_interval") or 1
        first = self.optional_size("moe_layer_start_index") or 0
        return (layer + 1) % step == 0 and first <= layer <= end
