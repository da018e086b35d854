"""What a GPU would be given of a decoder whose layers are scanned: no copy of a weight.

Needs the extra `aot`.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import q4jax
from q4jax.models import Llama, LlamaConfig
from q4jax.models.decoder.experts_config import ExpertsConfig
from q4jax.pallas.implementation import Pallas
from q4jax.pallas.mosaic_gpu.implementation import MosaicGPU
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


def scanned_by_mosaic():
    """Products with the weights of a stack, and their gradient, compiled for an H200."""
    stack = jax.eval_shape(
        jax.vmap(q4jax.Params4bit.quantize), jax.ShapeDtypeStruct((3, 256, 256), jnp.bfloat16)
    )

    def gradient(x, stack):
        def layer(x, number):
            weight = q4jax.weight_of_stack(stack, number)
            return q4jax.matmul_4bit(x, weight, implementation="mosaic_gpu"), None

        def loss(x):
            return jax.nn.logsumexp(jax.lax.scan(layer, x, jnp.arange(3))[0].astype(jnp.float32))

        return jax.grad(loss)(x)

    x = jax.ShapeDtypeStruct((16, 256), jnp.bfloat16)
    return compile_for(mesh_of("sm_90"), gradient, x, stack).as_text()


def written_codes(text):
    """Instructions whose results are as large as the codes of a weight, and not free."""
    found = [
        (op, [int(n) for n in sizes.split(",") if n]) for _, sizes, op in _RESULT.findall(text)
    ]
    return [one for one in found if one[0] not in _FREE and math.prod(one[1]) >= 256 * 256 // 8]


@pytest.mark.slow
def test_no_weight_is_copied_for_mosaic_gpu(monkeypatch):
    text = scanned_by_mosaic()
    assert text.count('custom_call_target="mosaic_gpu_v2"') == 2
    assert written_codes(text) == []
    monkeypatch.setattr(MosaicGPU, "takes_stacks", False)
    jax.clear_caches()
    assert len(written_codes(scanned_by_mosaic())) >= 2
    jax.clear_caches()


def test_without_stacks_they_are(monkeypatch):
    """The test can fail: this is what a scan over the weights themselves compiles to."""
    monkeypatch.setattr(Pallas, "takes_stacks", False)
    jax.clear_caches()
    found = made_of_codes(programs.__wrapped__("mlp")["forward"])
    assert len([sizes for _, kind, sizes in found if kind == "u8"]) >= 7
    jax.clear_caches()
