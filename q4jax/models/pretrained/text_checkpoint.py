"""The checkpoint of a text model, alone or in the directory of a vision-language model."""

import logging
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from q4jax.core.state import QuantState
from q4jax.interop.huggingface.checkpoint import Checkpoint
from q4jax.interop.placement import Placement
from q4jax.models.decoder.text_models import text_entries, text_names
from q4jax.ops.params import Params4bit

_LOG = logging.getLogger("q4jax")
_CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "Model")


class TextCheckpoint(Checkpoint):
    """The checkpoint of a causal language model, under the names of that model alone.

    The tensors of other parts, in the directory of a vision-language model, are left out.

    Raises:
      NotImplementedError: `config.json` says that the model has another head.
    """

    def __init__(self, path: str | os.PathLike[str]):
        super().__init__(path)
        self._require_causal(path)
        stored = list(super().__iter__())
        self._stored, others = dict(zip(stored, stored, strict=True)), list[str]()
        if "text_config" in self.config or str(self.config.get("model_type")).endswith("_vl"):
            self._stored, others = text_names(stored)
        self.specs = {
            name: self.specs[old] for name, old in self._stored.items() if old in self.specs
        }
        self.config = text_entries(self.config)
        if others:
            _LOG.info(
                "%s: %d tensors of other parts than the text model are not read: %s, …",
                path,
                len(others),
                others[0],
            )

    def _require_causal(self, path: str | os.PathLike[str]) -> None:
        names = self.config.get("architectures") or []
        if isinstance(names, list) and names and not str(names[0]).endswith(_CAUSAL):
            raise NotImplementedError(
                f"{path} is a {names[0]}; q4jax.models serves causal language models, whose class "
                f"ends with {', '.join(_CAUSAL)}"
            )

    def layout(self, name: str) -> Any:
        """Return the dtype and shape of a dense tensor, which is not read."""
        return super().layout(self._stored[name])

    @property
    def nbytes(self) -> int:
        """Size of the text model's tensors in bytes."""
        return sum(self.bytes_of(name) for name in self._stored)

    def bytes_of(self, name: str) -> int:
        """Return the size of one weight in bytes, its statistics included."""
        return super().bytes_of(self._stored[name])

    def read(self, name: str, sharding: Placement | None) -> Params4bit | np.ndarray:
        """Return a 4-bit weight on its devices, or a dense tensor as a NumPy array."""
        return super().read(self._stored[name], sharding)

    def read_state(self, name: str) -> QuantState:
        """Return the statistics of a 4-bit weight."""
        return super().read_state(self._stored[name])

    def read_into(self, name: str, out: np.ndarray) -> None:
        """Read a dense tensor, or the codes of a 4-bit weight, into an array."""
        super().read_into(self._stored[name], out)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __contains__(self, name: object) -> bool:
        return name in self._stored
