"""`AdapterBank`: adapters by name for one model, switched without compiling anything again."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from q4jax.lora.adapter import Adapter

Pairs = dict[str, tuple[Array, Array]]
"""`lora_a` and `lora_b` by the path of the adapter."""


class AdapterBank:
    """Named adapters of one model, all of the model's shapes.

    The one in the model is active. A switch writes other values into the same Variables, so that
    functions which `nnx.jit` has compiled for the model run on without compiling again. Each
    adapter needs an optimizer of its own.

    Args:
      model: with adapters (`add_lora`), which become the first of the bank.
      name: theirs.

    Raises:
      ValueError: the model has no adapter.

    Example:
      >>> import jax.numpy as jnp, q4jax
      >>> from flax import nnx
      >>> model = q4jax.quantize_model(nnx.Linear(64, 32, rngs=nnx.Rngs(0)))
      >>> model = q4jax.add_lora(model, rank=8, alpha=16)
      >>> bank = q4jax.AdapterBank(model, "prose")
      >>> bank.add("verse")
      >>> bank.switch("verse")
      >>> model.lora_b[...] = jnp.ones((8, 32))  # trained
      >>> bank.switch("prose")
      >>> float(model.lora_b[0, 0]), bank.active, list(bank)
      (0.0, 'prose', ['prose', 'verse'])
    """

    def __init__(self, model: nnx.Module, name: str = "default"):
        self._adapters = _adapters(model)
        self._kept: dict[str, Pairs] = {name: self._read()}
        self.active = name

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def add(
        self, name: str, source: nnx.Module | None = None, *, rngs: nnx.Rngs | None = None
    ) -> None:
        """Puts another adapter into the bank, without switching to it.

        Args:
          name: a new one.
          source: a model with adapters at the same places, such as `interop.peft.load_adapters`
            gives. Lower ranks are filled up with zeros and other scales are put into `lora_b`, so
            that one program serves all. None: a new adapter, which changes nothing until trained.
          rngs: random streams of a new adapter; None: `nnx.Rngs(0)`.

        Raises:
          ValueError: the name is taken; the adapters are at other places, of a higher rank or of
            other sizes.
        """
        if name in self._kept:
            raise ValueError(f"an adapter is named {name!r} already: {list(self._kept)}")
        streams = nnx.Rngs(0) if rngs is None else rngs
        if source is None:
            self._kept[name] = {p: a.start(streams) for p, a in self._adapters.items()}
            return
        others = _adapters(source)
        if others.keys() != self._adapters.keys():
            differ = sorted(others.keys() ^ self._adapters.keys())
            raise ValueError(f"{name!r}: only one of the two models has an adapter at {differ}")
        self._kept[name] = {p: _fit(p, others[p], a) for p, a in self._adapters.items()}

    def remove(self, name: str) -> None:
        """Forgets an adapter; ValueError for one that is active or not there."""
        if name == self.active:
            raise ValueError(f"{name!r} is active; switch to another first")
        self._require(name)
        del self._kept[name]

    def switch(self, name: str) -> None:
        """Puts the adapter of that name into the model, and keeps the one that was there.

        Raises:
          ValueError: there is none of that name.
        """
        self._require(name)
        self._kept[self.active] = self._read()
        for path, adapter in self._adapters.items():
            adapter.lora_a[...], adapter.lora_b[...] = self._kept[name][path]
        self.active = name

    def _require(self, name: str) -> None:
        if name not in self._kept:
            raise ValueError(f"no adapter is named {name!r}, but {list(self._kept)}")

    def _read(self) -> Pairs:
        return {p: (a.lora_a[...], a.lora_b[...]) for p, a in self._adapters.items()}


def _adapters(model: nnx.Module) -> dict[str, Any]:
    """The adapters of a model themselves, not of a copy, by dotted path."""
    found = {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Adapter)
    }
    if not found:
        raise ValueError("the model has no adapter; add_lora makes them")
    return found


def _fit(path: str, other: Any, mine: Any) -> tuple[Array, Array]:
    """The values of another adapter for the rank, scale and dtype of mine."""
    (lead, inputs, outputs), rank = mine.sizes(), mine.rank
    if other.sizes() != mine.sizes() or other.rank > rank:
        raise ValueError(
            f"{path}: an adapter of {other.sizes()} and rank {other.rank} does not fit one of "
            f"{mine.sizes()} and rank {rank}"
        )
    a = jnp.zeros((*lead, inputs, rank), mine.lora_a.dtype)
    b = jnp.zeros((*lead, rank, outputs), mine.lora_b.dtype)
    scaled = other.lora_b[...].astype(jnp.float32) * (other.scale / mine.scale)
    a = a.at[..., : other.rank].set(other.lora_a[...].astype(a.dtype))
    b = b.at[..., : other.rank, :].set(scaled.astype(b.dtype))
    where = mine.lora_a[...].sharding
    return jax.device_put(a, where), jax.device_put(b, mine.lora_b[...].sharding)
