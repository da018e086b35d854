"""Which layout of codes each implementation reads on a TPU, by what the compiler copies."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import q4jax
from q4jax.models import LlamaConfig
from q4jax.nnx.linear import Linear4bit
from q4jax.tree.lay_out import lay_out
from tests.support.compiled_for_tpu import bytes_moved
from tests.support.tpu.llama import qlora_model
from tests.support.tpu.targets import MISSING, compiled, on_one

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
CONFIG = LlamaConfig(
    vocab_size=256,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=128,
)
SMALLEST = 128 * 256 // 2  # bytes of the codes of one layer's k_proj
LAYERS, N = 4, 4096
X = jax.ShapeDtypeStruct((8, N), jnp.bfloat16)


def quantize(w):
    return q4jax.Params4bit.quantize(w, 64, True, "nf4", check_finite=False)


def scanned(x, stack):
    """Forward and backward through the layers of a stack."""

    def layer(x, weight):
        y, vjp = jax.vjp(lambda x: q4jax.matmul_4bit(x, weight), x)
        return vjp(y)[0], None

    return jax.lax.scan(layer, x, stack)[0]


def test_the_default_form_reads_the_default_layout():
    """With output features minor, it copies the codes first."""
    weight = on_one("v5e", jax.eval_shape(quantize, jax.ShapeDtypeStruct((N, N), jnp.bfloat16)))
    x = on_one("v5e", X)
    default = compiled(q4jax.matmul_4bit, x, weight)
    rows_minor = compiled(q4jax.matmul_4bit, x, lay_out({"weight": weight})["weight"])
    assert rows_minor.cycles - default.cycles > 100_000  # 174,000 become 303,000


def test_a_scan_with_the_default_form_copies_no_weight_in_memory():
    """Each layer's codes go to the chip's own memory, which is no temporary, and are read there."""
    stack = jax.ShapeDtypeStruct((LAYERS, N, N), jnp.bfloat16)
    stack = on_one("v5e", jax.eval_shape(jax.vmap(quantize), stack))
    program = compiled(scanned, on_one("v5e", X), stack)
    assert program.temporary <= 0.05 * N * N // 2  # of the codes of one layer


@pytest.mark.parametrize("laid_out", [False, True])
def test_a_scanned_model_by_the_kernels(laid_out):
    """Laid out, no layer's codes are copied, cut or transposed; else those of whole stacks."""
    model = nnx.eval_shape(functools.partial(qlora_model, CONFIG))
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Linear4bit):
            module.implementation = "pallas"
    model = on_one("v5e", model)
    graph, adapters, rest = nnx.split(lay_out(model) if laid_out else model, nnx.LoRAParam, ...)

    def gradients(adapters, rest, tokens):
        return jax.grad(lambda adapters: nnx.merge(graph, adapters, rest).loss(tokens))(adapters)

    tokens = on_one("v5e", jax.ShapeDtypeStruct((2, 129), jnp.int32))
    program = compiled(gradients, adapters, rest, tokens)
    assert "q4jax_tpu_linear_transpose" in program.text
    moved = bytes_moved(program.text)
    assert moved < SMALLEST if laid_out else moved >= CONFIG.num_hidden_layers * SMALLEST
