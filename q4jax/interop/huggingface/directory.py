"""A Hugging Face directory: its JSON files, and its tensors from one file or from shards."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from q4jax.convert.config import QuantConfig
from q4jax.interop.safetensors.reader import Entry, TensorFile, parse_json
from q4jax.interop.safetensors.writer import Layout, write_file, write_json

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}\.safetensors")
# Of a JSON file: the index of the largest models takes 10 MB.
_MAX_JSON = 100_000_000


class DirectoryTensors(Mapping[str, np.ndarray]):
    """The tensors of `model.safetensors`, or of the shards that its index lists.

    Headers are read at first, a tensor each time that it is looked up.

    Raises:
      FileNotFoundError: neither file is there, or a shard that the index lists is not.
      ValueError: index and shards do not name the same tensors; the index names something that is
        no file of this directory; a file is malformed.
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
        """Reads the bytes of a tensor into `out`, contiguous and as large."""
        self._files[name].read_into(name, out)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of at most 100 MB.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is something else; the message names the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    size = path.stat().st_size
    if size > _MAX_JSON:
        raise ValueError(f"{path} has {size} bytes; JSON of up to {_MAX_JSON} is read")
    return parse_json(path.read_bytes(), str(path))


def _read_index(path: Path) -> dict[str, str]:
    """Shard by tensor."""
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise ValueError(f"{path} must have a weight_map from tensors to files")
    for name, shard in index.items():
        # A name, never a path: the index may come from anywhere.
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            raise ValueError(f"{path}: {name!r} is in {shard!r}, which is no safetensors file here")
    return index


def quantization_of(config: Mapping[str, Any], where: Path) -> QuantConfig | None:
    """How the tensors beside a `config.json` are quantized; None: they are not.

    Raises:
      NotImplementedError: by another method than bitsandbytes' 4 bits; it is named.
      ValueError: the entry is malformed.
    """
    entry = config.get("quantization_config")
    if entry is None:
        return None
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: quantization_config must be an object, got {entry!r}")
    method = entry.get("quant_method", "bitsandbytes")
    if method != "bitsandbytes":
        raise NotImplementedError(
            f"{where} is quantized already (quant_method={method!r}); q4jax reads bitsandbytes' "
            "4-bit checkpoints and those in full precision"
        )
    if entry.get("load_in_8bit") or entry.get("_load_in_8bit"):
        raise NotImplementedError(f"{where} is LLM.int8 (load_in_8bit), which is not supported")
    skip = entry.get("llm_int8_skip_modules")
    named = isinstance(skip, list) and all(isinstance(name, str) for name in skip)
    if skip is not None and not named:
        raise ValueError(f"{where}: llm_int8_skip_modules must be a list of names, got {skip!r}")
    try:
        return QuantConfig.from_bnb_config(entry)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def check_empty(folder: Path) -> None:
    """FileExistsError where a directory holds a checkpoint already."""
    for pattern in (CONFIG, "*.safetensors", INDEX):
        there = sorted(folder.glob(pattern))
        if there:
            raise FileExistsError(f"{there[0]} exists already; give a directory without it")


def write_directory(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    groups: Mapping[str, str],
    max_shard_bytes: int,
) -> None:
    """Writes one file, or shards of up to `max_shard_bytes` (or one weight) and their index.

    `config.json` comes last: without it, the directory is no model.

    Args:
      folder: made if it is not there.
      config: the content of `config.json`.
      tensors: name to array.
      groups: the weight that a tensor is a part of; they stay in one file.
      max_shard_bytes: size of a file.

    Raises:
      FileExistsError: a checkpoint is there already.
    """
    check_empty(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards = _shards(tensors, groups, max_shard_bytes)
    metadata = {"format": "pt"}  # what transformers expects to find
    if len(shards) == 1:
        write_file(folder / SINGLE, tensors, metadata=metadata)
    else:
        weight_map: dict[str, str] = {}
        for number, names in enumerate(shards, start=1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            write_file(folder / file, {name: tensors[name] for name in names}, metadata=metadata)
            weight_map |= dict.fromkeys(names, file)
        total = sum(Layout.of(tensor).nbytes for tensor in tensors.values())
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
