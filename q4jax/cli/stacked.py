"""Checkpoints of whole models, whose layers are stacked: as models, or one entry for each layer."""

import dataclasses
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from q4jax import checkpoint, finetune
from q4jax.convert.rules import QuantRule
from q4jax.core.spec import QuantSpec
from q4jax.finetune.settings import SettingsError
from q4jax.interop.huggingface.checkpoint import Checkpoint
from q4jax.interop.tree import flatten
from q4jax.lora.inject import add_lora
from q4jax.lora.merge import merge_lora
from q4jax.models.decoder.config import LlamaConfig
from q4jax.models.decoder.decoder import Llama
from q4jax.models.decoder.stacks import kinds_of_stacks
from q4jax.models.pretrained.save import save_pretrained
from q4jax.nnx.convert import quantize_model
from q4jax.ops.params import Params4bit

_EMBEDDING = "embed_tokens.embedding"  # of every model here; of a 4-bit one: _EMBEDDING_4BIT
_EMBEDDING_4BIT = "embed_tokens.weight"
_ADAPTER = ".lora_a"
_STACK = re.compile(r"layers\.from_(\d+)\.")
_SHARD = 5_000_000_000  # bytes of a file of a Hugging Face directory


@dataclasses.dataclass(frozen=True)
class Found:
    """What a checkpoint of q4jax holds, before it is read as a model.

    Attributes:
      path: the checkpoint.
      prefix: the names before those of the model, such as "model.", or "".
      dtype: that of the embedding.
      specs: of the 4-bit layers, by path in the model.
      ranks: of the adapters, by path in the model.
      dropout: whether adapters have dropout.
      dora: whether adapters have magnitudes.
      kinds: for each layer, which share a stack; None: all.
    """

    path: Path
    prefix: str
    dtype: np.dtype[Any]
    specs: dict[str, QuantSpec]
    ranks: dict[str, int]
    dropout: bool
    dora: bool
    kinds: list[int] | None


def run_of(path: Path) -> Path | None:
    """Return the folder of the run of `finetune` that a path is, or is the checkpoint of."""
    for folder in (path, path.parent):
        if (folder / "run.json").is_file() and (path == folder or path.name == "checkpoint"):
            return folder
    return None


def find_model(path: Path, tree: Mapping[str, Any]) -> Found | None:
    """Return what a checkpoint holds, or None where it is no language model.

    Args:
      path: the checkpoint.
      tree: its content, flat.
    """
    names = [n for n in tree if f".{n}".endswith((f".{_EMBEDDING}", f".{_EMBEDDING_4BIT}"))]
    if len(names) != 1:
        return None
    prefix = names[0].removesuffix(_EMBEDDING).removesuffix(_EMBEDDING_4BIT)
    inside = {n.removeprefix(prefix): leaf for n, leaf in tree.items() if n.startswith(prefix)}
    if any(part.isdecimal() for name in inside for part in name.split(".")):
        return None  # Hugging Face's names, which number the layers
    embedding = tree[names[0]]
    is_4bit = isinstance(embedding, Params4bit)
    dtype = embedding.quant_state.spec.dtype if is_4bit else embedding.dtype
    specs = {
        name.removesuffix(".weight").removesuffix(".base"): leaf.quant_state.spec
        for name, leaf in inside.items()
        if isinstance(leaf, Params4bit)
    }
    ranks = {
        name.removesuffix(_ADAPTER): int(leaf.shape[-1])
        for name, leaf in inside.items()
        if name.endswith(_ADAPTER)
    }
    dora = any(name.endswith(".magnitude") for name in inside)
    dropout = any(".dropout." in name for name in inside)
    kinds = kinds_of_stacks(
        {
            int(found[1]): jax.tree.leaves(leaf)[0].shape[0]
            for name, leaf in inside.items()
            if (found := _STACK.match(name))
        }
    )
    return Found(path, prefix, np.dtype(dtype), specs, ranks, dropout, dora, kinds or None)


def as_model(
    found: Found, config: Mapping[str, Any], alpha: float | None = None, rslora: bool = False
) -> Llama:
    """Read a checkpoint as the model that it was saved from, with its adapters merged.

    Args:
      found: what it holds.
      config: the content of `config.json`.
      alpha: that of the adapters, which a checkpoint does not hold.
      rslora: whether they are scaled by alpha / sqrt(rank).

    Raises:
      SettingsError: the adapters need `alpha`, or have several ranks.
      ValueError: the checkpoint is not of a model of this config; the message names what differs.
      NotImplementedError: the config is of a family that is not supported.
    """
    if found.ranks and alpha is None:
        raise SettingsError(
            f"{found.path} has adapters, whose scale no checkpoint holds: pass --alpha A, that of "
            "add_lora"
        )
    if len(set(found.ranks.values())) > 1:
        raise SettingsError(
            f"{found.path} has adapters of ranks {sorted(set(found.ranks.values()))}: restore it "
            "into its model, and write that with q4jax.models.save_pretrained, after "
            "q4jax.merge_lora"
        )
    wanted = LlamaConfig.from_hf(dict(config))
    dtypes: dict[str, Any] = {"dtype": found.dtype, "param_dtype": found.dtype}

    def fresh() -> Any:
        model: Any = Llama(wanted, kinds=found.kinds, rngs=nnx.Rngs(0), **dtypes)
        if found.specs:
            model = quantize_model(model, [_rule(path, s) for path, s in found.specs.items()])
        if found.ranks:
            model = add_lora(
                model,
                next(iter(found.ranks.values())),
                1.0 if alpha is None else alpha,
                targets="|".join(re.escape(path) for path in found.ranks),
                rslora=rslora,
                dropout=0.5 if found.dropout else 0.0,
                dora=found.dora,
            )
        for name in reversed(found.prefix.split(".")[:-1]):
            model = {name: model}
        return model

    tree = checkpoint.restore(found.path, nnx.eval_shape(fresh), partial=bool(found.prefix))
    for name in found.prefix.split(".")[:-1]:
        tree = tree[name]
    model: Llama = tree
    return merge_lora(model) if found.ranks else model


def of_run(folder: Path) -> Llama:
    """Return the model of a finished run of `finetune`, with its adapters merged."""
    return merge_lora(finetune.restore(folder))


def write_model(
    model: Llama, target: str, file_format: str, quant_storage: str, tokenizer: Path | None = None
) -> int:
    """Write a model as a Hugging Face directory or one file of bitsandbytes, whole or not at all.

    Returns:
      The number of its tensors.

    Raises:
      FileExistsError: the target exists.
    """
    if os.path.lexists(target):
        raise FileExistsError(f"{target} exists already")
    parent = Path(target).absolute().parent
    with tempfile.TemporaryDirectory(dir=parent, prefix=".convert-") as folder:
        new, files = Path(folder, "new"), tokenizer if file_format == "huggingface" else None
        largest = _SHARD if file_format == "huggingface" else sys.maxsize
        save_pretrained(model, new, largest, quant_storage=quant_storage, tokenizer=files)
        count = len(Checkpoint(new))
        os.rename(new if file_format == "huggingface" else new / "model.safetensors", target)
    return count


def _rule(path: str, spec: QuantSpec) -> QuantRule:
    return QuantRule(
        re.escape(path),
        quant_type=spec.quant_type,
        blocksize=spec.blocksize,
        compress_statistics=spec.nested,
        embeddings=True,
    )


def unstacked(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a flat tree with one entry for each layer of a stack.

    The number of the layer follows the name of what is stacked: of `layers.up.weight`, where all of
    `layers` has the same leading axes, come `layers.0.up.weight` and `layers.1.up.weight`.

    Args:
      tree: arrays and 4-bit weights by name.

    Examples:
      >>> import q4jax
      >>> stack = q4jax.Params4bit.quantize(jax.numpy.ones((2, 64)))
      >>> stack = jax.tree.map(lambda array: jax.numpy.stack([array, array]), stack)
      >>> sorted(unstacked({"layers.up.weight": stack, "layers.scale": jax.numpy.ones((2, 8))}))
      ['layers.0.scale', 'layers.0.up.weight', 'layers.1.scale', 'layers.1.up.weight']
    """
    nested: dict[str, Any] = {}
    for name, leaf in tree.items():
        *modules, last = name.split(".")
        node = nested
        for module in modules:
            node = node.setdefault(module, {})
        node[last] = leaf
    return dict(_entries(nested, ""))


def _entries(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    leaves = flatten(node) if isinstance(node, dict) else {"": node}
    all_have_one_name = not path and len(node) == 1
    lead = () if all_have_one_name else _lead(list(leaves.values()))
    if lead:
        for at in np.ndindex(*lead):
            for name, leaf in leaves.items():
                part = jax.tree.map(lambda array, at=at: array[at], leaf)
                yield ".".join(filter(None, (path, *map(str, at), name))), part
    elif isinstance(node, dict):
        for name, child in node.items():
            yield from _entries(child, f"{path}.{name}" if path else name)
    else:
        yield path, node


def _lead(leaves: list[Any]) -> tuple[int, ...]:
    """Return the leading axes that 4-bit weights and the arrays beside them share; else ()."""
    weights = [leaf for leaf in leaves if isinstance(leaf, Params4bit)]
    leads = {w.packed.shape[: -len(w.quant_state.spec.packed_shape)] for w in weights}
    if len(leads) != 1:
        return ()
    [lead] = leads
    arrays = [leaf for leaf in leaves if not isinstance(leaf, Params4bit)]
    return lead if all(array.shape[: len(lead)] == lead for array in arrays) else ()
