"""Writes the files beside it; run with the code of commit 5efcd1e, before modules were moved.

PYTHONPATH=CHECKOUT python tests/checkpoint/saved_by_0_1_0/make.py
"""

import pathlib
import pickle
import shutil

import jax
import jax.numpy as jnp
from flax import nnx

import q4jax

HERE = pathlib.Path(__file__).parent


class Model(nnx.Module):
    """A 4-bit layer with an adapter, and an embedding."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(8, 64, rngs=rngs)
        self.proj = nnx.Linear(64, 32, rngs=rngs)


def weights():
    """Every form of a weight: nested and plain, row and flat, stacked."""
    w = jax.random.normal(jax.random.key(0), (2, 16, 64))
    stacked = jax.vmap(lambda w: q4jax.Params4bit.quantize(w, 64, True, "nf4"))(w)
    return {
        "nested": q4jax.Params4bit.quantize(w[0], 64, True, "nf4"),
        "plain": q4jax.Params4bit.quantize(w[0].astype(jnp.bfloat16), 32, False, "fp4"),
        "flat": q4jax.Params4bit.quantize(w[0, :, :50], 64, True, "nf4"),
        "joint": q4jax.Params4bit.quantize(w, 64, True, "nf4"),
        "stacked": stacked,
    }


def nnx_model():
    """A model with a quantized layer and adapters."""
    model = q4jax.quantize_model(Model(nnx.Rngs(1)), [q4jax.QuantRule(embeddings=True)])
    return q4jax.add_lora(model, 4, 8.0, rngs=nnx.Rngs(2))


def linen_variables():
    """The variables of a 4-bit Linen layer."""
    layer = q4jax.linen.Linear4bit(32, quant_type="nf4")
    return layer.init(jax.random.key(3), jnp.ones((1, 64)))


if __name__ == "__main__":
    pickles = weights()
    pickles["state"] = pickles["nested"].quant_state
    pickles["spec"] = pickles["nested"].quant_state.spec
    with open(HERE / "weights.pickle", "wb") as file:
        pickle.dump(pickles, file)
    for name, tree in {"nnx": nnx_model(), "linen": linen_variables()}.items():
        shutil.rmtree(HERE / name, ignore_errors=True)
        q4jax.checkpoint.save(HERE / name, tree)
        for marker in (HERE / name).rglob("commit_success.txt"):
            marker.write_text("Checkpoint commit was successful")  # without the path of a machine
