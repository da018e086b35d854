"""What the command line reads and writes: which form a path has, its tensors, and back."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from q4jax import checkpoint
from q4jax.cli.table import Row
from q4jax.convert.config import QuantConfig
from q4jax.interop import bitsandbytes, huggingface, peft
from q4jax.interop.bitsandbytes.tensors import flatten
from q4jax.interop.bitsandbytes.weight_keys import read_spec, sort_names
from q4jax.interop.huggingface.checkpoint import Checkpoint
from q4jax.interop.safetensors.reader import TensorFile
from q4jax.ops.params import Params4bit
from q4jax.tree.fingerprint import fingerprint

WRITTEN = ("huggingface", "orbax", "bitsandbytes")
# Files of a Hugging Face directory that go along: the tokenizer, and how to generate.
_BESIDE = (
    *("generation_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer.model"),
    *("tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json"),
    "chat_template.jinja",
)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory.

    Attributes:
      form: "huggingface", "orbax", "bitsandbytes" or "peft".
      tree: tensors by name.
      config: the content of `config.json`, where there was one.
      beside: the files beside it by name.
    """

    form: str
    tree: dict[str, Any]
    config: dict[str, Any] | None = None
    beside: dict[str, bytes] = dataclasses.field(default_factory=dict)


def form_of(path: Path) -> str:
    """Which kind of checkpoint is at a path.

    Raises:
      FileNotFoundError: there is nothing.
      NotImplementedError: none that is known.
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
        f"{path} is no checkpoint that q4jax knows: it has no config.json, adapter_config.json or "
        f"{checkpoint.HEADER}/ (of a CheckpointManager's folder, name a step)"
    )


def describe(source: str) -> list[Row]:
    """The tensors of a checkpoint; of files, without reading them."""
    path = Path(source)
    form = form_of(path)
    if form in ("orbax", "peft"):
        return [_row(name, leaf) for name, leaf in load(source).tree.items()]
    if form == "huggingface":
        found = Checkpoint(path)
        layouts, specs, leads = found.tensors.layouts, found.specs, found.leads
        sizes = {name: found.bytes_of(name) for name in found}
    else:
        file = TensorFile(path)
        contents = sort_names(file.entries)
        layouts, weights = file.entries, contents.weights
        read = {name: read_spec(group, file) for name, group in weights.items()}
        specs = {name: spec for name, (spec, _) in read.items()}
        leads = {name: lead for name, (_, lead) in read.items()}
        keys = {name: [name] for name in contents.others}
        keys |= {name: [name, *group.statistics.values()] for name, group in weights.items()}
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


def _is_key(leaf: Any) -> bool:
    return bool(jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def load(source: str, config: QuantConfig | None = None, progress: bool | None = None) -> Loaded:
    """All of a checkpoint, verified; `config`: how to quantize one in full precision."""
    path = Path(source)
    form = form_of(path)
    if config is not None and form != "huggingface":
        raise ValueError(f"{path} is {form}; only Hugging Face directories are quantized")
    if form == "bitsandbytes":
        return Loaded(form, dict(bitsandbytes.load_file(path)))
    if form == "peft":
        _, pairs = peft.read_adapters(path)
        halves = {
            f"{n}.lora_{s}": a for n, pair in pairs.items() for s, a in zip("AB", pair, strict=True)
        }
        return Loaded(form, halves)
    if form == "huggingface":
        tree = huggingface.load_directory(path, config, progress=progress)
        beside = {name: (path / name).read_bytes() for name in _BESIDE if (path / name).is_file()}
        return Loaded(form, dict(tree), Checkpoint(path).config, beside)
    tree = checkpoint.restore(path)
    if isinstance(tree, dict) and tree.keys() == {"config.json", "weights"}:
        return Loaded(form, flatten(tree["weights"]), json.loads(str(tree["config.json"])))
    return Loaded(form, flatten(tree))


def write(loaded: Loaded, target: str, form: str, quant_storage: str) -> None:
    """Writes a checkpoint in one of the `WRITTEN` forms.

    Raises:
      FileExistsError: there is something already.
      ValueError: a Hugging Face directory needs a config, which the source does not have.
    """
    path = Path(target)
    if path.exists():
        raise FileExistsError(f"{path} exists already")
    if loaded.form == "peft":
        raise NotImplementedError("adapters are not converted: peft.load_adapters, save_adapters")
    if form == "bitsandbytes":
        return bitsandbytes.save_file(loaded.tree, path, quant_storage, metadata={"format": "pt"})
    if form == "huggingface":
        if loaded.config is None:
            raise ValueError(f"the source has no config.json, which {path} would need")
        huggingface.save_directory(loaded.tree, path, loaded.config, quant_storage)
        for name, content in loaded.beside.items():
            (path / name).write_bytes(content)
        return None
    tree: dict[str, Any] = {"weights": loaded.tree}
    if loaded.config is not None:
        tree["config.json"] = json.dumps(loaded.config)
    return checkpoint.save(path, tree if loaded.config is not None else loaded.tree)


def fingerprint_of(loaded: Loaded) -> str:
    """That of the 4-bit weights; "none" where there is none."""
    quantized = any(isinstance(leaf, Params4bit) for leaf in loaded.tree.values())
    return fingerprint(loaded.tree) if quantized else "none"
