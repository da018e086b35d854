"""The files of a Hugging Face directory: tensors in one file or in shards with an index."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from q4jax.interop.files import read_json, write_json
from q4jax.interop.safetensors.reader import Entry, TensorFile
from q4jax.interop.safetensors.writer import write_file

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}\.safetensors")


class DirectoryTensors(Mapping[str, np.ndarray]):
    """The tensors of `model.safetensors`, or of the shards in its index, by name.

    Creating it reads the headers; each lookup reads one tensor.

    Args:
      folder: the directory.

    Raises:
      FileNotFoundError: `model.safetensors` and its index are both missing, or a shard is.
      ValueError: index and shards name different tensors, the index names a file outside the
        directory, or a file is malformed.
    """

    def __init__(self, folder: Path):
        if (folder / SINGLE).is_file():
            shards, index = [SINGLE], None
        elif (folder / INDEX).is_file():
            index = _read_index(folder / INDEX)
            shards = sorted(set(index.values()))
        else:
            raise FileNotFoundError(f"{folder} has neither {SINGLE} nor {INDEX}")
        absent = [name for name in shards if not (folder / name).is_file()]
        if absent:
            raise FileNotFoundError(f"{INDEX} lists shards that are not in {folder}: {absent}")

        self._files: dict[str, TensorFile] = {}
        for shard in shards:
            file = TensorFile(folder / shard)
            for name in file:
                if index is not None and index.get(name) != shard:
                    raise ValueError(f"{shard} holds {name!r}, which {INDEX} does not place there")
                self._files[name] = file
        lost = sorted(set(index or ()) - set(self._files))
        if lost:
            raise ValueError(f"{INDEX} names tensors that no shard holds: {lost}")
        self.layouts: dict[str, Entry] = {n: f.entries[n] for n, f in self._files.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._files[name][name]

    def read_into(self, name: str, out: np.ndarray) -> None:
        """Read the bytes of a tensor into `out`, a contiguous array of the same size."""
        self._files[name].read_into(name, out)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _read_index(path: Path) -> dict[str, str]:
    """Return the shard of each tensor."""
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise ValueError(f"{path} must have a weight_map from tensors to files")
    for name, shard in index.items():
        # Paths are refused: the index is untrusted and must not name files elsewhere.
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            raise ValueError(
                f"{path}: {name!r} is in {shard!r}, which is not a safetensors file here"
            )
    return index


def check_empty(folder: Path) -> None:
    """Raise FileExistsError if a directory holds a checkpoint."""
    for pattern in (CONFIG, "*.safetensors", INDEX):
        found = sorted(folder.glob(pattern))
        if found:
            raise FileExistsError(f"{found[0]} exists already; give a directory without it")


def write_directory(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    groups: Mapping[str, str],
    max_shard_bytes: int,
) -> None:
    """Write `config.json` and one file of tensors, or shards and their index.

    `config.json` is written last, so that an interrupted write leaves no valid model.

    Args:
      folder: the directory; created if missing.
      config: the content of `config.json`.
      tensors: arrays by name.
      groups: for each statistic of a 4-bit weight, the name of the weight; a shard holds all
        tensors of a weight.
      max_shard_bytes: the largest size of a shard of more than one weight.

    Raises:
      FileExistsError: the directory holds a checkpoint.
    """
    check_empty(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards = _shards(tensors, groups, max_shard_bytes)
    metadata = {"format": "pt"}  # transformers refuses files without it
    if len(shards) == 1:
        write_file(folder / SINGLE, tensors, metadata=metadata)
    else:
        weight_map: dict[str, str] = {}
        for number, names in enumerate(shards, start=1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            write_file(folder / file, {name: tensors[name] for name in names}, metadata=metadata)
            weight_map |= dict.fromkeys(names, file)
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / INDEX, index)
    write_json(folder / CONFIG, dict(config))


def _shards(
    tensors: Mapping[str, np.ndarray], groups: Mapping[str, str], limit: int
) -> list[list[str]]:
    weights: dict[str, list[str]] = {}
    for name in tensors:
        weights.setdefault(groups.get(name, name), []).append(name)
    shards: list[list[str]] = [[]]
    filled = 0
    for names in weights.values():
        size = sum(tensors[name].nbytes for name in names)
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1] += names
        filled += size
    return shards
