"""What a GPU would be given of a decoder whose layers are scanned: no copy of a weight.

Needs the extra `aot`.
"""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import q4jax
from q4jax.models import Llama, LlamaConfig
from q4jax.models.decoder.experts_config import ExpertsConfig
from q4jax.pallas.implementation import Pallas
from tests.support.gpu.aot import needs_aot
from tests.support.gpu.targets import compile_for, mesh_of

pytestmark = needs_aot()

SIZES = (64, 128, 256, 32, 4, 2, 32)
CONFIGS = {
    "mlp": LlamaConfig(*SIZES),
    "experts": LlamaConfig(*SIZES, model_type="mixtral", experts=ExpertsConfig(4, 2, 256)),
}
# An instruction that neither computes nor copies.
_FREE = ("parameter", "get-tuple-element", "tuple", "bitcast", "while", "constant")
_RESULT = re.compile(r" = (u8|s32)\[([\d,]*)\]\S* ([\w-]+)\(")


def model(name):
    """A 4-bit decoder of 32 layers with kernels, and adapters."""
    dtypes = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    made = q4jax.quantize_model(Llama(CONFIGS[name], **dtypes, rngs=nnx.Rngs(0)))
    for _, layer in nnx.iter_modules(made):
        if isinstance(layer, q4jax.Linear4bit):
            layer.implementation = "pallas"
    return q4jax.add_lora(made, rank=4, alpha=8.0)


@functools.cache
def programs(name):
    """The forward pass of one token, and a step of training, compiled for an H200."""
    graphdef, state = nnx.split(nnx.eval_shape(functools.partial(model, name)))

    def forward(state, ids):
        return nnx.merge(graphdef, state)(ids)

    def gradients(state, ids):
        def loss(model):
            return jax.nn.logsumexp(model(ids).astype(jnp.float32))

        adapters = nnx.DiffState(0, nnx.LoRAParam)
        return nnx.grad(loss, argnums=adapters)(nnx.merge(graphdef, state))

    mesh, length = mesh_of("sm_90"), {forward: 1, gradients: 16}
    return {
        f.__name__: compile_for(mesh, f, state, jax.ShapeDtypeStruct((1, n), jnp.int32)).as_text()
        for f, n in length.items()
    }


def made_of_codes(text):
    """Instructions outside of fusions whose results are codes or 8-bit scales of some weight."""
    found = []
    for body in re.split(r"\n}\n", text):
        if re.search(r"^%?(fused|wrapped)", body.strip()):
            continue
        for kind, shape, operation in _RESULT.findall(body):
            sizes = [int(n) for n in shape.split(",") if n]
            words = sizes[-1:] == [8]  # a view of codes that a kernel takes
            if operation not in _FREE and (kind == "u8" or words):
                found.append((operation, kind, sizes))
    return found


@pytest.mark.parametrize("program", ["forward", "gradients"])
@pytest.mark.parametrize("name", CONFIGS)
def test_no_weight_is_copied(name, program):
    text = programs(name)[program]
    assert text.count('custom_call_target="__gpu$xla.gpu.triton"') >= 7
    assert made_of_codes(text) == []


def test_without_stacks_they_are(monkeypatch):
    """The test can fail: this is what a scan over the weights themselves compiles to."""
    monkeypatch.setattr(Pallas, "takes_stacks", False)
    jax.clear_caches()
    found = made_of_codes(programs.__wrapped__("mlp")["forward"])
    assert len([sizes for _, kind, sizes in found if kind == "u8"]) >= 7
    jax.clear_caches()
