"""Parts of entries that several families share."""

from collections.abc import Callable
from typing import Any

from q4jax.models.decoder.entries import Entries

CHUNKED, LINEAR = "chunked_attention", "linear_attention"


def flag(name: str) -> Callable[[Entries], bool]:
    """Return a function that reads a boolean."""
    return lambda c: c.flag(name)


def number(name: str) -> Callable[[Entries], float | None]:
    """Return a function that reads a number, or None."""
    return lambda c: c.optional_number(name)


ATTENTION_BIAS = {"bias": flag("attention_bias"), "out_bias": flag("attention_bias")}


MLP_BIAS = {"bias": flag("mlp_bias")}


BIASES: dict[str, Any] = {"attention": ATTENTION_BIAS, "mlp": MLP_BIAS}


USE_BIAS: dict[str, Any] = {
    "attention": {"bias": flag("use_bias"), "out_bias": flag("use_bias")},
    "mlp": {"bias": flag("use_bias")},
}


HEAD_NORM = {"norm_over": "head"}


LAYER_NORM: dict[str, Any] = {"kind": "layer", "bias": True}


GRANITE: dict[str, Any] = {
    **BIASES,
    "attention": {**ATTENTION_BIAS, "scale": lambda c: c.number("attention_multiplier")},
    "layer": {"residual": lambda c: c.number("residual_multiplier")},
    "decoder": {
        "embed_scale": lambda c: c.number("embedding_multiplier"),
        "logit_scale": lambda c: 1 / c.number("logits_scaling"),
    },
}


HUNYUAN = {
    **ATTENTION_BIAS,
    "norm_over": "head",
    "norm_last": True,
    "q_norm": "query_layernorm",
    "k_norm": "key_layernorm",
}
