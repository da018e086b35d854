"""A lazy reader of the weights of a Hugging Face directory."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from q4jax.convert.config import QuantConfig
from q4jax.core.spec import QuantSpec
from q4jax.core.state import QuantState
from q4jax.interop.bitsandbytes.tensors import (
    check_codes,
    read_spec,
    read_state,
    read_weight,
    report_extra,
)
from q4jax.interop.bitsandbytes.weight_keys import group_keys
from q4jax.interop.files import read_json
from q4jax.interop.huggingface.directory import CONFIG, DirectoryTensors
from q4jax.interop.huggingface.quantization_config import read_quantization
from q4jax.interop.placement import Placement
from q4jax.ops.params import Params4bit


class Checkpoint(Mapping[str, "Params4bit | np.ndarray"]):
    """The weights of a Hugging Face directory by name, each read when looked up.

    Args:
      path: a directory with `config.json` and `model.safetensors`, or shards and
        `model.safetensors.index.json`.
      strict: whether unknown keys below 4-bit weights are an error; False: they are skipped with a
        UserWarning.

    Attributes:
      config: the content of `config.json`.
      quantization: how `config.json` says the weights are quantized; None: in full precision.
      specs: the `QuantSpec` of each 4-bit weight by name.
      leads: the leading axes of each 4-bit weight by name.

    Raises:
      FileNotFoundError: `config.json` or a file of tensors is missing.
      ValueError: a file is malformed, a 4-bit weight is incomplete, or a weight and `config.json`
        differ.
      NotImplementedError: the quantization method is not supported; the message names it.
    """

    def __init__(self, path: str | os.PathLike[str], *, strict: bool = True):
        folder = Path(path)
        if not (folder / CONFIG).is_file():
            raise FileNotFoundError(f"{folder} is not a Hugging Face model: it has no {CONFIG}")
        self.config: dict[str, Any] = read_json(folder / CONFIG)
        self.quantization: QuantConfig | None = read_quantization(self.config, folder / CONFIG)
        self.tensors = DirectoryTensors(folder)
        contents = group_keys(self.tensors.layouts)
        report_extra(contents.extra, strict)
        self._groups = contents.weights
        self._names = dict.fromkeys([*contents.weights, *contents.others])
        found = {name: read_spec(group, self.tensors) for name, group in contents.weights.items()}
        self.specs: dict[str, QuantSpec] = {name: spec for name, (spec, _) in found.items()}
        self.leads: dict[str, tuple[int, ...]] = {name: lead for name, (_, lead) in found.items()}
        self._compare(folder / CONFIG)

    def _compare(self, path: Path) -> None:
        """Raise ValueError if `config.json` and the tensors disagree on the quantization."""
        stated = self.quantization
        if stated is None and self.specs:
            name, spec = next(iter(self.specs.items()))
            raise ValueError(f"{path} has no quantization_config, but {name} is {spec.tag()}")
        for name, spec in self.specs.items():
            if stated and (stated.quant_type, stated.compress_statistics) != (
                (spec.quant_type, spec.nested)
            ):
                nested = f"bnb_4bit_use_double_quant={stated.compress_statistics}"
                raise ValueError(
                    f"{path} says {stated.quant_type}, {nested}, but {name} is {spec.tag()}"
                )

    def layout(self, name: str) -> Any:
        """Return the dtype and shape of a dense tensor, which is not read."""
        return self.tensors.layouts[name]

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(entry.nbytes for entry in self.tensors.layouts.values())

    def bytes_of(self, name: str) -> int:
        """Return the size of one weight in bytes, its statistics included."""
        group = self._groups.get(name)
        keys = [name, *(group.statistics.values() if group else ())]
        return sum(self.tensors.layouts[key].nbytes for key in keys)

    def __getitem__(self, name: str) -> Params4bit | np.ndarray:
        return self.read(name, None)

    def read(self, name: str, sharding: Placement | None) -> Params4bit | np.ndarray:
        """Return a 4-bit weight on its devices, or a dense tensor as a NumPy array."""
        group = self._groups.get(name)
        return self.tensors[name] if group is None else read_weight(group, self.tensors, sharding)

    def read_state(self, name: str) -> QuantState:
        """Return the statistics of a 4-bit weight; `read_into` reads its codes."""
        state = read_state(self._groups[name], self.tensors)
        check_codes(name, self.tensors.layouts[name], state)
        return state

    def read_into(self, name: str, out: np.ndarray) -> None:
        """Read a dense tensor, or the codes of a 4-bit weight, into an array of the same size."""
        self.tensors.read_into(name, out)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names
