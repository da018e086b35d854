"""The experts of a model of the Llama family, and how its `config.json` says them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from q4jax.models.decoder import config_values as values
from q4jax.models.decoder.architectures import Architecture


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """Sizes of a mixture of experts that replaces the MLP of every layer.

    Attributes:
      num_experts: number of experts.
      num_experts_per_tok: number of experts that compute each token.
      intermediate_size: inner width of an expert.
      shared_intermediate_size: inner width of the gated expert that computes every token; None:
        there is no shared expert.
      norm_topk_prob: whether the weights of a token's experts are normalized to sum to 1.

    Raises:
      ValueError: `num_experts_per_tok` exceeds `num_experts`.
    """

    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    shared_intermediate_size: int | None = None
    norm_topk_prob: bool = False

    def __post_init__(self) -> None:
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} is more than "
                f"num_experts={self.num_experts}"
            )


def read_experts(
    architecture: Architecture, config: Mapping[str, Any], found: Mapping[str, Any]
) -> ExpertsConfig | None:
    """Return the experts of a `config.json`; NotImplementedError if some layers have none."""
    if not architecture.experts:
        return None
    # transformers accepts the number under either name.
    names = ("num_local_experts", "num_experts")
    given = {name: config[name] for name in names if config.get(name) is not None}
    if any(value != next(iter(given.values())) for value in given.values()):
        raise ValueError(f"config.json contradicts itself: {given}")
    number = architecture.experts["num_experts"]
    count = next(iter(given.values()), architecture.defaults[number])
    values.require("mlp_only_layers", found.get("mlp_only_layers", []), ([],))
    values.require("decoder_sparse_step", found.get("decoder_sparse_step", 1), (1,))
    width = architecture.experts["intermediate_size"]
    shared = architecture.experts.get("shared_intermediate_size", "")
    return ExpertsConfig(
        values.size(number, count),
        values.size("num_experts_per_tok", found["num_experts_per_tok"]),
        values.size(width, found[width]),
        values.size(shared, found[shared]) if shared in found else None,
        values.flag("norm_topk_prob", found.get("norm_topk_prob", False)),
    )
