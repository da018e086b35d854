"""Checkpoint formats of the command line: detect, list, load and write them."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from q4jax import checkpoint
from q4jax.cli.table import Row
from q4jax.convert.config import QuantConfig
from q4jax.convert.rules import compiled
from q4jax.finetune.settings import SettingsError
from q4jax.interop import bitsandbytes, huggingface, peft
from q4jax.interop.bitsandbytes.tensors import read_spec
from q4jax.interop.bitsandbytes.weight_keys import group_keys
from q4jax.interop.huggingface.checkpoint import Checkpoint
from q4jax.interop.huggingface.tokenizer import TOKENIZER_FILES
from q4jax.interop.safetensors.reader import TensorFile
from q4jax.interop.safetensors.writer import write_file
from q4jax.interop.tree import flatten
from q4jax.ops.params import Params4bit
from q4jax.tree import fingerprint

WRITTEN = ("huggingface", "orbax", "bitsandbytes")
# Files of a Hugging Face directory that are copied too.
_EXTRA_FILES = ("generation_config.json", *TOKENIZER_FILES)
_TO_MODEL = (
    "restore it into its model, and write that with q4jax.models.save_pretrained, after "
    "q4jax.merge_lora if it has adapters; python -m q4jax merge does so for a run of finetune"
)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory.

    Attributes:
      format: "huggingface", "orbax", "bitsandbytes" or "peft".
      tree: tensors by name.
      config: the content of `config.json`, or None.
      extra_files: tokenizer and generation files of a Hugging Face directory, by name.
    """

    format: str
    tree: dict[str, Any]
    config: dict[str, Any] | None = None
    extra_files: dict[str, bytes] = dataclasses.field(default_factory=dict)


def detect_format(path: Path) -> str:
    """Return the format of the checkpoint at a path.

    Raises:
      FileNotFoundError: the path does not exist.
      NotImplementedError: the format is unknown.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is nothing at {path}")
    if path.is_file():
        return "bitsandbytes"
    if (path / "adapter_config.json").exists():
        return "peft"
    if (path / "config.json").exists():
        return "huggingface"
    if (path / checkpoint.HEADER).exists():
        return "orbax"
    raise NotImplementedError(
        f"{path} is not a checkpoint that q4jax knows: it has no config.json, adapter_config.json "
        f"or {checkpoint.HEADER}/ (in a CheckpointManager's folder, name a step)"
    )


def list_tensors(source: str) -> list[Row]:
    """Return the tensors of a checkpoint; safetensors files are not read beyond their headers."""
    path = Path(source)
    file_format = detect_format(path)
    if file_format in ("orbax", "peft"):
        return [_row(name, leaf) for name, leaf in load(source).tree.items()]
    if file_format == "huggingface":
        found = Checkpoint(path)
        layouts, specs, leads = found.tensors.layouts, found.specs, found.leads
        sizes = {name: found.bytes_of(name) for name in found}
    else:
        file = TensorFile(path)
        contents = group_keys(file.entries)
        layouts, weights = file.entries, contents.weights
        read = {name: read_spec(keys, file) for name, keys in weights.items()}
        specs = {name: spec for name, (spec, _) in read.items()}
        leads = {name: lead for name, (_, lead) in read.items()}
        keys = {name: [name] for name in contents.others}
        keys |= {name: [name, *weight.statistics.values()] for name, weight in weights.items()}
        sizes = {name: sum(layouts[key].nbytes for key in keys[name]) for name in keys}
    return [
        Row(name, specs[name].tag(), (*leads[name], *specs[name].shape), nbytes)
        if name in specs
        else Row(name, layouts[name].dtype.name, layouts[name].shape, nbytes)
        for name, nbytes in sizes.items()
    ]


def _row(name: str, leaf: Any) -> Row:
    if isinstance(leaf, Params4bit):
        return Row(name, leaf.quant_state.spec.tag(), leaf.quant_state.shape, leaf.nbytes)
    if hasattr(leaf, "dtype"):
        itemsize = np.dtype(leaf.dtype).itemsize if not _is_key(leaf) else 8
        return Row(name, str(leaf.dtype), tuple(leaf.shape), leaf.size * itemsize)
    return Row(name, type(leaf).__name__, (), 0)


def _is_tensor(leaf: Any) -> bool:
    """Return whether a leaf is a weight or an array, and no Python scalar or PRNG key."""
    return isinstance(leaf, Params4bit) or (hasattr(leaf, "dtype") and not _is_key(leaf))


def _is_key(leaf: Any) -> bool:
    return bool(jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def load(
    source: str,
    config: QuantConfig | None = None,
    progress: bool | None = None,
    modules: str | None = None,
) -> Loaded:
    """Load and verify a complete checkpoint.

    Args:
      source: path of the checkpoint.
      config: how to quantize a Hugging Face directory in full precision; None: not at all.
      progress: whether to draw a progress bar; None: only if stderr is a terminal.
      modules: a regular expression for the whole paths of the modules to quantize; None: those that
        transformers would quantize.
    """
    path = Path(source)
    file_format = detect_format(path)
    if config is not None and file_format != "huggingface":
        raise ValueError(f"{path} is {file_format}; only Hugging Face directories are quantized")
    if file_format == "bitsandbytes":
        return Loaded(file_format, dict(bitsandbytes.load_file(path)))
    if file_format == "peft":
        _, pairs = peft.read_adapters(path)
        halves = {
            f"{n}.lora_{s}": a for n, pair in pairs.items() for s, a in zip("AB", pair, strict=True)
        }
        return Loaded(file_format, halves)
    if file_format == "huggingface":
        source_files = Checkpoint(path)
        select = None if modules is None else _matching(modules, source_files)
        tree = huggingface.load_directory(path, config, select=select, progress=progress)
        files = [path / name for name in _EXTRA_FILES]
        extra_files = {file.name: file.read_bytes() for file in files if file.is_file()}
        return Loaded(file_format, dict(tree), source_files.config, extra_files)
    tree = checkpoint.restore(path)
    if isinstance(tree, dict) and tree.keys() == {"config.json", "weights"}:
        return Loaded(file_format, flatten(tree["weights"]), json.loads(str(tree["config.json"])))
    return Loaded(file_format, flatten(tree))


def _matching(modules: str, source: Checkpoint) -> Callable[[str, tuple[int, ...]], bool]:
    """Return what chooses the weights of these modules.

    Raises:
      SettingsError: the checkpoint has no such weight.
    """
    pattern = compiled(modules)

    def select(name: str, shape: tuple[int, ...]) -> bool:
        module, _, leaf = name.rpartition(".")
        return leaf == "weight" and len(shape) >= 2 and pattern.fullmatch(module) is not None

    shapes = {name: layout.shape for name, layout in source.tensors.layouts.items()}
    if not any(select(*item) for item in shapes.items()):
        names = [name for name, shape in shapes.items() if len(shape) >= 2]
        raise SettingsError(
            f"--modules {modules!r} matches the whole path of no module with a matrix, such as "
            f"{max(names, default='none', key=len).removesuffix('.weight')!r}"
        )
    return select


def write(loaded: Loaded, target: str, file_format: str, quant_storage: str) -> None:
    """Write a checkpoint in one of the `WRITTEN` formats.

    Raises:
      FileExistsError: the target exists.
      NotImplementedError: the source holds what the format does not, such as a PRNG key.
      ValueError: the target is a Hugging Face directory and the source has no config.
    """
    path = Path(target)
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists already")
    if loaded.format == "peft":
        raise NotImplementedError("adapters are not converted: peft.load_adapters, save_adapters")
    for name, leaf in loaded.tree.items():
        if file_format != "orbax" and not _is_tensor(leaf):
            kind = getattr(leaf, "dtype", type(leaf).__name__)
            raise NotImplementedError(
                f"{name} is of type {kind}, which {file_format} files do not hold: {_TO_MODEL}"
            )
        offset = leaf.quant_state.offset if isinstance(leaf, Params4bit) else None
        if file_format != "orbax" and offset is not None and offset.ndim:
            raise NotImplementedError(
                f"{name} is a stack of layers, which {file_format} files do not hold: {_TO_MODEL}"
            )
    if file_format == "bitsandbytes":
        tensors = bitsandbytes.to_state_dict(loaded.tree, quant_storage)
        return write_file(path, tensors, metadata={"format": "pt"}, replace=False)
    if file_format == "huggingface":
        if loaded.config is None:
            raise ValueError(
                f"the source has no config.json, which {path} would need: pass --config, or for a "
                f"checkpoint of a model, {_TO_MODEL}"
            )
        files = loaded.extra_files
        return huggingface.save_directory(
            loaded.tree, path, loaded.config, quant_storage, files=files
        )
    tree: dict[str, Any] = {"weights": loaded.tree}
    if loaded.config is not None:
        tree["config.json"] = json.dumps(loaded.config)
    return checkpoint.save(path, tree if loaded.config is not None else loaded.tree)


def fingerprint_of(loaded: Loaded) -> str:
    """Return the fingerprint of the 4-bit weights, or "none" if there are none."""
    return fingerprint.fingerprint(loaded.tree) if _is_quantized(loaded) else "none"


def has_fingerprint(loaded: Loaded, expected: str) -> bool:
    """Return whether this fingerprint, of any release, is that of the 4-bit weights."""
    return _is_quantized(loaded) and fingerprint.has_fingerprint(loaded.tree, expected)


def _is_quantized(loaded: Loaded) -> bool:
    return any(isinstance(leaf, Params4bit) for leaf in loaded.tree.values())
