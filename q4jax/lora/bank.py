"""`AdapterBank`: named adapters of one model, switched without compiling again."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from q4jax.lora.adapter import Adapter

Pairs = dict[str, tuple[Array, Array]]
"""`lora_a` and `lora_b` by the path of the adapter."""


class AdapterBank:
    """Named adapters of one model, all with the model's shapes.

    The adapter in the model is active. `set_adapter` writes the values of another one into the same
    Variables, so functions that `nnx.jit` has compiled for the model do not compile again. Each
    adapter needs an optimizer of its own.

    Args:
      model: a model with adapters (`add_lora`), which become the first of the bank.
      name: the name of these adapters.

    Raises:
      ValueError: the model has no adapter.
      NotImplementedError: an adapter has a magnitude (DoRA), which a bank does not switch.

    Examples:
      >>> import jax.numpy as jnp, q4jax
      >>> from flax import nnx
      >>> model = q4jax.quantize_model(nnx.Linear(64, 32, rngs=nnx.Rngs(0)))
      >>> model = q4jax.add_lora(model, rank=8, alpha=16)
      >>> bank = q4jax.AdapterBank(model, "prose")
      >>> bank.add("verse")
      >>> bank.set_adapter("verse")
      >>> model.lora_b[...] = jnp.ones((8, 32))  # trained
      >>> bank.set_adapter("prose")
      >>> float(model.lora_b[0, 0]), bank.active, list(bank)
      (0.0, 'prose', ['prose', 'verse'])
    """

    __module__ = "q4jax"

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
        """Add another adapter to the bank, without making it active.

        Args:
          name: the new adapter's name.
          source: a model with adapters on the same layers, such as `interop.peft.load_adapters`
            returns. A lower rank is padded with zeros and another scale is multiplied into
            `lora_b`, so that one program serves all. None makes a new adapter, which changes
            nothing until it is trained.
          rngs: random streams of a new adapter; None takes `nnx.Rngs(0)`.

        Raises:
          ValueError: the name is taken; the adapters are on other layers, or have a higher rank or
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
        """Remove an adapter; ValueError if it is active or does not exist."""
        if name == self.active:
            raise ValueError(f"{name!r} is active; switch to another first")
        self._require(name)
        del self._kept[name]

    def set_adapter(self, name: str) -> None:
        """Write an adapter into the model, and keep the values of the one that was active.

        Raises:
          ValueError: no adapter has this name.
        """
        self._require(name)
        self._kept[self.active] = self._read()
        for path, adapter in self._adapters.items():
            adapter.lora_a[...], adapter.lora_b[...] = self._kept[name][path]
        self.active = name

    switch = set_adapter

    def _require(self, name: str) -> None:
        if name not in self._kept:
            raise ValueError(f"no adapter is named {name!r}, but {list(self._kept)}")

    def _read(self) -> Pairs:
        return {p: (a.lora_a[...], a.lora_b[...]) for p, a in self._adapters.items()}


def _adapters(model: nnx.Module) -> dict[str, Any]:
    """Return the adapter modules of a model by dotted path, not those of a copy."""
    found = {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Adapter)
    }
    if not found:
        raise ValueError("the model has no adapter; add_lora makes them")
    for path, adapter in found.items():
        if adapter.magnitude is not None:
            raise NotImplementedError(f"{path}: a bank does not switch adapters with DoRA")
    return found


def _fit(path: str, other: Any, own: Any) -> tuple[Array, Array]:
    """Return the values of another adapter for the rank, scale and dtype of `own`."""
    (lead, inputs, outputs), rank = own.sizes(), own.rank
    if other.sizes() != own.sizes() or other.rank > rank:
        raise ValueError(
            f"{path}: an adapter of {other.sizes()} and rank {other.rank} does not fit one of "
            f"{own.sizes()} and rank {rank}"
        )
    a = jnp.zeros((*lead, inputs, rank), own.lora_a.dtype)
    b = jnp.zeros((*lead, rank, outputs), own.lora_b.dtype)
    scaled = other.lora_b[...].astype(jnp.float32) * _ratio(path, other, own)
    a = a.at[..., : other.rank].set(other.lora_a[...].astype(a.dtype))
    b = b.at[..., : other.rank, :].set(scaled.astype(b.dtype))
    a = jax.device_put(a, own.lora_a[...].sharding)
    return a, jax.device_put(b, own.lora_b[...].sharding)


def _ratio(path: str, other: Any, own: Any) -> Any:
    """Return the factor of `lora_b` between the scales of two adapters, for each layer of a stack.

    Raises:
      ValueError: a layer of `own` has no adapter, and that of `other` has one.
    """
    theirs, ours = np.asarray(other.scale), np.asarray(own.scale)
    theirs, ours = np.broadcast_arrays(theirs, ours)
    if np.any((ours == 0) & (theirs != 0)):
        raise ValueError(f"{path}: only one of the two models has an adapter on each layer")
    return np.divide(theirs, ours, out=np.zeros(ours.shape), where=ours != 0)[..., None, None]
