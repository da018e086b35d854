"""Load a Llama from a Hugging Face directory or a state dict, dense or 4-bit."""

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from q4jax.convert.plan import report
from q4jax.convert.rules import Config
from q4jax.core.spec import float_dtype
from q4jax.interop.huggingface.checkpoint import Checkpoint
from q4jax.interop.placement import Placement
from q4jax.interop.progress import Progress
from q4jax.models.llama.config import LlamaConfig
from q4jax.models.llama.decoder import Llama
from q4jax.models.llama.shardings import LlamaShardings
from q4jax.models.llama.tensor_names import tensor_names
from q4jax.models.pretrained.loader import Loader
from q4jax.nnx.convert import plan_quantization
from q4jax.nnx.traverse import iter_modules

# Buffers of old checkpoints that are computed from the config.
_BUFFERS = re.compile(r"rotary_emb\.inv_freq$")
_MAX_SHOWN = 10
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def from_pretrained(
    path: str | os.PathLike[str],
    quantization: Config = None,
    dtype: DTypeLike | None = None,
    mesh: jax.sharding.Mesh | None = None,
    *,
    sharding: Placement | None = None,
    progress: bool | None = None,
) -> Llama:
    """Load a model of the Llama family from a Hugging Face directory.

    Its `model_type` is llama, mistral, qwen2, qwen3, mixtral, qwen2_moe or qwen3_moe, and its
    weights are float32, float16, bfloat16, or bitsandbytes' 4 bits. Tensors are read one at a time:
    the host holds the model and a few of its largest tensors.

    Args:
      path: a directory with `config.json` and `model.safetensors`, or shards and
        `model.safetensors.index.json`.
      quantization: how to quantize the projections of a model in full precision: a `QuantConfig`,
        which skips `lm_head`, or a list of `QuantRule`s; None: not at all.
      dtype: compute dtype; None: the `bnb_4bit_compute_dtype` of `config.json`, else its `dtype`,
        else that of the weights. Weights keep their stored dtype; norm scales become float32.
      mesh: mesh to shard the model on as `LlamaShardings` does, with axes among "data", "fsdp",
        "tensor" and "expert". Sizes that they do not divide are reported before weights are read.
      sharding: a function from a variable's name, such as `layers.mlp.up_proj.weight.packed`, and
        its `jax.ShapeDtypeStruct` to a sharding, a mapping from names, or one sharding. Arrays go
        straight from the host to their shards. None: `mesh`, or the default device.
      progress: whether to draw a progress bar; None: only if stderr is a terminal.

    Raises:
      NotImplementedError: the quantization method, the `model_type`, an entry of the config, or a
        mesh with explicit or manual axes is not supported; the message names it.
      TypeError: `mesh` is not a `jax.sharding.Mesh`.
      FileNotFoundError: a file is missing.
      ValueError: a tensor is missing, unexpected, malformed, of the wrong shape or dtype, or (when
        quantizing) not finite; `mesh` and `sharding` are both given; the mesh has other axes, or
        sizes that do not divide the weights. The message names the tensor or argument.
    """
    if mesh is not None:
        if sharding is not None:
            raise ValueError("mesh and sharding are both given; pass one of them")
        sharding = LlamaShardings(mesh)
    checkpoint = Checkpoint(path)
    if quantization is not None and checkpoint.quantization is not None:
        raise ValueError(f"{path} is quantized already; quantization must be None")
    config = LlamaConfig.from_hf(checkpoint.config)
    stored = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    if not isinstance(stored, str | None):
        raise ValueError(f"dtype of config.json must be a text, got {stored!r}")
    written = None if checkpoint.quantization is None else checkpoint.quantization.dtype
    dtype = next((choice for choice in (dtype, written, stored) if choice is not None), None)
    with Progress("load", checkpoint.nbytes, progress) as bar:
        return _load(config, checkpoint, quantization, dtype, sharding, bar)


def from_state_dict(
    config: LlamaConfig,
    tensors: Mapping[str, np.ndarray],
    quantization: Config = None,
    dtype: DTypeLike | None = None,
    *,
    sharding: Placement | None = None,
) -> Llama:
    """Build a Llama from arrays under Hugging Face's names.

    Args:
      config: sizes and architecture of the model.
      tensors: arrays by name, projections as `[out, in]`. The mapping may be lazy: each array is
        looked up once and released before the next.
      quantization: how to quantize the projections, as in `from_pretrained`.
      dtype: compute dtype; None: that of the weights.
      sharding: where variables are placed, as in `from_pretrained`.

    Raises:
      ValueError: a tensor is missing, unexpected, or of the wrong shape or dtype.
    """
    bar = Progress("load", 0, show=False)
    return _load(config, tensors, quantization, dtype, sharding, bar)


def _load(
    config: LlamaConfig,
    tensors: Mapping[str, Any],
    quantization: Config,
    dtype: DTypeLike | None,
    sharding: Placement | None,
    bar: Progress,
) -> Llama:
    _check_sizes(config, len(tensors))
    stored = _embedding_dtype(tensors)
    dtypes: dict[str, Any] = {
        "param_dtype": stored,
        "dtype": float_dtype(stored if dtype is None else dtype),
    }
    model: Llama = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0), **dtypes))
    _check_names(model, tensors)
    if quantization is not None:
        decisions = plan_quantization(model, quantization)
        report(decisions)
        linear = _linear_paths(model)
        other = [d.path for d in decisions.quantized if d.path not in linear]
        if other:
            raise ValueError(
                f"{', '.join(other)}: only linear layers are quantized while a model is loaded; "
                "use quantize_model for the others"
            )
        quantized = {decision.path: decision.rule for decision in decisions.quantized}
        blocksizes = {path: rule.blocksize for path, rule in quantized.items() if rule is not None}
    else:
        specs = tensors.specs if isinstance(tensors, Checkpoint) else {}
        blocksizes = {
            path: specs[name].blocksize
            for path, names in _linear_paths(model).items()
            for name in names
            if name in specs
        }
        quantized = dict.fromkeys(blocksizes)
    if isinstance(sharding, LlamaShardings):
        if len(set(blocksizes.values())) == 1:
            sharding = dataclasses.replace(sharding, blocksize=next(iter(blocksizes.values())))
        sharding.check(model, blocksizes)
    return Loader(tensors, quantized, dtypes["dtype"], sharding, bar).fill(model)


def _linear_paths(model: Llama) -> dict[str, list[str]]:
    """Return the tensors of each linear layer's weight by dotted path."""
    return {
        path: tensor_names((*path.split("."), "kernel"), model.config)
        for path, module in iter_modules(model)
        if isinstance(module, nnx.Linear)
    }


def _embedding_dtype(tensors: Mapping[str, Any]) -> np.dtype[Any]:
    """Return the dtype of the embedding, in which the model is built."""
    if _EMBEDDING not in tensors:
        raise ValueError(f"tensors missing: [{_EMBEDDING!r}]")
    layouts = tensors.tensors.layouts if isinstance(tensors, Checkpoint) else tensors
    if isinstance(tensors, Checkpoint) and _EMBEDDING in tensors.specs:
        raise ValueError(f"{_EMBEDDING} is 4-bit, but not the weight of a linear layer")
    return float_dtype(layouts[_EMBEDDING].dtype, f"dtype of {_EMBEDDING}")


def _check_sizes(config: LlamaConfig, tensors: int) -> None:
    """Raise ValueError if there are fewer tensors than experts, before names are built."""
    count, sizes = config.num_hidden_layers, f"num_hidden_layers={config.num_hidden_layers}"
    if config.experts is not None:
        count *= config.experts.num_experts
        sizes += f" and num_experts={config.experts.num_experts}"
    if count > tensors:
        raise ValueError(f"{sizes}, but there are {tensors} tensors")


def _check_names(model: Llama, tensors: Mapping[str, Any]) -> None:
    """Raise ValueError unless model and checkpoint have the same tensor names."""
    config = model.config
    expected = {
        name
        for path, _ in nnx.to_flat_state(nnx.state(model))
        for name in tensor_names(path, config)
    }
    found = {name for name in tensors if not _BUFFERS.search(name)}
    missing, unexpected = sorted(expected - found), sorted(found - expected)
    if (
        config.tie_word_embeddings
        and _HEAD in unexpected
        and np.array_equal(tensors[_HEAD], tensors[_EMBEDDING])
    ):
        unexpected.remove(_HEAD)
    if missing or unexpected:
        raise ValueError(
            f"the config of a {config.model_type} does not fit: tensors missing: "
            f"{_shown(missing)}; tensors unexpected: {_shown(unexpected)}"
        )


def _shown(names: list[str]) -> str:
    rest = len(names) - _MAX_SHOWN
    return f"{names[:_MAX_SHOWN]}" + (f" and {rest} more" if rest > 0 else "")
