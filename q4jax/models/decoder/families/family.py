"""What an entry of the table of families may say."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from q4jax.models.decoder.entries import Entries

Given = Any | Callable[[Entries], Any]


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The experts of a family; names of entries are in the order in which they are looked up.

    Attributes:
      count, per_token, width: entries with the numbers of experts and the width of one.
      in_layer: whether a layer, by number, has experts.
      name: name of the module, where it is not that of the dense MLP.
      names: gate, up and down of one expert, or of all in one tensor each: gate_up and down.
      shared: name of the shared expert.
      shared_width: its width; 0: there is none.
      renormalize, scale: as in `Experts`.
      groups: whether `n_group` and `topk_group` say that experts are chosen from the best groups.
      others: fields of `Experts`.
    """

    count: tuple[str, ...] = ("num_experts", "num_local_experts")
    per_token: tuple[str, ...] = ("num_experts_per_tok",)
    width: tuple[str, ...] = ("moe_intermediate_size", "intermediate_size")
    in_layer: Callable[[Entries, int], bool] = lambda c, layer: True
    name: str = ""
    names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    shared: str = ""
    shared_width: Callable[[Entries], int] = lambda c: 0
    renormalize: Given = False
    scale: Given = 1.0
    groups: bool = False
    others: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type`; names are those of modules in checkpoints.

    Attributes:
      defaults: entries of `config.json` that may be missing, beside those of `default_entries`.
      fixed: entries that are served at these values only.
      windows: "all" layers have the window, those of "typed" layers only, or "none".
      every: without `layer_types`, each layer of this number attends fully; 0: all do.
      chunks: whether rotated layers see chunks, where `layer_types` says nothing.
      interleaved: as in `Rope`.
      rope: whether there are rotary embeddings in a layer, by number.
      norm: fields of `Norm`.
      eps, act: entries with the norms' epsilon and the activation.
      width: inner width of the MLP.
      kv_heads: entries with the number of key/value heads; none: it is that of the query heads.
      attention, layer, mlp, decoder: fields of `Attention`, `Layer`, `MLP` and `Decoder`.
      mixture: its experts.
      mixer: "attention", "latent" or "delta", which layers of the type "linear_attention" have.
      delta_fused: as in `DeltaNet`.
      layers, embed, final, head: names of the layers, the embedding, the last norm and the head.
      embed_norm, positions: names of the norm of the embedding, and of learned positions.
      conv1d: whether checkpoints hold kernels `[in, out]`.
      renamed: names of modules here -> those in checkpoints.
    """

    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    windows: str = "none"
    every: int = 0
    rope: Callable[[Entries, int], bool] = lambda c, layer: True
    chunks: bool = False
    interleaved: bool = False
    norm: Mapping[str, Given] = dataclasses.field(default_factory=dict)
    eps: tuple[str, ...] = ("rms_norm_eps",)
    act: tuple[str, ...] = ("hidden_act",)
    width: Given = lambda c: c.size("intermediate_size")
    kv_heads: tuple[str, ...] = ("num_key_value_heads",)
    attention: Mapping[str, Given] = dataclasses.field(default_factory=dict)
    layer: Mapping[str, Given] = dataclasses.field(default_factory=dict)
    mlp: Mapping[str, Given] = dataclasses.field(default_factory=dict)
    decoder: Mapping[str, Given] = dataclasses.field(default_factory=dict)
    mixture: Mixture | None = None
    mixer: str = "attention"
    delta_fused: bool = False
    layers: str = "model.layers"
    embed: str = "model.embed_tokens"
    final: str = "model.norm"
    head: str = "lm_head"
    embed_norm: str = ""
    positions: str = ""
    conv1d: bool = False
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)


def evaluate(given: Given, c: Entries) -> Any:
    """Return a value of the table for a model with these entries."""
    return given(c) if callable(given) else given


def evaluate_all(given: Mapping[str, Given], c: Entries) -> dict[str, Any]:
    """Return the values of several fields."""
    return {name: evaluate(value, c) for name, value in given.items()}
