"""Hugging Face's safetensors files as a mapping from names to arrays, read when asked for."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class TensorFiles(Mapping[str, np.ndarray]):
    """The tensors of `model.safetensors`, or of the shards that its index lists.

    Files are memory-mapped; a tensor is copied out of them each time that it is looked up, nothing
    is kept.

    Raises:
      FileNotFoundError: neither file is there, or a shard that the index lists is not.
      ValueError: index and shards do not name the same tensors.
    """

    def __init__(self, folder: Path):
        if (folder / SINGLE).is_file():
            shards, index = [SINGLE], None
        elif (folder / INDEX).is_file():
            index = json.loads((folder / INDEX).read_text())["weight_map"]
            shards = sorted(set(index.values()))
        else:
            raise FileNotFoundError(f"{folder} has neither {SINGLE} nor {INDEX}")
        absent = [name for name in shards if not (folder / name).is_file()]
        if absent:
            raise FileNotFoundError(f"{INDEX} lists shards that are not in {folder}: {absent}")

        self._open: dict[str, Any] = {}
        for shard in shards:
            file: Any = safe_open(folder / shard, framework="numpy")
            for name in file.keys():  # noqa: SIM118 (not a mapping: it has no iterator)
                if index is not None and index.get(name) != shard:
                    raise ValueError(f"{shard} holds {name!r}, which {INDEX} does not place there")
                self._open[name] = file
        lost = sorted(set(index or ()) - set(self._open))
        if lost:
            raise ValueError(f"{INDEX} names tensors that no shard holds: {lost}")

    def __getitem__(self, name: str) -> np.ndarray:
        tensor: np.ndarray = self._open[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._open)

    def __len__(self) -> int:
        return len(self._open)


def write_tensors(tensors: Mapping[str, np.ndarray], folder: Path, max_shard_bytes: int) -> None:
    """Writes one file, or an index and shards of up to `max_shard_bytes` (or one tensor)."""
    shards: list[dict[str, np.ndarray]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = np.ascontiguousarray(tensor)
        filled += tensor.nbytes

    metadata = {"format": "pt"}  # what transformers expects to find
    if len(shards) == 1:
        save_file(shards[0], folder / SINGLE, metadata=metadata)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, metadata=metadata)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2))
