"""The tensors of an `adapter_model.safetensors`, grouped by module."""

import dataclasses
import os
import re
from pathlib import Path

import numpy as np

from q4jax.core.spec import FLOAT_DTYPES
from q4jax.interop.files import read_json
from q4jax.interop.peft.config import AdapterConfig
from q4jax.interop.safetensors.reader import TensorFile

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
ROOT, WRAPPED = "base_model.model.", ".base_layer"
Pairs = dict[str, tuple[np.ndarray, np.ndarray]]

# The patterns of a config are matched against names of up to this length.
_LONGEST = 160
_MATRIX = re.compile(
    r"(.+)\.lora_(?:([AB])\.weight|embedding_([AB])|(m)agnitude_vector(?:\.weight)?)"
)
_WEIGHT = re.compile(r"(.+)\.(weight|bias)")
_STATISTIC = re.compile(
    r".+\.base_layer\.weight\.(?:(?:nested_)?(?:absmax|quant_map)|quant_state\..+)"
)


@dataclasses.dataclass(frozen=True)
class Factors:
    """The adapter of a module, as PEFT stores it.

    Attributes:
      a: `lora_A` `[rank, in]`; of an embedding `[rank, rows]`.
      b: `lora_B` `[out, rank]`; of an embedding `[features, rank]`.
      magnitude: `[out]` with DoRA, else None.
      of_embedding: whether the module is an embedding.
    """

    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None
    of_embedding: bool


@dataclasses.dataclass(frozen=True)
class AdapterFiles:
    """The content of a directory of adapters.

    Attributes:
      config: the config.
      factors: the adapters by the module's name, which ends in `.base_layer` for each parameter of
        the module that is adapted after this one.
      weights: weights of the base model, (module, "weight" or "bias") -> array: of modules that
        were trained too, or copies.
    """

    config: AdapterConfig
    factors: dict[str, Factors]
    weights: dict[tuple[str, str], np.ndarray]


def read_adapters(path: str | os.PathLike[str]) -> tuple[AdapterConfig, Pairs]:
    """Read the matrices of a directory of adapters, without a model.

    Returns:
      The config, and for each module, under PEFT's name, `lora_A` `[rank, in]` and `lora_B`
      `[out, rank]` as NumPy arrays. Those of parameters that stack experts are `[experts * rank,
      in]` and `[out, rank * experts]`.

    Raises:
      FileNotFoundError: one of the two files is missing.
      ValueError: a file is malformed; an adapter has one matrix only, another rank than the config
        says, or no float dtype.
      NotImplementedError: the adapters are not LoRA, or a variant that is not implemented; the
        message names it. Also where matrices are not all that counts (`use_dora`,
        `modules_to_save`); `load_adapters` takes those.
    """
    files = read_files(path)
    for field, used in (("use_dora", files.config.dora), ("modules_to_save", files.config.saved)):
        if used:
            raise NotImplementedError(f"{field}={used!r}: the matrices are not all; load_adapters")
    return files.config, {name: (f.a, f.b) for name, f in files.factors.items()}


def read_files(path: str | os.PathLike[str]) -> AdapterFiles:
    """Read a directory of adapters; it raises what `read_adapters` does, DoRA excepted."""
    folder = Path(path)
    config = AdapterConfig.from_json(read_json(folder / CONFIG))
    file = TensorFile(folder / TENSORS)
    found: dict[str, dict[str, np.ndarray]] = {}
    weights: dict[tuple[str, str], np.ndarray] = {}
    for name in file:
        own = name.removeprefix(ROOT)
        matrix, weight = _MATRIX.fullmatch(own), _WEIGHT.fullmatch(own)
        if len(name) > _LONGEST:
            raise ValueError(f"{name[:_LONGEST]}… has more than {_LONGEST} characters")
        if matrix and own != name:
            module, kind = matrix[1], matrix[2] or matrix[4] or f"embedding_{matrix[3]}"
            found.setdefault(module, {})[kind] = file[name]
        elif weight and own != name and ".lora_" not in own:
            weights[weight[1], weight[2]] = file[name]
        elif not _STATISTIC.fullmatch(own):
            raise NotImplementedError(f"{name} is not a LoRA matrix of a linear layer or embedding")
    if not found:
        raise ValueError(f"{folder / TENSORS} holds no adapter")
    return AdapterFiles(config, {m: _factors(m, f, config) for m, f in found.items()}, weights)


def _factors(module: str, parts: dict[str, np.ndarray], config: AdapterConfig) -> Factors:
    of_embedding = any(kind.startswith("embedding_") for kind in parts)
    start = "embedding_" if of_embedding else ""
    names = {f"{start}A", f"{start}B"}
    if parts.keys() - {"m"} != names:
        kinds = ", ".join(f"lora_{kind}" for kind in sorted(parts))
        raise ValueError(f"{module} has {kinds} only")
    a, b, magnitude = parts[f"{start}A"], parts[f"{start}B"], parts.get("m")
    if not config.parameters:
        check_rank(module, a, b, config.rank_of(module))
    elif a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise ValueError(f"{module}: lora_A {list(a.shape)} does not fit lora_B {list(b.shape)}")
    if a.dtype not in FLOAT_DTYPES or a.dtype != b.dtype:
        raise ValueError(f"{module}: lora_A is {a.dtype}, lora_B is {b.dtype}")
    if (magnitude is not None) != config.dora:
        has = "no magnitude" if magnitude is None else "a magnitude"
        raise ValueError(f"{module} has {has}, but use_dora={config.dora}")
    if config.dora and of_embedding:
        raise NotImplementedError(
            f"use_dora=True: {module} is an embedding; linear layers are read"
        )
    if magnitude is not None and magnitude.reshape(-1).shape != (b.shape[0],):
        raise ValueError(f"{module}: magnitude {list(magnitude.shape)} of {b.shape[0]} outputs")
    return Factors(a, b, magnitude, of_embedding)


def check_rank(module: str, a: np.ndarray, b: np.ndarray, rank: int) -> None:
    """Raise ValueError unless an adapter's matrices have a rank."""
    if a.ndim != 2 or b.ndim != 2 or not a.shape[0] == b.shape[1] == rank:
        raise ValueError(
            f"{module}: lora_A {list(a.shape)}, lora_B {list(b.shape)} are not of rank {rank}"
        )
