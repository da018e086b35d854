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
from q4jax.convert.rules import Config, Rules
from q4jax.core.argument_names import name_ours
from q4jax.core.spec import float_dtype
from q4jax.interop.huggingface.checkpoint import Checkpoint
from q4jax.interop.placement import Placement
from q4jax.interop.progress import Progress
from q4jax.models.decoder.config import LlamaConfig
from q4jax.models.decoder.decoder import Llama
from q4jax.models.decoder.shardings import LlamaShardings
from q4jax.models.decoder.spec import Experts
from q4jax.models.decoder.stacks import group_layers
from q4jax.models.decoder.tensor_names import TensorNames
from q4jax.models.pretrained.layer_kinds import layer_kinds, layer_names, linear_sources
from q4jax.models.pretrained.loader import Loader
from q4jax.models.pretrained.text_checkpoint import TextCheckpoint
from q4jax.nnx.convert import apply_rules

# Buffers of old checkpoints that are computed from the config, and layers that predict further
# tokens, which transformers does not read either.
_UNUSED = re.compile(r"rotary_emb\.inv_freq$|\.(attn|attention)\.(masked_)?bias$|^mtp\.")
_MAX_SHOWN = 10


@name_ours
def from_pretrained(
    path: str | os.PathLike[str],
    quantization: Config = None,
    dtype: DTypeLike | None = None,
    mesh: jax.sharding.Mesh | None = None,
    *,
    sharding: Placement | None = None,
    progress: bool | None = None,
) -> Llama:
    """Load a language model from a Hugging Face directory.

    docs/models.md lists the families. The weights are float32, float16, bfloat16 or bitsandbytes'
    4 bits, and may differ from layer to layer. Tensors are read one at a time: the host holds the
    model and a few of its largest tensors. Of a vision-language model, the text model is read.

    Args:
      path: a directory with `config.json` and `model.safetensors`, or shards and
        `model.safetensors.index.json`.
      quantization: how to quantize the projections of a model in full precision: a `QuantConfig`,
        which skips `lm_head`, or a list of `QuantRule`s; None: not at all. Entries of `skip` may be
        paths of transformers' modules ("model.layers.0.mlp") or of this model's ("layers.mlp").
        Layers that are quantized differently have stacks of their own.
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
        mesh with manual axes, or of several types, is not supported; the message names it.
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
    checkpoint = TextCheckpoint(path)
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
    stored = _embedding_dtype(config, tensors)
    dtypes: dict[str, Any] = {
        "param_dtype": stored,
        "dtype": float_dtype(stored if dtype is None else dtype),
    }

    def build(kinds: list[Any] | None = None) -> Llama:
        model: Llama = nnx.eval_shape(
            lambda: Llama(config, kinds=kinds, rngs=nnx.Rngs(0), **dtypes)
        )
        return model

    model = build()
    _check_names(model, tensors)
    specs = tensors.specs if isinstance(tensors, Checkpoint) else {}
    rules = None if quantization is None else Rules(quantization, {}, layer_names(model))
    kinds = layer_kinds(model, specs, rules)
    if group_layers(config.decoder.layers, kinds) != model.groups:
        model = build(kinds)
        rules = None if quantization is None else Rules(quantization, {}, layer_names(model))
    if rules is not None:
        linear = linear_sources(model)
        decisions = apply_rules(model, rules)
        report(decisions)
        other = [d.path for d in decisions.quantized if d.path not in linear]
        if other:
            raise ValueError(
                f"{', '.join(other)}: only linear layers are quantized while a model is loaded; "
                "use quantize_model for the others"
            )
        quantized = {decision.path: decision.rule for decision in decisions.quantized}
        blocksizes = {path: rule.blocksize for path, rule in quantized.items() if rule is not None}
    else:
        blocksizes = {
            path: specs[source.names[0]].blocksize
            for path, source in linear_sources(model).items()
            if source.names[0] in specs
        }
        quantized = dict.fromkeys(blocksizes)
    if isinstance(sharding, LlamaShardings):
        if len(set(blocksizes.values())) == 1:
            sharding = dataclasses.replace(sharding, blocksize=next(iter(blocksizes.values())))
        sharding.check(model, blocksizes)
    return Loader(tensors, quantized, dtypes["dtype"], sharding, bar).fill(model)


def _embedding_dtype(config: LlamaConfig, tensors: Mapping[str, Any]) -> np.dtype[Any]:
    """Return the dtype of the embedding, in which the model is built."""
    name = TensorNames(config, ()).source(("embed_tokens", "embedding")).names[0]
    if name not in tensors:
        raise ValueError(f"tensors missing: [{name!r}]")
    if isinstance(tensors, Checkpoint) and name in tensors.specs:
        raise ValueError(f"{name} is 4-bit, but not the weight of a linear layer")
    found = tensors.layout(name) if isinstance(tensors, Checkpoint) else tensors[name]
    return float_dtype(found.dtype, f"dtype of {name}")


def _check_sizes(config: LlamaConfig, tensors: int) -> None:
    """Raise ValueError if there are fewer tensors than experts, before names are built."""
    count, sizes = config.num_hidden_layers, f"num_hidden_layers={config.num_hidden_layers}"
    mixtures = [la.mlp for la in config.decoder.layers if isinstance(la.mlp, Experts)]
    if mixtures and mixtures[0].layout == "apart":
        count = len(mixtures) * mixtures[0].count
        sizes += f" and num_experts={mixtures[0].count}"
    if count > tensors:
        raise ValueError(f"{sizes}, but there are {tensors} tensors")


def _check_names(model: Llama, tensors: Mapping[str, Any]) -> None:
    """Raise ValueError unless model and checkpoint have the same tensor names."""
    config, names = model.config, TensorNames.of(model)
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(model))]
    expected = {name for path in paths for name in names.source(path).names}
    first, further = config.num_hidden_layers, config.decoder.further_layers
    beyond = tuple(f"{names.family.layers}.{first + i}." for i in range(further))
    found = {n for n in tensors if not _UNUSED.search(n) and not n.startswith(beyond)}
    missing, unexpected = sorted(expected - found), sorted(found - expected)
    head, embedding = f"{names.family.head}.weight", f"{names.family.embed}.weight"
    if (
        config.tie_word_embeddings
        and head in unexpected
        and np.array_equal(tensors[head], tensors[embedding])
    ):
        unexpected.remove(head)
    if missing or unexpected:
        raise ValueError(
            f"the config of a {config.model_type} does not fit: tensors missing: "
            f"{_shown(missing)}; tensors unexpected: {_shown(unexpected)}"
        )


def _shown(names: list[str]) -> str:
    rest = len(names) - _MAX_SHOWN
    return f"{names[:_MAX_SHOWN]}" + (f" and {rest} more" if rest > 0 else "")
