"""The files of a Hugging Face directory: tensors in one file or in shards with an index."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from q4jax.disk import new_file, whole_directory
from q4jax.interop.files import encode_json, read_json
from q4jax.interop.safetensors.reader import Entry, TensorFile
from q4jax.interop.safetensors.writer import layout_of, plan_file

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# More files than this are not held open: systems allow 256 and more to a process.
_HELD = 64
# The names that are read; Diffusers' are the second.
SINGLES = (SINGLE, "diffusion_pytorch_model.safetensors")
INDEXES = tuple(f"{name}.index.json" for name in SINGLES)
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}\.safetensors")


class DirectoryTensors(Mapping[str, np.ndarray]):
    """The tensors of one file, or of the shards in an index, by name.

    Creating it reads the headers; each lookup reads one tensor. All tensors of a shard are taken,
    as transformers does, also those that the index does not list.

    Args:
      folder: the directory, with files named as transformers or Diffusers names them.

    Raises:
      FileNotFoundError: there is neither a file of tensors nor an index, or a shard is missing.
      ValueError: the index names a tensor that no shard holds or a file outside the directory; two
        shards hold one tensor, and the index names neither; or a file is malformed.
    """

    def __init__(self, folder: Path):
        single, path = (
            next((folder / name for name in names if (folder / name).is_file()), None)
            for names in (SINGLES, INDEXES)
        )
        if single is not None:
            shards, index = [single.name], {}
        elif path is not None:
            index = _read_index(path)
            shards = sorted(set(index.values()))
        else:
            raise FileNotFoundError(f"{folder} has neither {SINGLE} nor {INDEX}")
        absent = [name for name in shards if not (folder / name).is_file()]
        if absent:
            raise FileNotFoundError(f"the index lists shards that are not in {folder}: {absent}")

        self._files: dict[str, TensorFile] = {}
        homes: dict[str, str] = {}
        for shard in shards:
            file = TensorFile(folder / shard, hold=len(shards) <= _HELD)
            for name in file:
                if name in homes and index.get(name) not in (shard, homes[name]):
                    raise ValueError(f"{homes[name]} and {shard} both hold {name!r}")
                if name not in homes or index[name] == shard:
                    self._files[name], homes[name] = file, shard
        lost = sorted(set(index) - set(self._files))
        if lost:
            raise ValueError(f"the index names tensors that no shard holds: {lost}")
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
    files: Mapping[str, bytes],
) -> None:
    """Write `config.json`, one file of tensors or shards and their index, and other files.

    They appear together, once all of them are on disk.

    Args:
      folder: the directory; created if missing.
      config: the content of `config.json`.
      tensors: arrays by name.
      groups: for each statistic of a 4-bit weight, the name of the weight; a shard holds all
        tensors of a weight.
      max_shard_bytes: the largest size of a shard of more than one weight.
      files: the content of other files by name.

    Raises:
      FileExistsError: the directory holds a checkpoint, or is being written.
      ValueError: a reader would refuse the files; nothing is written.
    """
    shards = _shards(tensors, groups, max_shard_bytes)
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, 1 + len(shards))]
    # transformers refuses files without this metadata.
    plans = {
        name: plan_file({key: layout_of(tensors[key]) for key in keys}, {"format": "pt"})
        for name, keys in zip(names, shards, strict=True)
    }
    texts = {_plain(name): content for name, content in files.items()}
    if len(shards) > 1:
        weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        texts[INDEX] = encode_json(index, INDEX)
    texts[CONFIG] = encode_json(config, CONFIG)
    with whole_directory(folder, last=CONFIG) as new:
        check_empty(folder)
        for name, plan in plans.items():
            with new_file(new / name) as file:
                plan.write(file, tensors)
        for name, text in texts.items():
            with new_file(new / name) as file:
                file.write(text)


def _plain(name: str) -> str:
    """Return the name of a file beside the tensors; ValueError if it is another one."""
    taken = name == CONFIG or name.endswith((".safetensors", INDEX))
    if taken or name in ("", "..") or Path(name).name != name:
        raise ValueError(f"files must not name {name!r}; they go beside {CONFIG} and the tensors")
    return name


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
