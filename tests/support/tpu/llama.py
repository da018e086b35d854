"""A Llama as QLoRA trains it, for programs that are compiled for TPUs."""

import jax.numpy as jnp
from flax import nnx

import q4jax
from q4jax.models import Llama, LlamaConfig


def qlora_model(config: LlamaConfig) -> Llama:
    """The model in nf4 and bfloat16, with adapters, whose layers are computed again."""
    dtypes = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    model = Llama(config, rngs=nnx.Rngs(0), **dtypes)
    model = q4jax.quantize_model(model, quant_type="nf4", blocksize=64)
    model = q4jax.add_lora(model, 8, 16.0)
    model.remat = True
    return model
