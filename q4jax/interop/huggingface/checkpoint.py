"""The weights of a Hugging Face directory, read when looked up."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from q4jax.convert.config import QuantConfig
from q4jax.core.spec import QuantSpec
from q4jax.core.state import QuantState
from q4jax.interop.bitsandbytes.tensors import report_extra
from q4jax.interop.bitsandbytes.weight_keys import (
    check_codes,
    read_spec,
    read_state,
    read_weight,
    sort_names,
)
from q4jax.interop.huggingface.directory import CONFIG, DirectoryTensors, quantization_of, read_json
from q4jax.interop.placement import Placement
from q4jax.ops.params import Params4bit


class Checkpoint(Mapping[str, "Params4bit | np.ndarray"]):
    """A directory with `config.json` and safetensors: weight by name, read when looked up.

    Args:
      path: the directory; `model.safetensors`, or `model.safetensors.index.json` and its shards.
      strict: False: keys below 4-bit weights that mean nothing are left out with a UserWarning.

    Attributes:
      config: the content of `config.json`.
      quantization: how the directory says it is quantized; None: it is in full precision.
      specs: description of each 4-bit weight.
      leads: its leading axes.

    Raises:
      FileNotFoundError: `config.json`, or a file with tensors, is not there.
      ValueError: a file is malformed; a 4-bit weight is incomplete, or not what `config.json` says.
      NotImplementedError: quantized by another method; it is named.
    """

    def __init__(self, path: str | os.PathLike[str], *, strict: bool = True):
        folder = Path(path)
        if not (folder / CONFIG).is_file():
            raise FileNotFoundError(f"{folder} is no Hugging Face model: it has no {CONFIG}")
        self.config: dict[str, Any] = read_json(folder / CONFIG)
        self.quantization: QuantConfig | None = quantization_of(self.config, folder / CONFIG)
        self.tensors = DirectoryTensors(folder)
        contents = sort_names(self.tensors.layouts)
        report_extra(contents.extra, strict)
        self._groups = contents.weights
        self._names = dict.fromkeys([*contents.weights, *contents.others])
        found = {name: read_spec(group, self.tensors) for name, group in contents.weights.items()}
        self.specs: dict[str, QuantSpec] = {name: spec for name, (spec, _) in found.items()}
        self.leads: dict[str, tuple[int, ...]] = {name: lead for name, (_, lead) in found.items()}
        self._compare(folder / CONFIG)

    def _compare(self, where: Path) -> None:
        """ValueError where `config.json` and the tensors differ in how they are quantized."""
        said = self.quantization
        if said is None and self.specs:
            name, spec = next(iter(self.specs.items()))
            raise ValueError(f"{where} has no quantization_config, but {name} is {spec.tag()}")
        for name, spec in self.specs.items():
            if said and (said.quant_type, said.compress_statistics) != (
                (spec.quant_type, spec.nested)
            ):
                nested = f"bnb_4bit_use_double_quant={said.compress_statistics}"
                raise ValueError(
                    f"{where} says {said.quant_type}, {nested}, but {name} is {spec.tag()}"
                )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.tensors.layouts.values())

    def bytes_of(self, name: str) -> int:
        """Bytes of one weight, statistics included."""
        group = self._groups.get(name)
        keys = [name, *(group.statistics.values() if group else ())]
        return sum(self.tensors.layouts[key].nbytes for key in keys)

    def __getitem__(self, name: str) -> Params4bit | np.ndarray:
        return self.read(name, None)

    def read(self, name: str, sharding: Placement | None) -> Params4bit | np.ndarray:
        """A 4-bit weight on its devices, or another tensor in numpy."""
        group = self._groups.get(name)
        return self.tensors[name] if group is None else read_weight(group, self.tensors, sharding)

    def read_state(self, name: str) -> QuantState:
        """The statistics of a 4-bit weight whose codes `read_into` will give."""
        state = read_state(self._groups[name], self.tensors)
        check_codes(name, self.tensors.layouts[name], state)
        return state

    def read_into(self, name: str, out: np.ndarray) -> None:
        """The bytes of a tensor, or the codes of a 4-bit weight, into memory of that size."""
        self.tensors.read_into(name, out)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names
